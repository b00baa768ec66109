"""A step whose gradient is not finite on one rank is skipped in every stage alike, and the next go on as without it.

With a real dual tower: ZeRO-3 treats the small parameters of a small model otherwise.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from convclip.distributed import rank
from convclip.engine.stages.groups import training_stages
from convclip.engine.steps import accumulated_step, chunked_step
from convclip.engine.zero.build import build_engine, take_snapshot
from convclip.engine.zero.ds_config import precision
from convclip.engine.zero.masters import clamp_parameter, master_shards, write_masters
from convclip.models.layer_groups import frozen_cut
from tests.conftest import FULL
from tests.engine.small_engine import allow_fp16_on_cpu
from tests.engine.small_steps import LR, chunks, ds_config, loss_of, masters, small_model, small_recipe
from tests.processes import run_ranks

BAD = 1


def poisoned(outputs: Any, batches: Any, step: int) -> dict[str, torch.Tensor]:
    """A finite loss whose gradient is infinite on the last rank in the bad step: x * 0 + sqrt(0) has slope infinity."""
    losses = loss_of(outputs, batches, step)
    if step == BAD and rank() == torch.distributed.get_world_size() - 1:
        zero = (outputs.image * 0).sum()
        losses["total"] = losses["total"] + zero.clamp_min(0).sqrt() * 0.0 + zero.abs().sqrt()
    return losses


def run(stage: int, kind: str, chunked: bool, skip: bool) -> tuple[dict[str, torch.Tensor], list[bool], bool]:
    """(masters after three steps, which updated, whether the skipped one changed masters or state)."""
    recipe = small_recipe()
    model = small_model(recipe)
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    config = ds_config(stage, kind)
    first = training_stages(model, recipe)[0]
    engine = build_engine(model, first.groups, config, recipe.optim, values)
    updated, changed = [], False
    for step in range(3):
        if step == BAD and skip:
            continue
        for group in engine.optimizer.param_groups:
            group["lr"] = LR * group["lr_scale"]
        before = [tensor.clone() for tensor in everything(engine)] if step == BAD else []
        inputs = chunks(step, config["train_micro_batch_size_per_gpu"], precision(config))
        if chunked:
            cut = frozen_cut(engine.module, first.trainable)
            result = chunked_step(engine, inputs, poisoned, step, cut, 1e9)
        else:
            result = accumulated_step(engine, inputs, poisoned, step)
        updated.append(result.updated)
        if step == BAD:
            after = everything(engine)
            changed = len(after) != len(before) or not all(map(torch.equal, before, after))
    return masters(engine, values), updated, changed


def everything(engine: Any) -> list[torch.Tensor]:
    snapshot = take_snapshot(engine)
    states = [state[key] for state in snapshot.states for key in sorted(state)]
    return [*snapshot.masters, *states]


def every_way() -> dict[Any, Any]:
    allow_fp16_on_cpu()
    ways = [(0, "fp32", False), (3, "bf16", False)]
    if torch.distributed.get_world_size() > 1:
        # ZeRO 1 and 2 are one optimizer of DeepSpeed.
        ways = [(stage, "fp32", False) for stage in (0, 2, 3)] + [(2, "bf16", False), (3, "fp32", True)]
        if FULL:
            ways += (
                [(1, "fp32", False)]
                + [(stage, "bf16", False) for stage in (0, 1, 3)]
                + [(0, "fp32", True), (3, "fp16", False)]
            )
    return {way: (run(*way, skip=False), run(*way, skip=True)) for way in ways}


@pytest.mark.launch
@pytest.mark.parametrize("world", [1, 2])
def test_an_infinite_gradient_changes_nothing_in_any_stage(world):
    for (stage, kind, chunked), (bad, without) in run_ranks(world, every_way).items():
        key = stage, kind, chunked
        weights, updated, changed = bad
        assert all(value.isfinite().all() for value in weights.values()), key
        if kind == "fp16":
            continue
        assert updated == [True, False, True] and not changed, key
        assert all(torch.equal(weights[name], value) for name, value in without[0].items()), key


def clamped_below() -> tuple[float, float]:
    """(master, what the next forward sees) of a logit scale pushed below 0, in stage 3 with nothing held whole."""
    recipe = small_recipe()
    model = small_model(recipe)
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    config = ds_config(3)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    engine = build_engine(model, training_stages(model, recipe)[0].groups, config, recipe.optim, values)
    write_masters(engine, {"logit_scale": torch.full((1,), -0.5)})
    clamp_parameter(engine, master_shards(engine), "logit_scale", 0.0, 4.6)
    batch = next(chunks(0, config["train_micro_batch_size_per_gpu"], torch.float32))
    with torch.no_grad():
        seen = engine(*batch.model_inputs()).logit_scale.log().item()
    return masters(engine, values)["logit_scale"].item(), seen


@pytest.mark.launch
def test_the_lower_clamp_reaches_the_copy_of_stage_3():
    assert run_ranks(2, clamped_below) == (0.0, 0.0)
