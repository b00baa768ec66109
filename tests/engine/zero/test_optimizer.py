"""Optimizers other than AdamW through events, a save and a resume: state that is a tensor, a number or a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from convclip.engine.zero import build
from convclip.engine.zero.checkpoint import load_checkpoint, save_checkpoint
from convclip.models.checkpoint_weights import RunState
from tests.engine.small_engine import (
    OPTIM,
    SCHEDULE,
    SmallModel,
    ds_config,
    masters,
    plain_run,
    train_step,
)
from tests.processes import run_ranks

STEPS, SAVED_AT = 18, 10


class Counting(torch.optim.Optimizer):
    """Sign descent that slows down: its state is a Python number, a word and a tensor."""

    def __init__(self, groups: Any, lr: float = 0.0) -> None:
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["count"] = state.get("count", 0) + 1
                state["word"] = "even" if state["count"] % 2 == 0 else "odd"
                state["mean"] = 0.9 * state.get("mean", torch.zeros_like(p)) + p.grad
                slower = 2.0 if state["word"] == "even" else 1.0
                p.add_(state["mean"].sign(), alpha=-group["lr"] / (slower * state["count"]))


def sgd(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9)


def counting(groups: Any) -> torch.optim.Optimizer:
    return Counting(groups)


def configuration(stage: int, kind: str) -> dict[str, Any]:
    return {**ds_config(stage, kind, torch.distributed.get_world_size()), "zero_allow_untested_optimizer": True}


def run(stage: int, kind: str, folder: Path | None = None, resume: Path | None = None) -> dict[str, Any]:
    """Train over two events; with `folder` save on the way, with `resume` begin from what was saved. The masters."""
    config, model, engine = configuration(stage, kind), SmallModel(), None
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    groups: Any = None
    for step in range(STEPS):
        opened, groups = step in SCHEDULE, SCHEDULE.get(step, groups)
        if resume is not None and step < SAVED_AT:
            continue
        if engine is None:
            engine = build.build_engine(model, groups, config, OPTIM, values)
            if resume is not None:
                load_checkpoint(engine, resume)
        elif opened:
            engine = build.rebuild_engine(engine, groups, config, OPTIM, values)
        train_step(engine, step)
        if folder is not None and step + 1 == SAVED_AT:
            world = torch.distributed.get_world_size()
            save_checkpoint(engine, folder, RunState(SAVED_AT, 1, world, stage, kind))
    return masters(engine)


def every_way(folder: str) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for make in (sgd, counting):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build, "make_optimizer", lambda optim, groups, make=make: make(groups))
            for stage, kind in ((0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "fp32")):
                key, place = (make.__name__, stage, kind), Path(folder) / f"{make.__name__}{stage}{kind}"
                whole = run(stage, kind, place)
                resumed = run(stage, kind, resume=place / f"step-{SAVED_AT:08d}")
                found[key] = whole, resumed
    return found


@pytest.mark.launch
@pytest.mark.parametrize("world", [1, 2])
def test_any_optimizer_goes_through_events_saves_and_resumes(tmp_path, world):
    found = run_ranks(world, every_way, str(tmp_path))
    assert len(found) == 10
    for (name, stage, kind), (whole, resumed) in found.items():
        key = name, stage, kind
        if kind == "fp32":
            oracle = plain_run(STEPS, {"sgd": sgd, "counting": counting}[name])
            # A sign may flip where a gradient is all but zero.
            limit = 1e-6 if name == "sgd" else 2e-2
            assert max((whole[n] - oracle[n]).abs().max().item() for n in oracle) <= limit, key
        assert all(torch.equal(resumed[n], value) for n, value in whole.items()), key
