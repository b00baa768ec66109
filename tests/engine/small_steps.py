"""A small dual tower trained by chunked steps under DeepSpeed, and by a plain PyTorch loop.

The loop has every feature with gradient, one loss and one backward. Rows of the global batch: rank by rank, chunk by
chunk. Where something is random the loop draws as the ranks do: each rank has a generator of its own, which its chunks
use in turn, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convclip.devices import RandomState
from convclip.distributed import gather_objects, rank, world_size
from convclip.engine.inputs import Inputs
from convclip.engine.stages.groups import Stage, training_stages
from convclip.engine.steps import chunked_step
from convclip.engine.zero.build import build_engine, rebuild_engine
from convclip.engine.zero.ds_config import precision
from convclip.engine.zero.masters import is_replicated, master_shards
from convclip.losses.contrastive import clip_loss, siglip_loss
from convclip.models import build_model
from convclip.models.dual_tower import DualTower, Outputs
from convclip.models.layer_groups import frozen_cut
from convclip.schema import Recipe

BATCH, CHUNK, STEPS, LR = 16, 4, 4, 2e-2
LOCKED = {
    "lock": ["image", "text"],
    "unfreeze": [
        {"step": 1, "tower": "image", "groups": 3},
        {"step": 1, "tower": "text", "layers": 1},
        {"step": 2, "tower": "image", "all": True},
    ],
    "new_lr_scale": 0.5,
}


def small_recipe(
    drop_path: float = 0.0,
    freezing: dict[str, Any] | None = None,
    backbone: str = "test_convnext",
    sigmoid: bool = False,
    text_kind: str = "clip",
) -> Recipe:
    image = {"backbone": backbone, "image_size": 32, "drop_path": drop_path, "head": "average_linear"}
    text = {"kind": text_kind, "width": 32, "heads": 2, "layers": 2, "context_length": 12, "vocab_size": 50}
    # A large eps: Adam divides by the gradient's size, which would make rounding of tiny gradients visible.
    values = {"model": {"embed_dim": 16, "image": image, "text": text}, "optim": {"eps": 1e-3, "clip_grad_norm": 0.5}}
    values["batch"] = {"global": BATCH, "micro": CHUNK}
    if sigmoid:
        values["model"]["init_logit_bias"] = -2.0
        values["loss"] = {"kind": "sigmoid"}
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


def plain_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
    """The loss of the whole batch on whole logits: SigLIP's where there is a bias."""
    pairs = torch.eye(len(ids), dtype=torch.bool)
    others = (ids[:, None] == ids) & ~pairs
    logits = scale * image @ text.T
    if bias is not None:
        signed = torch.where(pairs, 1, -1) * (logits + bias)
        return -F.logsigmoid(signed).masked_fill(others, 0.0).sum() / len(ids)
    logits = logits.masked_fill(others, -torch.inf)
    labels = torch.arange(len(ids))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def plain_run(
    recipe: Recipe, world: int, chunk: int, scale_of: Callable[[str], float] | None = None
) -> dict[str, Tensor]:
    """The oracle in one process: torch.optim.AdamW, add_param_group at the events.

    `scale_of` says each parameter's lr as a multiple of LR, in place of the recipe.
    """
    model = small_model(recipe).requires_grad_(False)
    parameters = dict(model.named_parameters())
    stages = training_stages(model, recipe)
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=0.0, betas=recipe.optim.betas, eps=recipe.optim.eps)
    generators = []
    for number in range(world):
        torch.manual_seed(number)
        generators.append(RandomState.now())
    for step in range(STEPS):
        for stage in stages:
            if stage.start(STEPS) == step:
                for group in stage.opened:
                    for name in group.parameters:
                        lr = LR * (scale_of(name) if scale_of else group.lr_scale)
                        entry = {"params": [parameters[name].requires_grad_()], "weight_decay": group.weight_decay}
                        optimizer.add_param_group({**entry, "lr": lr})
                model.train()
        images, texts, ids = rows(step)
        features = []
        for number, share in enumerate(torch.arange(BATCH).chunk(world)):
            generators[number].restore()
            features += [model(images[part], texts[part]) for part in share.split(chunk)]
            generators[number] = RandomState.now()
        image, text = (torch.cat([getattr(part, tower) for part in features]) for tower in ("image", "text"))
        optimizer.zero_grad()
        plain_loss(image, text, features[0].logit_scale, features[0].logit_bias, ids).backward()
        torch.nn.utils.clip_grad_norm_([p for p in parameters.values() if p.requires_grad], 0.5)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}


