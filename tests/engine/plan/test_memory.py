"""The memory estimate against what is really allocated, and the trial step, which must leave no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from convclip.config import UserError, load_recipe
from convclip.engine import trial
from convclip.engine.inputs import Inputs
from convclip.engine.plan.memory import (
    GIB,
    USABLE,
    activations_per_row,
    check_estimate,
    estimate_stage,
    format_memory,
    input_bytes,
    longest_captions,
    loss_bytes,
    plan_memory,
)
from convclip.engine.stages.groups import Stage, training_stages
from convclip.engine.task import made_up_batch
from convclip.engine.zero.build import OptimizerSnapshot, build_engine, dismantle
from convclip.engine.zero.ds_config import precision
from convclip.losses.contrastive import clip_loss
from convclip.models import build_model
from convclip.models.dual_tower import Cut, DualTower
from convclip.models.layer_groups import frozen_cut
from convclip.run import plan_recipe
from convclip.schema import BatchConfig, Recipe
from tests.conftest import FULL
from tests.engine.small_engine import allow_fp16_on_cpu
from tests.engine.small_steps import LOCKED, chunked_run, ds_config, small_recipe, take_chunked_step
from tests.processes import run_ranks


def allocated(work: Callable[[], Any]) -> int:
    """Peak bytes that `work` holds above what was there before, by the allocator's own record."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    now = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def with_model(recipe: Recipe, checkpointing: bool = False, **image: Any) -> Recipe:
    tower = recipe.model.image.model_copy(update=image)
    model = recipe.model.model_copy(update={"image": tower})
    return recipe.model_copy(update={"model": model, "activation_checkpointing": checkpointing})


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("freezing", [{}, LOCKED], ids=["open", "locked"])
def test_activations_are_what_a_real_step_allocates(freezing, checkpointing):
    recipe = with_model(small_recipe(freezing=freezing), checkpointing, image_size=64)
    stage = training_stages(build_model(recipe.model), recipe)[0]
    estimate = activations_per_row(build_meta(recipe), recipe, stage)
    model = build_model(recipe.model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in stage.trainable)
        if name in stage.trainable:
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    model.train().set_grad_checkpointing(checkpointing)
    images, tokens = torch.randn(256, 3, 64, 64), longest_captions(recipe, 256)
    found = allocated(lambda: sum(x.sum() for x in model(images, tokens)[:3]).backward())
    assert found == pytest.approx(256 * estimate, rel=0.1)


@pytest.mark.parametrize("tile", [None, 128])
def test_loss_is_what_a_real_loss_allocates(tile):
    recipe = load_recipe("demo", ["model.embed_dim=64", f"loss.tile={'null' if tile is None else tile}"])
    image, text = (F.normalize(torch.randn(1024, 64), dim=1).requires_grad_() for _ in range(2))
    found = allocated(lambda: clip_loss(image, text, torch.tensor(20.0, requires_grad=True), tile=tile).backward())
    assert loss_bytes(recipe, 1024, 1) == pytest.approx(found + 4 * 4 * 1024 * 64, rel=0.2)


def test_what_does_not_grow_with_the_batch_follows_zero():
    recipe = small_recipe()
    model = build_meta(recipe)
    (stage,) = training_stages(model, recipe)
    count, buckets = sum(parameter.numel() for parameter in model.parameters()), 5e8 * 2
    config: dict[str, Any] = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 0}}
    expected = {
        0: (2 * count, 2 * count, 12 * count),
        1: (2 * count, 2 * count + buckets, 3 * count),
        2: (2 * count, 2 * count + buckets, 3 * count),
        3: (2 * count + count / 2, count / 2 + buckets, 3 * count),
    }
    for zero_stage, sizes in expected.items():
        config["zero_optimization"]["stage"] = zero_stage
        found = estimate_stage(recipe, stage, config, 4)
        assert (found.weights, found.gradients, found.optimizer) == pytest.approx(sizes, abs=8), zero_stage
    config["zero_optimization"]["stage"] = 2
    in_one = recipe.model_copy(update={"batch": BatchConfig.model_validate({"global": 16})})
    assert estimate_stage(in_one, stage, config, 4).gradients == pytest.approx(count / 2 + buckets, abs=8)
    assert estimate_stage(recipe, stage, {"zero_optimization": {"stage": 0}}, 1).optimizer == 8 * count
    offload = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    assert estimate_stage(recipe, stage, offload, 1).optimizer == 0


