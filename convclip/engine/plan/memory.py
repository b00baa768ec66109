"""The memory that each stage takes on a rank: estimated without a device, and compared with the true peak on one.

Activations are measured: the model runs forward and backward on the meta device, which computes nothing, and every
allocation is counted. Weights, gradients and optimizer state follow from ZeRO's partition. Imports no DeepSpeed.
Shapes: B rows of a rank's step, M rows run at a time, W world, N = W*B rows of all ranks, D embed.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import open_clip
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from convclip.engine.stages.groups import Stage
from convclip.models import build_model
from convclip.models.dual_tower import INPUT, DualTower
from convclip.models.layer_groups import frozen_cut
from convclip.models.teacher import model_sizes
from convclip.schema import Recipe

GIB = 2**30
# Sizes of GPUs that the plan names a micro batch for, in GiB.
DEVICE_SIZES = (24, 40, 80, 141)
# What a plan assumes where no ds_config is given.
USUAL_DS_CONFIG: dict[str, Any] = {
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 50_000_000},
}
# Share of a device that training can have: the rest is its context, workspaces, and gaps between allocations.
USABLE = 0.92
# Activations are measured with this many rows, so that fixed costs hardly count.
MEASURED_ROWS = 256
# Matrices of B x N floats that a loss on whole logits holds at its peak; two more where ranks share the batch.
WHOLE_LOGITS = 4.5


@dataclass(frozen=True)
class StageMemory:
    """What a stage needs of one rank, in bytes. `row`: what activations take per row that runs at a time."""

    recipe: Recipe
    world: int
    weights: int
    gradients: int
    optimizer: int
    # fp32 copies that only the optimizer's step needs, when activations are gone.
    step_copies: int
    row: float
    # The moving average of what trains (optim.ema_decay), beside the masters.
    average: int
    # Per row of what enters the towers, and of what a chunked step keeps of their frozen parts in its place.
    input: int
    kept: int

    def parts(self, micro: int) -> dict[str, float]:
        """Bytes by part with `micro` rows run at a time."""
        batch = self.recipe.batch
        # A chunked step has inputs, features and logits of all of the rank's rows, another those of a micro batch.
        rows = batch.global_ // self.world if batch.micro else micro
        beyond = max(self.kept - self.input, 0) * rows
        return {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            # A column only where the recipe has one.
            **({} if self.recipe.optim.ema_decay is None else {"ema": self.average}),
            "activations": self.row * min(micro, rows),
            "inputs": rows * min(self.kept, self.input) + min(beyond, batch.keep_frozen_gib * GIB),
            "loss": loss_bytes(self.recipe, rows, self.world),
        }

    def total(self, micro: int) -> float:
        """Peak bytes with `micro` rows run at a time."""
        parts = self.parts(micro)
        fixed = self.weights + self.gradients + self.optimizer + self.average
        return fixed + max(sum(parts.values()) - fixed, self.step_copies)

    def largest_micro(self, device_bytes: float) -> int:
        """The largest power of two of rows at a time that fits a device of that size; 0 where not even one does."""
        most = self.recipe.batch.global_ // self.world if self.recipe.batch.micro else 2**20
        fitting = [2**n for n in range(21) if 2**n <= most and self.total(2**n) <= USABLE * device_bytes]
        return max(fitting, default=0)


def plan_memory(
    model: DualTower, recipe: Recipe, stages: Sequence[Stage], ds_config: Mapping[str, Any] | None, world: int
) -> dict[str, Any]:
    """The estimate of every stage as plain data, in GiB, and the rows at a time that fit devices of several sizes.

    `model` is on the meta device. Without a ds_config: ZeRO stage 2 in bf16. Errors: UserError where the batch does
    not divide by `world`.
    """
    config = ds_config or USUAL_DS_CONFIG
    micro, _ = recipe.batch.per_rank(world)
    rows = []
    for stage in stages:
        memory = stage_memory(model, recipe, stage, config, world)
        gib = {name: round(value / GIB, 3) for name, value in memory.parts(micro).items()}
        fits = {str(size): memory.largest_micro(size * GIB) for size in DEVICE_SIZES}
        rows.append({**gib, "total": round(memory.total(micro) / GIB, 3), "largest_micro": fits})
    return {
        "zero_stage": config.get("zero_optimization", {}).get("stage", 0),
        "value_bytes": value_bytes(config),
        "world": world,
        "micro": micro,
        "stages": rows,
    }


def format_memory(memory: dict[str, Any]) -> list[str]:
    """Lines of the table that `--plan` prints."""
    bits = 8 * memory["value_bytes"]
    parts = [name for name in memory["stages"][0] if name != "largest_micro"]
    sizes = list(memory["stages"][0]["largest_micro"])
    lines = [
        f"memory of a rank in GiB, estimated: ZeRO stage {memory['zero_stage']}, {bits} bit, world {memory['world']}, "
        f"{memory['micro']} rows at a time; on the right, rows at a time (batch.micro) that fit a GPU of so many GiB",
        f"{'stage':>5}" + "".join(f"{name:>12}" for name in parts) + " |" + "".join(f"{size:>7}" for size in sizes),
    ]
    for number, stage in enumerate(memory["stages"]):
        cells = "".join(f"{stage[name]:>12.2f}" for name in parts)
        fits = "".join(f"{stage['largest_micro'][size] or 'none':>7}" for size in sizes)
        lines.append(f"{number:>5}{cells} |{fits}")
    return lines


def check_estimate(
    recipe: Recipe, stage: Stage, ds_config: Mapping[str, Any], world: int, peak_gib: float, measured: str = "peak"
) -> str:
    """A log line: the estimate of `stage` beside what was measured. Takes about half a second."""
    micro, _ = recipe.batch.per_rank(world)
    estimate = estimate_stage(recipe, stage, ds_config, world).total(micro) / GIB
    return f"memory: estimated {estimate:.2f} GiB, {measured} {peak_gib:.2f} GiB ({peak_gib / estimate:.2f} of it)"


def estimate_stage(recipe: Recipe, stage: Stage, ds_config: Mapping[str, Any], world: int) -> StageMemory:
    """What `stage` of `recipe` needs on each of `world` ranks."""
    with torch.device("meta"):
        model = build_model(recipe.model)
    return stage_memory(model, recipe, stage, ds_config, world)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages made inside it: `now` alive, `peak` the most so far. Those of `known` do not count.

    Works on the meta device, where nothing is computed, as on any other.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._watch(tensor.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._alive.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


def stage_memory(
    model: DualTower, recipe: Recipe, stage: Stage, ds_config: Mapping[str, Any], world: int
) -> StageMemory:
    """What `stage` of `recipe` needs on each of `world` ranks; `model`, on the meta device, is made ready for it."""
    size, zero = value_bytes(ds_config), ds_config.get("zero_optimization", {})
    zero_stage = zero.get("stage", 0)
    model.to({2: torch.bfloat16, 4: torch.float32}[size])
    trained = sum(p.numel() for n, p in model.named_parameters() if n in stage.trainable)
    weights = sum(p.numel() for p in model.parameters()) * size
    if zero_stage == 3:
        gathered = min(weights, zero.get("stage3_max_live_parameters", 10**9) * size)
        weights = weights // world + gathered
    buckets = 0
    if zero_stage and zero.get("contiguous_gradients", True):
        doubled = 2 if zero_stage < 3 and zero.get("overlap_comm", False) else 1
        buckets = int(zero.get("reduce_bucket_size", 5e8)) * doubled * size
    shard = trained // world if zero_stage else trained
    offloaded = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    # A chunked step in stage 2 holds whole gradients, so as to reduce them once.
    splits = zero_stage == 3 or (zero_stage == 2 and not recipe.batch.micro)
    # Adam's two moments, and the fp32 masters that only plain fp32 training does without.
    numbers = 2 if size == 4 and zero_stage == 0 else 3
    entering, kept = input_bytes(model, recipe, stage)
    return StageMemory(
        recipe,
        world,
        weights=weights + teacher_bytes(recipe, size),
        gradients=(trained // world if splits else trained) * size + buckets,
        optimizer=0 if offloaded else 4 * numbers * shard,
        average=0 if offloaded or recipe.optim.ema_decay is None else 4 * shard,
        step_copies=0 if offloaded or numbers == 2 else 4 * shard,
        # With them, the images as the tower takes them.
        row=activations_per_row(model, recipe, stage) + 3 * recipe.model.image.image_size**2 * size,
        input=entering,
        kept=kept,
    )


def activations_per_row(model: DualTower, recipe: Recipe, stage: Stage) -> float:
    """Peak bytes per row of a forward and backward through what `stage` trains, captions of full length."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in stage.trainable)
    model.train()
    model.set_grad_checkpointing(recipe.activation_checkpointing)
    side, dtype = recipe.model.image.image_size, next(model.parameters()).dtype
    images = torch.empty(MEASURED_ROWS, 3, side, side, dtype=dtype, device="meta")
    # Real ids: the text tower asks for the length of the longest caption.
    tokens = longest_captions(recipe, MEASURED_ROWS)
    dropped = [
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    with LiveBytes([*model.parameters(), *model.buffers(), images, tokens]) as live:
        outputs = model(images, tokens)
        sum(x.sum() for x in tree_leaves(outputs) if x is not None).backward()
    for hook in dropped:
        hook.remove()
    return live.peak / MEASURED_ROWS


def longest_captions(recipe: Recipe, rows: int) -> Tensor:
    """Token ids int64 [rows, T]: captions as long as the context."""
    tokens = torch.ones(rows, recipe.model.text.context_length, dtype=torch.int64)
    tokens[:, -1] = recipe.model.text.vocab_size - 1
    return tokens


def input_bytes(model: DualTower, recipe: Recipe, stage: Stage) -> tuple[int, int]:
    """Bytes per row of (images and token ids, what a chunked step keeps of the towers' frozen parts in their place).

    Where it keeps nothing, the two are the same.
    """
    cut = frozen_cut(model, stage.trainable) if recipe.batch.micro else INPUT
    side, dtype = recipe.model.image.image_size, next(model.parameters()).dtype
    picture, tokens = torch.empty(1, 3, side, side, dtype=torch.uint8, device="meta"), longest_captions(recipe, 1)
    # As for `map_shape`: one image is too few for a batch norm in train mode.
    model.eval()
    with torch.no_grad():
        frozen = model(picture.to(dtype), tokens, stop=cut)
    image, text = (sum(x.nbytes for x in tree_leaves(part)) for part in frozen)
    return picture.nbytes + tokens.nbytes, (image if cut.image else picture.nbytes) + text


def loss_bytes(recipe: Recipe, rows: int, world: int) -> float:
    """Features of `rows` rows and of all ranks, their gradients, and logits: all of a rank's, or two tiles."""
    row, tile = 4 * recipe.model.embed_dim, recipe.loss.tile
    # Distillation has a second pair of features and logits.
    parts = 2 if recipe.teacher else 1
    own, gathered = rows * row, (rows * world * row if world > 1 else 0)
    features = 4 * own + parts * (2 * own + 2 * gathered)
    if tile is not None:
        return features + parts * 2 * 4 * min(tile, rows * world) ** 2
    return features + (WHOLE_LOGITS * parts + (2 if world > 1 else 0)) * 4 * rows * rows * world


def teacher_bytes(recipe: Recipe, size: int) -> int:
    """Weights of a teacher that runs beside the model; 0 where a store has its embeddings, or its size is not known."""
    if recipe.teacher is None or recipe.features.mode != "live":
        return 0
    if model_sizes(recipe.teacher) is None:
        return 0
    return _parameters_of(recipe.teacher.model) * size


@functools.cache
def _parameters_of(name: str) -> int:
    """How many parameters an open_clip model has; kept, as every stage asks and building it takes half a second."""
    logging.disable(logging.WARNING)  # open_clip warns that the weights are random
    with torch.device("meta"):
        model = open_clip.create_model(name, pretrained=None, device="meta")
    logging.disable(logging.NOTSET)
    return sum(parameter.numel() for parameter in model.parameters())


def value_bytes(ds_config: Mapping[str, Any]) -> int:
    """Bytes of a weight or activation under `ds_config`."""
    return 2 if any(ds_config.get(name, {}).get("enabled") for name in ("bf16", "fp16")) else 4