def ds_config(zero_stage: int, kind: str = "fp32", chunk: int = CHUNK) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": chunk,
        "gradient_accumulation_steps": BATCH // world_size() // chunk,
        "gradient_clipping": 0.5,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": zero_stage},
        "zero_force_ds_cpu_optimizer": False,
    }
    if kind == "bf16":
        config["bf16"] = {"enabled": True}
    if kind == "fp16":
        # A scale that overflows at first.
        config["fp16"] = {"enabled": True, "initial_scale_power": 24, "loss_scale_window": 2}
    return config


def chunks(step: int, size: int, dtype: torch.dtype) -> Iterator[Inputs]:
    """This rank's chunks."""
    share = torch.arange(BATCH).chunk(world_size())[rank()]
    images, texts, ids = rows(step)
    for part in share.split(size):
        yield Inputs(images[part].to(dtype), texts[part], ids[part])


def loss_of(outputs: Outputs, batches: list[Inputs], step: int) -> dict[str, Tensor]:
    """As an objective; a stored text embedding comes with the batches."""
    image, text, scale, bias, _ = outputs
    text = torch.cat([batch.text_embedding for batch in batches]) if text is None else text
    ids = torch.cat([batch.image_id for batch in batches])
    if bias is None:
        return {"total": clip_loss(image, text, scale, tile=3, ids=ids)}
    return {"total": siglip_loss(image, text, scale, bias, tile=3, ids=ids)}


def chunked_run(
    recipe: Recipe,
    config: dict[str, Any],
    keep: float = 1e9,
    before_all: Callable[[DualTower, dict[str, Tensor]], None] | None = None,
    before_step: Callable[[Any, int, Callable[[Iterator[Inputs]], Any]], None] | None = None,
) -> dict[str, Tensor]:
    """Train by chunked steps under DeepSpeed, rebuilt at the events; full fp32 masters and frozen weights.

    `before_all` is called with the model and its fp32 values, `before_step` with the engine, the step, and what takes
    a step on chunks.
    """
    model = small_model(recipe)
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    stages = {stage.start(STEPS): stage for stage in training_stages(model, recipe)}
    if before_all is not None:
        before_all(model, values)
    engine = build_engine(model, stages[0].groups, config, recipe.optim, values)
    torch.manual_seed(rank())
    stage = stages[0]
    for step in range(STEPS):
        if step and step in stages:
            stage = stages[step]
            opened = {n: values[n] for group in stage.opened for n in group.parameters}
            engine = rebuild_engine(engine, stage.groups, config, recipe.optim, opened)
        for group in engine.optimizer.param_groups:
            group["lr"] = LR * group["lr_scale"]
        take_step = partial(take_chunked_step, engine, stage, keep)
        if before_step is not None:
            before_step(engine, step, take_step)
        take_step(chunks(step, config["train_micro_batch_size_per_gpu"], precision(config)))
    return {**values, **masters(engine, values), **dict(engine.module.named_buffers())}


def take_chunked_step(engine: Any, stage: Stage, keep: float, inputs: Iterator[Inputs]) -> None:
    chunked_step(engine, inputs, loss_of, 0, frozen_cut(engine.module, stage.trainable), keep)


def masters(engine: Any, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The trained parameters' fp32 masters, full, gathered over ranks."""
    full: dict[str, Tensor] = {}
    for shard in master_shards(engine):
        for piece in shard.pieces:
            full.setdefault(piece.parameter, torch.zeros(like[piece.parameter].numel()))
            values = shard.flat[piece.offset : piece.offset + piece.length]
            full[piece.parameter][piece.start : piece.start + piece.length] = values
    names = sorted({name for names in gather_objects(list(full)) for name in names})
    for name in names:
        value = full.setdefault(name, torch.zeros(like[name].numel()))
        if not is_replicated(engine):
            torch.distributed.all_reduce(value)
    return {name: full[name].view_as(like[name]) for name in names}
