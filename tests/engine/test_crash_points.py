"""A run killed before any of its file operations goes on to the weights, rows, pointers and files it would have had."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.crash_points import Recorder, contents, recording
from tests.engine.small_engine import run_ranks
from tests.engine.small_run import make_files, train_here

pytestmark = pytest.mark.launch

# Five steps, three an epoch: an event and an evaluation at step 3, saves at steps 2, 3, 4 and 5 of which one is kept.
SMALL = ("batch.global=8", "max_steps=5", "checkpoint.every_steps=2", "checkpoint.keep_last=1")
TIMES = ("samples_per_s", "data_share", "step_seconds", "memory_gib")
SPREAD = 15


def outcome(run: Path) -> dict[str, Any]:
    """What a run leaves, but for times and for what is drawn at random."""
    files = contents(run)
    found: dict[str, Any] = {}
    for name, data in files.items():
        if name.endswith(".jsonl"):
            rows = [json.loads(line) for line in data.splitlines()]
            found[name] = [{k: v for k, v in row.items() if k not in TIMES} for row in rows]
        elif name.endswith("state.json"):
            found[name] = {**json.loads(data), "run": ""}
        elif name.endswith(".safetensors"):
            from safetensors.torch import load

            found[name] = load(data)
        else:
            found[name] = data
    return found


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    wrong = [f"{name} is there" for name in found.keys() - expected.keys()]
    for name, value in expected.items():
        if name not in found:
            wrong.append(f"{name} is missing")
        elif name.endswith(".safetensors"):
            wrong += [f"{name} {key}" for key in value if not torch.equal(value[key], found[name][key])]
        elif value != found[name]:
            wrong.append(f"{name}: {value} != {found[name]}")
    return wrong


def read_back(place: Path) -> str | None:
    """Anybody may read a run at any time: what is wrong with the checkpoint that it names, if it names one."""
    from convclip.models.checkpoint_weights import checkpoint_path, read_weights
    from convclip.schema import UserError

    try:
        if (place / "latest").exists() or (place / "best").exists():
            read_weights(checkpoint_path(place))
    except UserError as error:
        return str(error)
    return None


def kill_everywhere(files: str, folder: str, stage: int, spread: int | None) -> dict[str, Any]:
    """Record a run's crash points (of rank 0), go on from each (or from `spread` of them), and compare."""
    from convclip.distributed import barrier, is_main, on_main

    run, copies, again = Path(folder, "run"), Path(folder, "copies"), Path(folder, "again")
    recorder = Recorder(run, copies)
    if is_main():
        with recording(recorder):
            train_here(files, str(run), stage, SMALL)
    else:
        train_here(files, str(run), stage, SMALL)
    points = on_main(lambda: recorder.points)
    if spread is not None:
        points = [points[index * (len(points) - 1) // (spread - 1)] for index in range(spread)]
    expected, wrong = on_main(lambda: outcome(run)), {}
    for place, operation in points:
        if is_main():
            unreadable = read_back(place)
            if unreadable is not None:
                wrong[f"{place.name} reading before {operation}"] = [unreadable]
            shutil.rmtree(again, ignore_errors=True)
            shutil.copytree(place, again)
        barrier()
        try:
            train_here(files, str(again), stage, SMALL, resume="auto")
        except Exception as error:
            wrong[f"{place.name} {operation}"] = [repr(error)]
            continue
        found = on_main(lambda: differences(expected, outcome(again)))
        if found:
            wrong[f"{place.name} {operation}"] = found
    return {"operations": on_main(lambda: recorder.operations), "points": len(points), "wrong": wrong}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


def test_a_kill_at_a_file_operation_changes_nothing(files, tmp_path):
    found = run_ranks(1, tmp_path / "out.pt", kill_everywhere, str(files), str(tmp_path), 2, SPREAD)
    assert found["operations"] > 70 and found["points"] == SPREAD
    assert not found["wrong"], found["wrong"]


@pytest.mark.full
@pytest.mark.skipif("CONVCLIP_FULL" not in os.environ, reason="make test-full runs all of them")
def test_a_kill_at_any_file_operation_changes_nothing(files, tmp_path):
    found = run_ranks(1, tmp_path / "out.pt", kill_everywhere, str(files), str(tmp_path), 2, None)
    print(f"{found['operations']} operations, {found['points']} different states of the folder")
    assert found["points"] >= 60
    assert not found["wrong"], found["wrong"]
