"""A run stopped at any step around its events goes on to the same weights and rows, to the bit."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.engine.outcome import differences, outcome
from tests.engine.small_run import make_files, train_here
from tests.processes import run_ranks

pytestmark = pytest.mark.launch

# Seven steps, three an epoch, with events and evaluations at steps 3 and 6; each step is saved.
SMALL = ("batch.global=8", "max_steps=7", "checkpoint.every_steps=1", "checkpoint.keep_last=100")
TWO_EVENTS = "freezing.unfreeze=[{epoch: 1, tower: text, layers: 1}, {epoch: 1, tower: image, groups: 2}]"
WAYS = {
    "plain": (),
    "accumulation": ("batch.accumulation=2",),
    "chunked": ("batch.micro=2",),
    "filled store": ("features=fill",),
    "two events at one step": (TWO_EVENTS,),
}
STAGES, PRECISIONS = range(4), ("fp32", "bf16")
EVERYTHING = [(way, stage, precision) for way in WAYS for stage in STAGES for precision in PRECISIONS]
# Each way, each stage and each precision once or more.
SAMPLE = [(way, number % 4, PRECISIONS[number % 2]) for number, way in enumerate(WAYS)]


def ds_config(folder: str, stage: int, precision: str) -> str:
    """A released configuration of that stage in that precision; its path."""
    config = json.loads((REPOSITORY / "ds_configs" / f"zero{stage}_fp32.json").read_text())
    path = Path(folder) / f"zero{stage}_{precision}_{os.environ['RANK']}.json"
    path.write_text(json.dumps({**config, "bf16": {"enabled": precision == "bf16"}}))
    return str(path)


def stop_after(run: Path, step: int, stopped: Path) -> None:
    """A copy of the run as a kill after the save of `step` leaves it, but for rows that came later."""
    shutil.rmtree(stopped, ignore_errors=True)
    shutil.copytree(run, stopped)
    for checkpoint in (stopped / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    (stopped / "latest").write_text(f"checkpoints/step-{step:08d}\n")


def resume_everywhere(files: str, folder: str, cases: list[tuple[str, int, str]], steps: list[int]) -> dict:
    """{(way, stage, precision, step resumed from): what differs from the run that never stopped}; only rank 0's."""
    from convclip.distributed import on_main

    found = {}
    for way, stage, precision in cases:
        run, stopped = Path(folder, "run"), Path(folder, "stopped")
        config = ds_config(folder, stage, precision)
        options = (*SMALL, *WAYS[way])
        on_main(lambda run=run: shutil.rmtree(run, ignore_errors=True))
        train_here(files, str(run), config, options)
        expected = on_main(lambda run=run: outcome(run))
        for step in steps:
            on_main(lambda run=run, step=step, stopped=stopped: stop_after(run, step, stopped))
            train_here(files, str(stopped), config, options, resume="auto")
            found[way, stage, precision, step] = on_main(
                lambda expected=expected, stopped=stopped: differences(expected, outcome(stopped))
            )
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.mark.parametrize("world", [1, 2])
def test_resuming_at_an_event_changes_nothing(files, tmp_path, world):
    cases = SAMPLE[::world]
    found = run_ranks(world, resume_everywhere, str(files), str(tmp_path), cases, [3])
    assert len(found) == len(cases)
    assert not any(found.values()), {key: wrong for key, wrong in found.items() if wrong}


@pytest.mark.full
@pytest.mark.parametrize("world", [1, 2])
def test_resuming_anywhere_changes_nothing(files, tmp_path, world):
    found = run_ranks(world, resume_everywhere, str(files), str(tmp_path), EVERYTHING, [1, 2, 3, 4, 5, 6])
    assert len(found) == 6 * len(EVERYTHING)
    assert not any(found.values()), {key: wrong for key, wrong in found.items() if wrong}
