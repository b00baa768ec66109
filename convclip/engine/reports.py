"""The figures and words of a run's reports: rows of metrics.jsonl, and the log lines that go with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from convclip.devices import memory_gib
from convclip.distributed import all_reduce_mean
from convclip.engine.loss_rise import Rise
from convclip.engine.meters import clock
from convclip.engine.stages.groups import Stage, describe_amount
from convclip.engine.stages.norms import about_norms, opened_norms
from convclip.engine.steps import StepResult
from convclip.engine.zero.staged_engine import StagedEngine
from convclip.models.layer_groups import PARTS, parameter_counts
from convclip.schema import Recipe


def step_figures(staged: StagedEngine, result: StepResult) -> dict[str, Any]:
    """What a step's row says of the optimization; every rank calls it, for losses are averaged over ranks."""
    losses, engine = result.losses, staged.engine
    parts = {f"loss_{name}": value for name, value in losses.items() if name != "total" and len(losses) > 2}
    grad_norm = engine.get_global_grad_norm()
    return {
        "loss": all_reduce_mean(losses["total"]).item(),
        **{name: all_reduce_mean(value).item() for name, value in parts.items()},
        "lr": {group["name"]: group["lr"] for group in staged.parameter_groups},
        "logit_scale": result.logit_scale.item(),
        **({} if result.logit_bias is None else {"logit_bias": result.logit_bias.item()}),
        # DeepSpeed computes none in stage 0 without clipping.
        "grad_norm": None if grad_norm is None else float(grad_norm),
        "loss_scale": engine.optimizer.loss_scaler.cur_scale if engine.fp16_enabled() else None,
        "memory_gib": memory_gib(),
    }


def start_report(staged: StagedEngine, recipe: Recipe, steps_per_epoch: int, total_steps: int) -> list[str]:
    """Before the first step: what trains, and the arithmetic of the batch."""
    counts = parameter_counts(staged.engine.module, staged.trainable)
    micro, count = recipe.batch.per_rank(staged.world)
    if recipe.batch.micro is None:
        split, loss = f"micro batch {micro} x accumulation {count}", ""
    else:
        split, loss = f"{count} chunks of {micro} rows", ", with one loss"
    return [
        f"{recipe.name}: trainable visual {counts['visual']:,} text {counts['text']:,} total {counts['total']:,}",
        f"{split} x world {staged.world} = global batch {micro * count * staged.world}{loss}; "
        f"{steps_per_epoch} steps per epoch, {total_steps} in all",
    ]


def unfreeze_report(
    staged: StagedEngine, recipe: Recipe, stage: Stage, step: int, epoch: int, seconds: float
) -> Iterator[tuple[dict[str, Any], str]]:
    """Row and log line of each event of `stage`; rebuilding the engine for it took `seconds`."""
    lr = {group["name"]: group["lr"] for group in staged.parameter_groups}
    for event in stage.events:
        number = recipe.freezing.unfreeze.index(event)
        groups = [group for group in stage.opened if group.event == number]
        names = {name for group in groups for name in group.parameters}
        norms = about_norms(staged.engine.module, recipe, event.tower, names)
        row = {
            "event": "unfreeze",
            "step": step,
            "epoch": epoch,
            "tower": event.tower,
            "opened": describe_amount(event),
            "parameters": parameter_counts(staged.engine.module, names)["total"],
            "lr_scale": groups[0].lr_scale,
        }
        if norms:
            row["batch_norm"] = "frozen" if event.tower in recipe.freezing.still_norms else "batch"
        yield (
            row,
            f"unfreeze {event.tower}: {row['opened']}, {row['parameters']:,} parameters, "
            f"lr {lr[groups[0].name]:.2e} = {groups[0].lr_scale:g} x lr(step); "
            f"{norms + '; ' if norms else ''}rebuilt in {seconds:.2f} s",
        )


def rise_report(staged: StagedEngine, recipe: Recipe, stage: Stage, rise: Rise) -> str:
    """Log line of an event after which the loss is higher than before, and what may be the reason; the model is in
    train mode."""
    model, opened = staged.engine.module, {name for group in stage.opened for name in group.parameters}
    towers = sorted({event.tower for event in stage.events})
    reasons = []
    for tower in towers:
        if tower not in recipe.freezing.still_norms and opened_norms(model, tower, opened):
            reasons.append(
                f"{about_norms(model, recipe, tower, opened)} from then on (freezing.batch_norm=frozen avoids that)"
            )
        if any(_drops(module) for module in getattr(model, PARTS[tower]).modules()):
            reasons.append(f"dropout or drop path of the {tower} tower works in what opened")
    reasons.append(
        "what opened may learn too fast (lower freezing.new_lr_scale or the event's lr_scale, or raise "
        "freezing.new_warmup_steps)"
    )
    events = " and ".join(f"{event.tower} {describe_amount(event)}" for event in stage.events)
    return (
        f"the loss rose from {rise.before:.4f} to {rise.after:.4f}, means of the {rise.steps_before} steps before and "
        f"the {rise.steps_after} after step {rise.start}, where {events} opened: {'; '.join(reasons)}"
    )


def _drops(module: nn.Module) -> bool:
    share = getattr(module, "p" if isinstance(module, nn.Dropout) else "drop_prob", None)
    return module.training and isinstance(share, float) and share > 0


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
