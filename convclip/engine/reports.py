"""The figures and words of a run's reports: rows of metrics.jsonl, and the log lines that go with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepspeed import DeepSpeedEngine
from torch import Tensor

from convclip.distributed import all_reduce_mean
from convclip.engine.meters import clock, memory_gib
from convclip.engine.stages.groups import Stage, describe_amount
from convclip.models.layer_groups import parameter_counts
from convclip.schema import Recipe, Unfreeze


def step_figures(engine: DeepSpeedEngine, losses: Mapping[str, Tensor], logit_scale: Tensor) -> dict[str, Any]:
    """What a step's row says of the optimization; every rank calls it, for losses are averaged over ranks.

    logit_scale [1], exponentiated, or [2] with the logit bias behind it.
    """
    parts = {f"loss_{name}": value for name, value in losses.items() if name != "total" and len(losses) > 2}
    grad_norm = engine.get_global_grad_norm()
    return {
        "loss": all_reduce_mean(losses["total"]).item(),
        **{name: all_reduce_mean(value).item() for name, value in parts.items()},
        "lr": {group["name"]: group["lr"] for group in engine.optimizer.param_groups},
        **dict(zip(("logit_scale", "logit_bias"), logit_scale.tolist(), strict=False)),
        # DeepSpeed computes none in stage 0 without clipping.
        "grad_norm": None if grad_norm is None else float(grad_norm),
        "loss_scale": engine.optimizer.loss_scaler.cur_scale if engine.fp16_enabled() else None,
        "memory_gib": memory_gib(),
    }


def unfreeze_report(
    engine: DeepSpeedEngine, recipe: Recipe, stage: Stage, event: Unfreeze, step: int, epoch: int, seconds: float
) -> tuple[dict[str, Any], str]:
    """An event of `stage`, whose groups the engine has had for `seconds` to take in."""
    number = recipe.freezing.unfreeze.index(event)
    groups = [group for group in stage.opened if group.event == number]
    opened = parameter_counts(engine.module, {name for group in groups for name in group.parameters})["total"]
    lr = {group["name"]: group["lr"] for group in engine.optimizer.param_groups}[groups[0].name]
    row = {
        "event": "unfreeze",
        "step": step,
        "epoch": epoch,
        "tower": event.tower,
        "opened": describe_amount(event),
        "parameters": opened,
        "lr_scale": groups[0].lr_scale,
    }
    return row, (
        f"unfreeze {event.tower}: {row['opened']}, {opened:,} parameters, "
        f"lr {lr:.2e} = {groups[0].lr_scale:g} x lr(step); rebuilt in {seconds:.2f} s"
    )


def summary_report(recipe: Recipe, best: Mapping[str, Any], steps: int, seconds: float) -> tuple[dict[str, Any], str]:
    """A run's end: `steps` steps in `seconds`, and the figures of its best checkpoint, {} where none was evaluated."""
    row = {
        "steps": steps,
        "seconds": seconds,
        "samples_per_s": steps * recipe.batch.global_ / max(seconds, 1e-9),
        "memory_gib": memory_gib(),
        "best": dict(best),
    }
    first = [f"{key[:3].upper()} R@1 {best[key]:.2f}" for key in best if key[1:] in ("2t_r1", "2i_r1", "2v_r1")]
    recall = f"best {' '.join(first)} at step {best['step']}" if best else "no evaluated checkpoint"
    return row, (
        f"done: {steps} steps in {clock(seconds)}, {row['samples_per_s']:.1f} samples/s, "
        f"peak memory {row['memory_gib']:.2f} GiB; {recall}"
    )
