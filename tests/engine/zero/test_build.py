"""An unfreeze event changes nothing but what trains: DeepSpeed with rebuilds against a plain AdamW loop.

The moving average of the weights is among what is compared.
"""

from __future__ import annotations

import gc
import itertools

import pytest
import torch

from tests.engine.small_engine import (
    ALL,
    AVERAGE,
    OPTIM,
    allow_fp16_on_cpu,
    deepspeed_run,
    ds_config,
    masters,
    plain_run,
    train_step,
)
from tests.processes import run_ranks

STAGES = (0, 1, 2, 3)
# (ZeRO stage, whether the optimizer is offloaded)
WAYS = [*((stage, False) for stage in STAGES), (1, True), (2, True), (3, True)]
# Past the first event; five rebuilds more than needed.
BITWISE_STEPS = 11


def difference(a: dict, b: dict) -> float:
    return max((a[name] - b[name]).abs().max().item() for name in b)


def all_ways(world: int) -> dict:
    """Every stage and precision in one process group (starting processes is what costs time)."""
    oracle = plain_run(ema=True)
    table: dict = {}
    for stage, offload in WAYS:
        result, _ = deepspeed_run(ds_config(stage, world=world, offload=offload), ema=True)
        averages = {name: value for name, value in oracle.items() if name.startswith(AVERAGE)}
        table["fp32", stage, offload] = difference(result, {n: v for n, v in oracle.items() if n not in averages})
        table["fp32", stage, offload, "average"] = difference(result, averages)
    allow_fp16_on_cpu()
    for precision, stage in itertools.product(("fp32", "bf16", "fp16"), STAGES):
        if precision == "fp16" and stage == 0:
            continue
        config = ds_config(stage, precision, world)
        outcomes = []
        for every in (0, 2):
            result, engine = deepspeed_run(config, every, steps=BITWISE_STEPS, ema=True)
            scaler = getattr(engine.optimizer, "loss_scaler", None)
            outcomes.append((result, getattr(scaler, "cur_scale", None), engine.skipped_steps, engine.global_steps))
        (once, *counts), (often, *same_counts) = outcomes
        table[precision, stage, "bitwise"] = all(torch.equal(once[name], often[name]) for name in once)
        table[precision, stage, "counters"] = (counts, same_counts)
    return table


@pytest.fixture(scope="module", params=[1, 2], ids=["world1", "world2"])
def table(request) -> tuple[int, dict]:
    return request.param, run_ranks(request.param, all_ways, request.param)


@pytest.mark.launch
@pytest.mark.parametrize("stage", STAGES)
def test_two_events_equal_add_param_group(table, stage):
    world, differences = table
    assert differences["fp32", stage, False] <= (1e-7 if world == 1 else 1e-6)


@pytest.mark.launch
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloaded_optimizer_equals_add_param_group(table, stage):
    world, differences = table
    assert differences["fp32", stage, True] <= (1e-7 if world == 1 else 1e-6)


@pytest.mark.launch
@pytest.mark.parametrize(("stage", "offload"), WAYS)
def test_the_moving_average_equals_a_plain_one(table, stage, offload):
    _, differences = table
    # Values near 1, whose last digit two ways of writing the mean may round differently.
    assert differences["fp32", stage, offload, "average"] <= 1e-6


@pytest.mark.launch
@pytest.mark.parametrize(
    ("precision", "stage"),
    [(p, s) for p, s in itertools.product(("fp32", "bf16", "fp16"), STAGES) if (p, s) != ("fp16", 0)],
)
def test_rebuilding_often_is_bitwise_the_same(table, precision, stage):
    _, found = table
    assert found[precision, stage, "bitwise"]
    once, often = found[precision, stage, "counters"]
    assert once == often
    if precision == "fp16":
        assert once[1] > 0, "the loss scale was meant to overflow at first, so that skipped steps are tested"


# Rebuilds after which what is alive is counted.
COUNTED = (1, 19)


def many_rebuilds() -> dict:
    """Counts of hooks and live engines over twenty rebuilds in each stage."""
    from deepspeed import DeepSpeedEngine

    from convclip.engine.zero.build import rebuild_engine

    counts: dict = {}
    for stage in STAGES:
        config = ds_config(stage)
        _, engine = deepspeed_run(config, steps=15)
        counts[stage] = []
        for number in range(20):
            before = masters(engine)
            engine = rebuild_engine(engine, ALL, config, OPTIM, {})
            assert all(torch.equal(before[name], value) for name, value in masters(engine).items())
            train_step(engine, 15 + number)
            if number not in COUNTED:
                continue
            # A rebuild hides from the collector, and so from get_objects, what was alive then.
            gc.unfreeze()
            gc.collect()
            hooks = sum(
                len(module._forward_hooks) + len(module._forward_pre_hooks) for module in engine.module.modules()
            )
            hooks += sum(len(parameter._backward_hooks or ()) for parameter in engine.module.parameters())
            live = sum(isinstance(item, DeepSpeedEngine) for item in gc.get_objects())
            tensors = sum(item.numel() for item in gc.get_objects() if isinstance(item, torch.Tensor))
            counts[stage].append((hooks, live, tensors))
        del engine
    return counts


@pytest.mark.launch
def test_twenty_rebuilds_leave_nothing_behind():
    for stage, counts in run_ranks(1, many_rebuilds).items():
        hooks, live, elements = zip(*counts, strict=True)
        assert len(counts) == len(COUNTED)
        assert len(set(hooks)) == 1, f"stage {stage}: hooks {hooks}"
        assert len(set(live)) == 1, f"stage {stage}: live engines {live}"
        assert elements[-1] <= 1.01 * elements[0], f"stage {stage}: tensor elements {elements}"
