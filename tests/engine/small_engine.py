"""A small model trained two ways for the engine tests: by DeepSpeed with rebuilds, and by a plain torch AdamW loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from convclip.engine.stages.groups import Group
from convclip.schema import Optim

STEPS, BATCH, ACCUMULATION, CLIP = 30, 8, 2, 0.5
# Of the moving average of what trains, under these names among the weights.
EMA, AVERAGE = 0.8, "average of "
OPTIM = Optim()


class SmallModel(nn.Module):
    """Three layers and a logit_scale; odd sizes, so that no stage partitions it evenly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(7, 9), nn.Linear(9, 11), nn.Linear(11, 5)
        self.logit_scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.third(hidden) * self.logit_scale


def _group(name: str, parameters: list[str], decay: float, scale: float) -> Group:
    return Group(name, tuple(parameters), scale, decay)


START = [_group("third", ["third.weight"], 0.2, 1.0), _group("third.nd", ["third.bias", "logit_scale"], 0.0, 1.0)]
LATER = [*START, _group("second", ["second.weight"], 0.2, 0.1), _group("second.nd", ["second.bias"], 0.0, 0.1)]
ALL = [*LATER, _group("first", ["first.weight"], 0.2, 0.5), _group("first.nd", ["first.bias"], 0.0, 0.5)]
# Step at which each set of groups begins to train: two unfreeze events.
SCHEDULE: Mapping[int, list[Group]] = {0: START, 6: LATER, 14: ALL}


def lr(step: int) -> float:
    """A learning rate that changes every step."""
    return 1e-2 * (1 + step % 3)


def inputs(step: int, micro: int) -> Tensor:
    """The global micro batch [BATCH, 7] of a step."""
    return torch.randn(BATCH, 7, generator=torch.Generator().manual_seed(1000 + ACCUMULATION * step + micro))


def adamw(entries: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Torch's own, as `OPTIM` says."""
    return torch.optim.AdamW(entries, lr=0.0, betas=OPTIM.betas, eps=OPTIM.eps)


def plain_run(
    steps: int = STEPS, make: Callable[..., torch.optim.Optimizer] = adamw, ema: bool = False
) -> dict[str, Tensor]:
    """The oracle: one process, a plain torch optimizer, add_param_group at the events; with `ema` averages, too."""
    model = SmallModel().requires_grad_(False)
    parameters = dict(model.named_parameters())
    optimizer: torch.optim.Optimizer | None = None
    averages: dict[str, Tensor] = {}
    for step in range(steps):
        for group in SCHEDULE.get(step, [])[len(optimizer.param_groups) if optimizer else 0 :]:
            members = [parameters[name].requires_grad_(True) for name in group.parameters]
            averages |= {name: parameters[name].detach().clone() for name in group.parameters}
            entry = {"params": members, "weight_decay": group.weight_decay, "lr_scale": group.lr_scale}
            if optimizer is None:
                optimizer = make([entry])
            else:
                optimizer.add_param_group(entry)
        assert optimizer is not None
        optimizer.zero_grad()
        for micro in range(ACCUMULATION):
            (model(inputs(step, micro)).square().mean() / ACCUMULATION).backward()
        torch.nn.utils.clip_grad_norm_([p for p in parameters.values() if p.requires_grad], CLIP)
        for entry in optimizer.param_groups:
            entry["lr"] = lr(step) * entry["lr_scale"]
        optimizer.step()
        averages = {name: EMA * old + (1 - EMA) * parameters[name].detach() for name, old in averages.items()}
    found = {name: parameter.detach() for name, parameter in parameters.items()}
    return {**found, **({AVERAGE + name: value for name, value in averages.items()} if ema else {})}


def ds_config(stage: int, precision: str = "fp32", world: int = 1, offload: bool = False) -> dict[str, Any]:
    """A resolved DeepSpeed configuration for the small model."""
    zero: dict[str, Any] = {"stage": stage}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    if stage == 3:
        # Several sub-groups per parameter group, as a large model has.
        zero["sub_group_size"] = 60
    config: dict[str, Any] = {
        "train_batch_size": BATCH * ACCUMULATION,
        "train_micro_batch_size_per_gpu": BATCH // world,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": CLIP,
        "steps_per_print": 10**9,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
    }
    if precision == "bf16":
        config["bf16"] = {"enabled": True}
    if precision == "fp16":
        # A scale that overflows at first, so that skipped steps are part of what must be kept.
        config["fp16"] = {"enabled": True, "initial_scale_power": 24, "loss_scale_window": 4}
    return config


def train_step(engine: Any, step: int) -> bool:
    """One optimizer step of the small model on this rank's share of the batch; whether fp16 did not skip it."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    share = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    for micro in range(ACCUMULATION):
        x = inputs(step, micro)[share].to(next(engine.module.parameters()).dtype)
        engine.backward(engine(x).float().square().mean())
        for group in engine.optimizer.param_groups:
            group["lr"] = lr(step) * group["lr_scale"]
        engine.step()
    return not getattr(engine.optimizer, "overflow", False)


def deepspeed_run(
    config: dict[str, Any], every: int = 0, steps: int = STEPS, ema: bool = False
) -> tuple[dict[str, Tensor], Any]:
    """Train by DeepSpeed with a rebuild at each event, and every so many steps besides; (masters, engine).

    With `ema` the moving averages, full, are among the masters.
    """
    from convclip.engine.zero.build import build_engine, rebuild_engine
    from convclip.engine.zero.masters import master_shards
    from convclip.engine.zero.moving_average import MovingAverage

    model = SmallModel()
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    engine, groups, average = None, None, MovingAverage(EMA if ema else None)
    for step in range(steps):
        if step in SCHEDULE or (every and step % every == 0):
            opened = step in SCHEDULE
            groups = SCHEDULE.get(step, groups)
            if engine is None:
                engine = build_engine(model, groups, config, OPTIM, values)
            else:
                engine = rebuild_engine(engine, groups, config, OPTIM, values if opened else {})
            average.follow(master_shards(engine))
        if train_step(engine, step):
            average.update()
    found = masters(engine)
    if ema:
        with average.as_weights(engine):
            found |= {AVERAGE + name: value for name, value in masters(engine).items()}
    return found, engine


def masters(engine: Any) -> dict[str, Tensor]:
    """All fp32 masters by parameter name, full, gathered over ranks."""
    from convclip.engine.zero.masters import is_replicated, master_shards

    shapes = {name: parameter.shape for name, parameter in SmallModel().named_parameters()}
    full = {name: torch.zeros(shape.numel()) for name, shape in shapes.items()}
    for shard in master_shards(engine):
        for piece in shard.pieces:
            values = shard.flat[piece.offset : piece.offset + piece.length]
            full[piece.parameter][piece.start : piece.start + piece.length] = values
    if not is_replicated(engine):
        for value in full.values():
            torch.distributed.all_reduce(value)
    return {name: value.view(shapes[name]) for name, value in full.items()}


def allow_fp16_on_cpu() -> None:
    """DeepSpeed refuses fp16 on a CPU; its code paths work there, and a test may force the check."""
    from deepspeed.accelerator import get_accelerator

    accelerator = type(get_accelerator())
    accelerator.is_fp16_supported = lambda self: True
    accelerator.supported_dtypes = lambda self: [torch.float32, torch.bfloat16, torch.float16]
