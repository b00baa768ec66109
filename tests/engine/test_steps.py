"""The chunked step against a plain PyTorch loop that has every feature with gradient, one loss, one backward.

Rows of the global batch: rank by rank, chunk by chunk. Where something is random the loop draws as the ranks do: each
rank has a generator of its own, which its chunks use in turn, once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from convclip.engine.inputs import Inputs
from convclip.engine.parameter_groups import Stage, training_stages
from convclip.engine.steps import RandomState, chunked_step
from convclip.losses.contrastive import clip_loss
from convclip.models import build_model
from convclip.models.dual_tower import DualTower
from convclip.models.layer_groups import frozen_image_boundary
from convclip.schema import Recipe
from tests.engine.small_engine import run_ranks

BATCH, CHUNK, STEPS, LR = 16, 4, 4, 2e-2
ZERO_STAGES = (0, 1, 2, 3)
LOCKED = {
    "lock": ["image", "text"],
    "unfreeze": [
        {"step": 1, "tower": "image", "groups": 3},
        {"step": 1, "tower": "text", "layers": 1},
        {"step": 2, "tower": "image", "all": True},
    ],
    "new_lr_scale": 0.5,
}


def small_recipe(drop_path: float = 0.0, freezing: dict[str, Any] | None = None) -> Recipe:
    image = {"backbone": "test_convnext", "image_size": 32, "drop_path": drop_path}
    text = {"width": 32, "heads": 2, "layers": 2, "context_length": 12, "vocab_size": 50}
    # A large eps: Adam divides by the gradient's size, which would make rounding of tiny gradients visible.
    values = {"model": {"embed_dim": 16, "image": image, "text": text}, "optim": {"eps": 1e-3, "clip_grad_norm": 0.5}}
    return Recipe.model_validate({"name": "small", "epochs": 1, "freezing": freezing or {}, **values})


def small_model(recipe: Recipe) -> DualTower:
    torch.manual_seed(0)
    return build_model(recipe.model)


def rows(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """The global batch of a step: pictures, captions of many lengths, image ids, some of them twice."""
    generator = torch.Generator().manual_seed(1000 + step)
    images = torch.randn(BATCH, 3, 32, 32, generator=generator)
    texts = torch.randint(1, 49, (BATCH, 12), generator=generator)
    texts[torch.arange(BATCH), torch.randint(2, 12, (BATCH,), generator=generator)] = 49
    return images, texts, torch.randint(0, BATCH - 4, (BATCH,), generator=generator)


def plain_loss(image: Tensor, text: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
    """The loss of the whole batch on whole logits."""
    others = (ids[:, None] == ids) & ~torch.eye(len(ids), dtype=torch.bool)
    logits = (scale * image @ text.T).masked_fill(others, -torch.inf)
    labels = torch.arange(len(ids))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def plain_run(recipe: Recipe, world: int, chunk: int) -> dict[str, Tensor]:
    """The oracle in one process: torch.optim.AdamW, add_param_group at the events."""
    model = small_model(recipe).requires_grad_(False)
    parameters = dict(model.named_parameters())
    stages = training_stages(model, recipe)
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=0.0, betas=recipe.optim.betas, eps=recipe.optim.eps)
    generators = []
    for rank in range(world):
        torch.manual_seed(rank)
        generators.append(RandomState.now())
    for step in range(STEPS):
        for stage in stages:
            if stage.start(STEPS) == step:
                for group in stage.opened:
                    members = [parameters[name].requires_grad_() for name in group.parameters]
                    scales = {"weight_decay": group.weight_decay, "lr": LR * group.lr_scale}
                    optimizer.add_param_group({"params": members, **scales})
                model.train()
        images, texts, ids = rows(step)
        features = []
        for rank, share in enumerate(torch.arange(BATCH).chunk(world)):
            generators[rank].restore()
            features += [model(images[part], texts[part]) for part in share.split(chunk)]
            generators[rank] = RandomState.now()
        image, text, scale = (torch.cat(column) for column in zip(*features, strict=True))
        optimizer.zero_grad()
        plain_loss(image, text, scale[0], ids).backward()
        torch.nn.utils.clip_grad_norm_([p for p in parameters.values() if p.requires_grad], 0.5)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}


def ds_config(zero_stage: int, world: int, precision: str, chunk: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": chunk,
        "gradient_accumulation_steps": BATCH // world // chunk,
        "gradient_clipping": 0.5,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": zero_stage},
        "zero_force_ds_cpu_optimizer": False,
    }
    return {**config, "bf16": {"enabled": True}} if precision == "bf16" else config


def chunks(step: int, size: int, dtype: torch.dtype) -> Iterator[Inputs]:
    """This rank's chunks."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    share = torch.arange(BATCH).chunk(world)[rank]
    images, texts, ids = rows(step)
    for part in share.split(size):
        yield Inputs(images[part].to(dtype), 0, texts[part], ids[part])


