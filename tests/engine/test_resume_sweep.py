"""A run stopped at any step around its events goes on to the same weights, averages and rows, to the bit."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from convclip.devices import PRECISIONS
from tests.conftest import REPOSITORY
from tests.engine.outcome import differences, outcome, stop_after
from tests.engine.plain_average import figures_of_average, wrong_averages
from tests.engine.small_engine import allow_fp16_on_cpu
from tests.engine.small_run import make_files, train_here
from tests.processes import run_ranks

pytestmark = pytest.mark.launch

# Seven steps, three an epoch, with events and evaluations at steps 3 and 6; each step is saved.
SMALL = ("batch.global=8", "max_steps=7", "checkpoint.every_steps=1", "checkpoint.keep_last=100", "optim.ema_decay=0.6")
TWO_EVENTS = "freezing.unfreeze=[{epoch: 1, tower: text, layers: 1}, {epoch: 1, tower: image, groups: 2}]"
WAYS = {
    "plain": (),
    # Clamped at the first step.
    "accumulation": ("batch.accumulation=2", "optim.max_logit_scale=2.5"),
    "chunked": ("batch.micro=2",),
    "filled store": ("features=fill",),
    "two events at one step": (TWO_EVENTS,),
    "lr by layer": ("optim.layer_decay=0.7",),
}
STAGES, KINDS = range(4), ("fp32", "bf16")
EVERYTHING = [(way, stage, kind) for way in WAYS for stage in STAGES for kind in KINDS]
# Each way, each stage and each precision once or more.
SAMPLE = [(way, number % 4, KINDS[number % 2]) for number, way in enumerate(WAYS)]
# Its loss scale grows until a step is skipped, again and again.
FP16 = {"enabled": True, "initial_scale_power": 16, "loss_scale_window": 1, "hysteresis": 1}
SKIPPING = ("plain", 1, "fp16")


def ds_config(folder: str, stage: int, precision: str) -> str:
    """A released configuration of that stage in that precision; its path."""
    config = json.loads((REPOSITORY / "ds_configs" / f"zero{stage}_fp32.json").read_text())
    path = Path(folder) / f"zero{stage}_{precision}_{os.environ['RANK']}.json"
    half = {"fp16": FP16} if precision == "fp16" else {"bf16": {"enabled": precision == "bf16"}}
    path.write_text(json.dumps({**config, **half}))
    return str(path)


def other_figures(trained: dict, by_itself: dict) -> list[str]:
    """What differs between a row's figures of the average and those of the average by itself."""
    row = trained["ema"]
    same = row["standard"] == by_itself["standard"] and abs(row["val_loss"] - by_itself["val_loss"]) < 1e-5
    assert row["val_loss"] != trained["val_loss"]
    return [] if same else [f"{row} != {by_itself}"]


def resume_everywhere(files: str, folder: str, cases: list[tuple[str, int, str]], steps: list[int]) -> dict:
    """{(way, stage, precision, step resumed from): what differs from the run that never stopped}; only rank 0's."""
    from convclip.distributed import on_main

    allow_fp16_on_cpu()
    found = {}
    for way, stage, precision in cases:
        run, stopped = Path(folder, "run"), Path(folder, "stopped")
        config = ds_config(folder, stage, precision)
        options = (*SMALL, *WAYS[way])
        on_main(lambda run=run: shutil.rmtree(run, ignore_errors=True))
        train_here(files, str(run), config, options)
        expected = on_main(lambda run=run: outcome(run))
        found[way, stage, precision, "average"] = on_main(lambda run=run: wrong_averages(run))
        by_itself = figures_of_average(run, run / "checkpoints" / "step-00000007", PRECISIONS[precision])
        trained = json.loads((run / "eval.jsonl").read_text().splitlines()[-1])
        found[way, stage, precision, "figures"] = other_figures(trained, by_itself)
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
    # Each way with one rank or with two.
    cases = SAMPLE[world - 1 :: 2]
    found = run_ranks(world, resume_everywhere, str(files), str(tmp_path), [SKIPPING, *cases], [3])
    assert len(found) == 3 * (len(cases) + 1)
    assert not any(found.values()), {key: wrong for key, wrong in found.items() if wrong}


@pytest.mark.full
@pytest.mark.parametrize("world", [1, 2])
def test_resuming_anywhere_changes_nothing(files, tmp_path, world):
    found = run_ranks(world, resume_everywhere, str(files), str(tmp_path), EVERYTHING, [1, 2, 3, 4, 5, 6])
    assert len(found) == 8 * len(EVERYTHING)
    assert not any(found.values()), {key: wrong for key, wrong in found.items() if wrong}