def test_a_moving_average_takes_a_shard_where_the_masters_are_and_nothing_without_one():
    without = small_recipe()
    averaged = without.model_copy(update={"optim": without.optim.model_copy(update={"ema_decay": 0.999})})
    (stage,) = training_stages(build_meta(without), without)
    count = sum(parameter.numel() for parameter in build_meta(without).parameters())
    here: dict[str, Any] = {"bf16": {"enabled": True}}
    offload = {"offload_optimizer": {"device": "cpu"}}
    for zero_stage, more, expected in ((0, {}, 4 * count), (3, {}, count), (2, offload, 0)):
        config = {**here, "zero_optimization": {"stage": zero_stage, **more}}
        one, other = (estimate_stage(recipe, stage, config, 4) for recipe in (averaged, without))
        assert one.parts(2)["ema"] == pytest.approx(expected, abs=4), zero_stage
        assert "ema" not in other.parts(2) and other.average == 0
        assert one.total(2) == other.total(2) + one.average
    planned = plan_memory(build_meta(averaged), averaged, [stage], config, 1)
    assert "  ema " in format_memory(planned)[1] and "ema" in planned["stages"][0]


def build_meta(recipe: Recipe) -> Any:
    with torch.device("meta"):
        return build_model(recipe.model)


def test_the_plan_names_a_micro_batch_for_each_device():
    overrides = ["batch.global=65536", "batch.micro=512", "loss.tile=4096"]
    plan = plan_recipe(load_recipe("base_absattn_3stage", overrides))["memory"]
    first, second, third = plan["stages"]
    assert first["total"] < second["total"] < third["total"]
    fits = [third["largest_micro"][size] for size in ("24", "40", "80", "141")]
    assert fits == sorted(fits) and 0 < fits[0] < fits[-1] <= 65536
    lines = format_memory(plan)
    assert len(lines) == 2 + 3
    assert str(fits[0]) in lines[-1]
    whole = plan_recipe(load_recipe("base_absattn_3stage", [*overrides, "loss.tile=null"]))["memory"]["stages"][0]
    assert whole["loss"] > 4 * 4 * 65536**2 / GIB
    assert whole["largest_micro"]["80"] == 0
    shared = plan_recipe(load_recipe("base_absattn_3stage", overrides), world=8)["memory"]["stages"][0]
    assert shared["inputs"] == pytest.approx(first["inputs"] / 8, abs=2e-3)


@pytest.mark.parametrize("text_kind", ["clip", "gpt2"])
@pytest.mark.parametrize("number", [0, 1])
def test_what_is_held_between_the_passes_is_what_the_towers_give(text_kind, number):
    recipe = small_recipe(freezing=LOCKED, text_kind=text_kind)
    model = build_model(recipe.model)
    stage = training_stages(model, recipe)[number]
    frozen, rows = frozen_cut(model, stage.trainable), 4
    pictures = torch.zeros(rows, 3, 32, 32, dtype=torch.uint8)
    batch = Inputs(pictures, longest_captions(recipe, rows), torch.arange(rows), normalize=Tensor.float)
    held = [rows * count for count in input_bytes(build_meta(recipe), recipe, stage)]
    assert held[0] == batch.nbytes("image") + batch.nbytes("text")
    for tower, value in zip(Cut._fields, model(*batch.up_to(frozen), stop=frozen), strict=True):
        batch = batch.entering(tower, value, frozen)
    assert held[1] == batch.nbytes("image") + batch.nbytes("text") != held[0]


def test_the_teacher_counts_where_it_runs():
    live, stored = (
        plan_recipe(load_recipe("base_absattn_distill_frozen", more))["memory"]["stages"][0]
        for more in ([], ["features=fill"])
    )
    assert live["weights"] - stored["weights"] == pytest.approx(2 * 179_385_345 / GIB, abs=2e-3)


def test_the_estimate_is_set_beside_the_peak():
    recipe, config = small_recipe(), {"zero_optimization": {"stage": 1}}
    stage = training_stages(build_meta(recipe), recipe)[0]
    line = check_estimate(recipe, stage, config, 1, 3.0)
    estimate = estimate_stage(recipe, stage, config, 1).total(4) / GIB
    assert f"estimated {estimate:.2f} GiB" in line
    assert "peak 3.00 GiB" in line