def loss_of(image: Tensor, text: Tensor, scale: Tensor, batches: list[Inputs]) -> dict[str, Tensor]:
    return {"total": clip_loss(image, text, scale, tile=3, ids=torch.cat([batch.image_id for batch in batches]))}


def chunked_run(
    recipe: Recipe, zero_stage: int, precision: str = "fp32", chunk: int = CHUNK, keep: float = 1e9
) -> dict[str, Tensor]:
    """Train by chunked steps under DeepSpeed, rebuilt at the events; full fp32 masters and frozen weights."""
    from convclip.engine.rebuild import build_engine, rebuild_engine

    world = torch.distributed.get_world_size()
    config = ds_config(zero_stage, world, precision, chunk)
    model = small_model(recipe)
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    stages = {stage.start(STEPS): stage for stage in training_stages(model, recipe)}
    engine = build_engine(model, stages[0].groups, config, recipe.optim, values)
    torch.manual_seed(torch.distributed.get_rank())
    stage = stages[0]
    for step in range(STEPS):
        if step and step in stages:
            stage = stages[step]
            opened = {n: values[n] for group in stage.opened for n in group.parameters}
            engine = rebuild_engine(engine, stage.groups, config, recipe.optim, opened)
        for group in engine.optimizer.param_groups:
            group["lr"] = LR * group["lr_scale"]
        inputs = chunks(step, chunk, torch.bfloat16 if precision == "bf16" else torch.float32)
        chunked_step(engine, inputs, loss_of, *frozen(engine.module, stage), keep)
    return {**values, **masters(engine, values)}


def frozen(model: DualTower, stage: Stage) -> tuple[int, bool]:
    """(boundary below which the image tower is frozen, is the text tower) of a stage."""
    return frozen_image_boundary(model, stage.trainable), not any(n.startswith("text.") for n in stage.trainable)


