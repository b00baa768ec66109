"""What a recipe will do, before anything runs: stages, trainable parameters, groups, batch arithmetic, lr curve.

The model is built on the meta device: no data, no weights, no memory, no DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch

from convclip.config import UserError
from convclip.engine.plan.memory import format_memory, plan_memory
from convclip.engine.stages.groups import (
    Stage,
    describe_amount,
    event_starts,
    reached_stages,
    shown_groups,
    training_stages,
)
from convclip.engine.stages.norms import about_norms
from convclip.engine.stages.schedule import LearningRates, about_ema, peak_lr, shortened_warmups, warmup_steps
from convclip.engine.stored.frozen import storable
from convclip.engine.task import Task
from convclip.files import whole_file
from convclip.models.dual_tower import DualTower
from convclip.models.layer_groups import PARTS, parameter_counts
from convclip.schema import Recipe, Unfreeze

CURVE_POINTS = 400
PICTURES = (".png", ".pdf", ".svg")


def make_plan(task: Task, ds_config: Mapping[str, Any] | None = None, world: int = 1) -> dict[str, Any]:
    """The plan as plain data (what `--plan --json` prints). Errors in the recipe are UserError, as in training.

    Memory is that of a rank under `ds_config` (None: ZeRO stage 2 in bf16) in a run of `world` ranks.
    """
    recipe = task.recipe
    steps_per_epoch = _steps_per_epoch(recipe)
    with torch.device("meta"):
        model = task.build_model()
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    stages = training_stages(model, recipe)
    total = _total_steps(recipe, steps_per_epoch)
    reached = reached_stages(model, recipe, steps_per_epoch)
    plan = {
        "recipe": recipe.name,
        "global_batch": recipe.batch.global_,
        "batch": _batch_arithmetic(recipe),
        "epochs": recipe.epochs,
        "steps_per_epoch": steps_per_epoch,
        "total_steps": total,
        "warmup_steps": warmup_steps(recipe, total) if total else recipe.optim.warmup_steps,
        "peak_lr": peak_lr(recipe),
        "stages": [
            {
                "epoch": _epoch_of(stage, steps_per_epoch),
                "step": stage.step,
                "trainable": parameter_counts(model, stage.trainable),
                "groups": [
                    {
                        "name": group.name,
                        "parameters": sum(sizes[name] for name in group.parameters),
                        "lr_scale": group.lr_scale,
                        "weight_decay": group.weight_decay,
                    }
                    for group in stage.groups
                ],
            }
            for stage in reached
        ],
        "notes": [
            *_notes(recipe, stages, reached, steps_per_epoch, total),
            *_norm_notes(model, recipe, reached[-1].trainable),
        ],
    }
    known = task.estimates_memory
    plan["memory"] = plan_memory(model, recipe, reached, ds_config, world) if known else None
    plan["storable"] = storable(model, recipe, reached) if known else []
    plan["lr_curve"] = _lr_curve(recipe, reached, steps_per_epoch, total) if steps_per_epoch and total else None
    return plan


def format_plan(plan: dict[str, Any]) -> str:
    """The plan as the text that `--plan` prints."""
    lines = [f"recipe {plan['recipe']}: {plan['epochs']} epochs, global batch {plan['global_batch']}"]
    lines += [f"  {line}" for line in plan["batch"]]
    if plan["total_steps"]:
        peak, warmup = f"{plan['peak_lr']:g}", plan["warmup_steps"]
        rises = f"lr rises to {peak} over {warmup} steps" if warmup else f"lr starts at {peak}"
        lines.append(
            f"  {plan['steps_per_epoch']} steps per epoch, {plan['total_steps']} in all; "
            f"{rises}, then follows a cosine to 0"
        )
    else:
        lines.append("  steps per epoch: known once the data is (set rows_per_epoch to see the lr curve)")
    lines.append(f"{'stage':>5} {'begins':>10} {'visual':>13} {'text':>13} {'total':>13}  trainable parameters")
    width = max(24, *(len(group["name"]) for stage in plan["stages"] for group in stage["groups"]))
    for number, stage in enumerate(plan["stages"]):
        begins = f"step {stage['step']}" if stage["step"] is not None else f"epoch {stage['epoch']}"
        count = stage["trainable"]
        lines.append(f"{number:>5} {begins:>10} {count['visual']:>13,} {count['text']:>13,} {count['total']:>13,}")
        before = len(plan["stages"][number - 1]["groups"]) if number else 0
        for group in stage["groups"][before:]:
            lines.append(
                f"{'':>7}+ {group['name']:<{width}} {group['parameters']:>13,}  lr x {group['lr_scale']:g}  "
                f"weight decay {group['weight_decay']:g}"
            )
    lines += format_memory(plan["memory"]) if plan["memory"] else []
    lines += plan["storable"]
    lines += [f"note: {note}" for note in plan["notes"]]
    return "\n".join(lines)


def plot_plan(plan: dict[str, Any], path: Path) -> None:
    """Draw the lr of every group over the steps as a PNG, PDF or SVG, by the path's suffix (needs the `report` extra).

    Errors: UserError where the path cannot be written, or nothing is known to draw.
    """
    check_plot_path(path)
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install 'convclip[report]'") from None
    curve = plan["lr_curve"]
    if curve is None:
        raise UserError(f"recipe {plan['recipe']}: set rows_per_epoch (training rows of your data) to plot the lr")
    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    for name, values in curve["lr"].items():
        points = [(step, value) for step, value in zip(curve["step"], values, strict=True) if value is not None]
        axes.plot(*zip(*points, strict=True), label=name)
    for event in curve["events"]:
        axes.axvline(event["step"], color="grey", linestyle=":", linewidth=1)
        axes.annotate(
            event["label"], (event["step"], 1), xycoords=("data", "axes fraction"), rotation=90, va="top", ha="right"
        )
    axes.set(xlabel="step", ylabel="learning rate", yscale="log", title=f"{plan['recipe']}: lr of each group")
    axes.legend(fontsize="small")
    with whole_file(path, "--plot") as part:
        figure.savefig(part, format=path.suffix.lower().removeprefix("."), dpi=130)


def check_plot_path(path: Path) -> None:
    """Refuse, before any work, a plot that could not be written. Errors: UserError."""
    if path.suffix.lower() not in PICTURES:
        raise UserError(f"--plot {path}: name a file that ends in {', '.join(PICTURES)}")
    if not path.parent.is_dir():
        raise UserError(f"--plot {path}: there is no folder {path.parent}, make it first")
    if path.is_dir():
        raise UserError(f"--plot {path}: it is a folder, name a file")


def _batch_arithmetic(recipe: Recipe) -> list[str]:
    lines, chunked = [], recipe.batch.micro is not None
    for world in (1, 2, 4, 8):
        try:
            micro, count = recipe.batch.per_rank(world)
        except UserError:
            continue
        split = f"micro batch {micro} x {count} chunks" if chunked else f"micro batch {micro} x accumulation {count}"
        whole = ", with one loss" if chunked else ""
        lines.append(f"{split} x world {world} = global batch {micro * count * world}{whole}")
    return lines


def _steps_per_epoch(recipe: Recipe) -> int | None:
    """None where rows_per_epoch is not set. UserError where an epoch has no step."""
    rows, batch = recipe.rows_per_epoch, recipe.batch.global_
    if rows is None:
        return None
    if rows < batch:
        raise UserError(
            f"recipe {recipe.name}: rows_per_epoch {rows:,} / batch.global {batch:,} = 0 steps per epoch: lower "
            "batch.global, or set rows_per_epoch to the rows of your data"
        )
    return rows // batch


def _total_steps(recipe: Recipe, steps_per_epoch: int | None) -> int | None:
    if steps_per_epoch is None:
        return None
    return min(steps_per_epoch * recipe.epochs, recipe.max_steps or steps_per_epoch * recipe.epochs)


def _epoch_of(stage: Stage, steps_per_epoch: int | None) -> int | None:
    if stage.epoch is not None or stage.step is None:
        return stage.epoch
    return stage.step // steps_per_epoch if steps_per_epoch else None


def _describe(event: Unfreeze) -> str:
    when = f"step {event.step}" if event.step is not None else f"epoch {event.epoch}"
    return f"{event.tower} {describe_amount(event)} at {when}"


def _notes(
    recipe: Recipe, stages: list[Stage], reached: list[Stage], steps_per_epoch: int | None, total: int | None
) -> list[str]:
    """Warnings: what the run will not do as the recipe says."""
    last = f"the last epoch is {recipe.epochs - 1}"
    if total and steps_per_epoch and total < steps_per_epoch * recipe.epochs:
        last = f"the run ends after {total} steps"
    notes = [
        f"unfreezing {_describe(event)} is never reached: {last}"
        for stage in stages
        if stage not in reached
        for event in stage.events
    ]
    if steps_per_epoch and total:
        starts: Mapping[str, int] = event_starts(reached, steps_per_epoch)
        notes += shortened_warmups(recipe, total, starts)
        notes += about_ema(recipe, total)
    elif recipe.max_steps:
        notes += shortened_warmups(recipe, recipe.max_steps, {})
    return notes


def _norm_notes(model: DualTower, recipe: Recipe, trainable: Set[str]) -> list[str]:
    """What the batch norms of a tower that opens do, or of one whose norms are asked to stay as they are."""
    freezing = recipe.freezing
    found = {
        tower: about_norms(model, recipe, tower, trainable)
        for tower in PARTS
        if tower in freezing.lock or tower in freezing.still_norms
    }
    return [
        f"of what trains of the {tower} tower, {said} (freezing.batch_norm)" for tower, said in found.items() if said
    ]


def _lr_curve(recipe: Recipe, stages: list[Stage], steps_per_epoch: int, total: int) -> dict[str, Any]:
    """lr of each group that is shown at some steps; None before a group is opened."""
    steps = sorted({*range(0, total, max(1, total // CURVE_POINTS)), total - 1})
    rates = LearningRates(recipe, total, event_starts(stages, steps_per_epoch))
    curve: dict[str, list[float | None]] = {}
    for stage in stages:
        start = stage.start(steps_per_epoch)
        for group in shown_groups(stage.opened):
            curve[group.name] = [
                rates.at(step, group.name, group.lr_scale) if step >= start else None for step in steps
            ]
    events = [
        {"step": stage.start(steps_per_epoch), "label": _describe(event)} for stage in stages for event in stage.events
    ]
    return {"step": steps, "lr": curve, "events": events}
