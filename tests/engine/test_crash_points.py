"""A run killed before any of its file operations goes on to the weights, rows, pointers and files it would have had."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.engine.crash_points import Recorder, recording
from tests.engine.outcome import differences, outcome
from tests.engine.small_run import make_files, train_here
from tests.processes import run_ranks

pytestmark = pytest.mark.launch

# Five steps, three an epoch: an event and an evaluation at step 3, saves at steps 2, 3, 4 and 5 of which one is kept.
# The moving average lies in the files of the weights.
SMALL = ("batch.global=8", "max_steps=5", "checkpoint.every_steps=2", "checkpoint.keep_last=1", "optim.ema_decay=0.5")
SPREAD = 15


def read_back(place: Path) -> str | None:
    """Anybody may read a run at any time: what is wrong with the checkpoint that it names, if it names one."""
    from convclip.models.checkpoint_weights import checkpoint_path, read_weights
    from convclip.schema import UserError

    try:
        if (place / "latest").exists() or (place / "best").exists():
            for ema in (False, True):
                read_weights(checkpoint_path(place), ema)
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
    found = run_ranks(1, kill_everywhere, str(files), str(tmp_path), 2, SPREAD)
    assert found["operations"] > 70 and found["points"] == SPREAD
    assert not found["wrong"], found["wrong"]


@pytest.mark.full
def test_a_kill_at_any_file_operation_changes_nothing(files, tmp_path):
    found = run_ranks(1, kill_everywhere, str(files), str(tmp_path), 2, None)
    print(f"{found['operations']} operations, {found['points']} different states of the folder")
    assert found["points"] >= 60
    assert not found["wrong"], found["wrong"]