def test_a_step_that_does_not_fit_says_what_to_change(monkeypatch):
    recipe = small_recipe()
    model = build_model(recipe.model)
    stage = training_stages(model, recipe)[0]
    monkeypatch.setattr(trial, "take_snapshot", lambda engine: OptimizerSnapshot([], [], {}, {}))
    small = estimate_stage(recipe, stage, {}, 1).total(3) / USABLE
    monkeypatch.setattr(trial, "total_memory", lambda: small)

    def take_step(batches: Iterator[dict[str, Any]]) -> None:
        batch = next(batches)
        assert batch["image"].shape == (4, 3, 32, 32)
        assert batch["text"].argmax(1).tolist() == [11] * 4
        raise torch.OutOfMemoryError("CUDA out of memory")

    for change, words in [
        ({}, ["16 rows, 4 at a time", "batch.micro below 4 (2 should fit)", "activation_checkpointing=true"]),
        (
            {"batch": BatchConfig.model_validate({"global": 16, "accumulation": 4})},
            ["raise batch.accumulation above 4", "loss.tile=4096"],
        ),
        ({"batch": BatchConfig.model_validate({"global": 4})}, ["4 rows, 4 at a time", "set batch.micro below 4"]),
    ]:
        changed = recipe.model_copy(update=change)
        with pytest.raises(UserError) as raised:
            staged = SimpleNamespace(engine=SimpleNamespace(module=model), present=stage, ds_config={})
            trial.try_full_step(staged, changed, made_up_batch(changed, 4, {}), take_step)
        assert all(word in str(raised.value) for word in words), raised.value


def try_step(engine: Any, recipe: Recipe, stage: Stage, config: dict[str, Any], take_step: Callable) -> None:
    """A trial, with chunks made of the loader's batches as the trainer makes them."""
    count, dtype = config["gradient_accumulation_steps"], precision(config)

    def step_on_batches(batches: Iterator[dict[str, Any]]) -> None:
        made_up = (next(batches) for _ in range(count))
        take_step(Inputs(x["image"].to(dtype) / 255, x["text"], x["image_id"]) for x in made_up)

    staged = SimpleNamespace(engine=engine, present=stage, ds_config=config)
    batch = made_up_batch(recipe, config["train_micro_batch_size_per_gpu"], {})
    trial.try_full_step(staged, recipe, batch, step_on_batches)


def run_with_trials(recipe: Recipe, config: dict[str, Any]) -> dict[str, Tensor]:
    """A trial of the last stage before anything else, as training begins; and before each of the first two steps."""

    def before_all(model: DualTower, values: dict[str, Tensor]) -> None:
        stage = training_stages(model, recipe)[-1]
        engine = build_engine(model, stage.groups, config, recipe.optim, values)
        try_step(engine, recipe, stage, config, partial(take_chunked_step, engine, stage, 1e9))
        dismantle(engine)

    def before_step(engine: Any, step: int, take_step: Callable) -> None:
        if step < 2:
            try_step(engine, recipe, training_stages(engine.module, recipe)[0], config, take_step)
            assert engine.global_steps == step

    return chunked_run(recipe, config, before_all=before_all, before_step=before_step)


# The first two have DeepSpeed's two ZeRO optimizers, and a loss scale.
WAYS = [("fp32", 3), ("fp16", 1), ("fp32", 0), ("bf16", 0), ("bf16", 2), ("fp32", 1), ("fp32", 2), ("bf16", 3)]


def with_and_without_trials() -> dict[tuple[str, int], tuple[dict[str, Tensor], dict[str, Tensor]]]:
    allow_fp16_on_cpu()
    # Not every stage has batch norm in half precision on a CPU.
    recipes = {"fp32": small_recipe(0.4, backbone="test_resnet"), "bf16": small_recipe(0.4, LOCKED)}
    recipes["fp16"] = small_recipe(0.4)
    found = {}
    for kind, stage in WAYS if FULL else WAYS[:2]:
        config = ds_config(stage, kind)
        found[kind, stage] = chunked_run(recipes[kind], config), run_with_trials(recipes[kind], config)
    return found


@pytest.mark.launch
def test_a_trial_step_leaves_no_trace():
    found = run_ranks(2, with_and_without_trials)
    assert len(found) == (8 if FULL else 2)
    assert any(name.endswith("running_mean") for name in found["fp32", 3][0])
    for way, (without, tried) in found.items():
        assert without.keys() == tried.keys()
        assert all(torch.equal(tried[name], value) for name, value in without.items()), way