def masters(engine: Any, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The trained parameters' fp32 masters, full, gathered over ranks."""
    from convclip.engine.shards import is_replicated, optimizer_shards

    full: dict[str, Tensor] = {}
    for shard in optimizer_shards(engine):
        for piece in shard.pieces:
            full.setdefault(piece.parameter, torch.zeros(like[piece.parameter].numel()))
            values = shard.flat[piece.offset : piece.offset + piece.length]
            full[piece.parameter][piece.start : piece.start + piece.length] = values
    names = sorted({name for names in gathered(list(full)) for name in names})
    for name in names:
        value = full.setdefault(name, torch.zeros(like[name].numel()))
        if not is_replicated(engine):
            torch.distributed.all_reduce(value)
    return {name: full[name].view_as(like[name]) for name in names}


def gathered(names: list[str]) -> list[list[str]]:
    from convclip.distributed import gather_objects

    return gather_objects(names)


def all_ways(world: int) -> dict[Any, dict[str, Tensor]]:
    """Every case in one process group (starting processes is what costs time)."""
    found: dict[Any, dict[str, Tensor]] = {}
    for stage in ZERO_STAGES:
        found["random, kept", stage] = chunked_run(small_recipe(0.4, LOCKED), stage)
        found["bf16", stage] = chunked_run(small_recipe(), stage, "bf16")
    for stage in (2, 3):
        found["still", stage] = chunked_run(small_recipe(0.0, LOCKED), stage)
    found["random, not kept", 3] = chunked_run(small_recipe(0.4, LOCKED), 3, keep=0.0)
    found["bf16 in one", 0] = chunked_run(small_recipe(), 0, "bf16", BATCH // world)
    return found


@pytest.fixture(scope="module", params=[1, 2], ids=["world1", "world2"])
def found(request, tmp_path_factory) -> tuple[int, dict]:
    out = tmp_path_factory.mktemp("steps") / "found.pt"
    return request.param, run_ranks(request.param, out, all_ways, request.param)


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max((a[name] - b[name]).abs().max().item() for name in b)


@pytest.mark.launch
def test_chunks_of_any_ranks_equal_one_forward_of_the_whole_batch(found):
    _, results = found
    recipe = small_recipe(0.0, LOCKED)
    oracle = plain_run(recipe, 1, BATCH)
    assert difference(oracle, dict(small_model(recipe).named_parameters())) > 1e-2
    for stage in (2, 3):
        assert difference(results["still", stage], oracle) <= 1e-6, stage


@pytest.mark.launch
def test_drop_path_drops_the_same_in_both_passes_across_events(found):
    world, results = found
    oracle = plain_run(small_recipe(0.4, LOCKED), world, CHUNK)
    assert difference(plain_run(small_recipe(0.0, LOCKED), world, CHUNK), oracle) > 1e-3
    for way, result in results.items():
        if way[0].startswith("random"):
            assert difference(result, oracle) <= 1e-6, way


@pytest.mark.launch
def test_bf16_strays_no_further_from_fp32_in_chunks_than_in_one(found):
    _, results = found
    oracle = plain_run(small_recipe(), 1, BATCH)
    start = dict(small_model(small_recipe()).named_parameters())
    way = sum((oracle[name] - start[name]).square().sum() for name in oracle).sqrt()
    strays = {
        key: (sum((result[name] - oracle[name]).square().sum() for name in oracle).sqrt() / way).item()
        for key, result in results.items()
        if key[0].startswith("bf16")
    }
    assert len(strays) == 1 + len(ZERO_STAGES)
    assert strays["bf16 in one", 0] < 0.15, strays
    assert max(strays.values()) <= 1.5 * strays["bf16 in one", 0], strays


class PlainEngine:
    """What a chunked step asks of an engine, with plain autograd."""

    def __init__(self, module: torch.nn.Module, count: int) -> None:
        self.module, self.count, self.boundaries = module, count, []

    def __call__(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    def gradient_accumulation_steps(self) -> int:
        return self.count

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        self.boundaries.append(is_boundary)

    def backward(self, loss: Tensor, scale_wrt_gas: bool) -> None:
        assert not scale_wrt_gas
        loss.backward()

    def step(self) -> None:
        pass


class LinearTowers(torch.nn.Module):
    """Towers of linear layers; the image tower's first is frozen, and its output twice as large as its input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.text = (torch.nn.Linear(*sizes) for sizes in ((4, 8), (8, 4), (4, 4)))
        self.first.requires_grad_(False)
        self.first_runs = 0

    def forward(self, images: Tensor, texts: Tensor | None, boundary: int = 0, stop: int | None = None) -> Any:
        if boundary == 0:
            self.first_runs += 1
            images = self.first(images)
        if stop is not None:
            return images
        text = None if texts is None else F.normalize(self.text(texts), dim=-1)
        return F.normalize(self.second(images), dim=-1), text, torch.ones(1)


@pytest.mark.parametrize(("kept", "runs"), [(0, 7), (2, 5), (4, 4)])
def test_frozen_layers_run_once_while_their_output_may_be_kept(kept, runs):
    inputs = [Inputs(torch.randn(3, 4), 0, torch.randn(3, 4), torch.arange(3)) for _ in range(4)]
    beyond_the_input = 3 * (8 - 4) * 4
    engine = PlainEngine(LinearTowers(), 4)
    chunked_step(engine, inputs, loss_of, 1, False, kept * beyond_the_input)
    assert engine.module.first_runs == runs
    assert engine.boundaries == [False, False, False, True]


def stage0_model(recipe: Recipe) -> tuple[DualTower, int, bool]:
    """(model ready for stage 0 of the recipe, frozen boundary, is text frozen)."""
    model = small_model(recipe)
    stage = training_stages(model, recipe)[0]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in stage.trainable)
    model.train()
    return model, *frozen(model, stage)


def plain_chunks() -> list[Inputs]:
    images, texts, ids = rows(0)
    return [Inputs(images[part], 0, texts[part], ids[part]) for part in torch.arange(BATCH).split(CHUNK)]


def gradients(model: DualTower, inputs: list[Inputs], *how: Any) -> dict[str, Tensor]:
    model.zero_grad()
    chunked_step(PlainEngine(model, len(inputs)), inputs, loss_of, *how)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def test_stored_maps_and_embeddings_give_the_gradients_of_live_ones():
    model, boundary, text_is_frozen = stage0_model(small_recipe(0.4, LOCKED))
    live = plain_chunks()
    with torch.no_grad():
        maps = [model(chunk.image, None, 0, boundary - 1) for chunk in live]
        texts = [model(None, chunk.text)[1] for chunk in live]
    stored = [
        replace(chunk, image=kept, boundary=boundary - 1, text=None, text_embedding=text)
        for chunk, kept, text in zip(live, maps, texts, strict=True)
    ]
    expected = gradients(model, live, boundary, text_is_frozen, 1e9)
    found = gradients(model, stored, boundary, text_is_frozen, 1e9)
    assert expected.keys() == found.keys()
    assert difference(found, expected) <= 1e-7


def test_random_numbers_and_running_statistics_go_on_as_after_one_pass():
    recipe = small_recipe(0.4)
    image = recipe.model.image.model_copy(update={"backbone": "test_resnet", "head": "average_linear"})
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"image": image})})
    once, _, _ = stage0_model(recipe)
    torch.manual_seed(1)
    for chunk in plain_chunks():
        once(chunk.image, chunk.text)
    expected = torch.rand(3)
    chunked, _, _ = stage0_model(recipe)
    torch.manual_seed(1)
    gradients(chunked, plain_chunks(), 0, False, 0.0)
    assert torch.equal(torch.rand(3), expected)
    buffers = dict(chunked.named_buffers())
    assert any(name.endswith("running_var") for name in buffers)
    assert all(torch.equal(buffers[name], buffer) for name, buffer in once.named_buffers())
