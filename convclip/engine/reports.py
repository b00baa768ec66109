"""The figures and words of a run's reports: rows of metrics.jsonl, and the log lines that go with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from convclip.devices import memory_gib
from convclip.distributed import all_reduce_mean
from convclip.engine.loss_rise import LossRises
from convclip.engine.meters import clock
from convclip.engine.stages.groups import Group, Stage, describe_amount, shown_groups
from convclip.engine.stages.norms import about_norms
from convclip.engine.stages.schedule import about_ema
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
        "lr": _shown_lr(staged),
        "logit_scale": result.logit_scale.item(),
        **({} if result.logit_bias is None else {"logit_bias": result.logit_bias.item()}),
        # DeepSpeed computes none in stage 0 without clipping.
        "grad_norm": None if grad_norm is None else float(grad_norm),
        "loss_scale": engine.optimizer.loss_scaler.cur_scale if engine.fp16_enabled() else None,
        "memory_gib": memory_gib(),
    }


def _shown_lr(staged: StagedEngine) -> dict[str, float]:
    """lr of the groups that are shown, by their names."""
    lr = {group["name"]: group["lr"] for group in staged.parameter_groups}
    return {group.name: lr[group.name] for group in shown_groups(staged.present.groups)}


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
        *about_ema(recipe, total_steps),
    ]


def ema_title(recipe: Recipe) -> str:
    """The line above the figures of the moving average."""
    return f"the moving average of the weights (optim.ema_decay {recipe.optim.ema_decay:g}):"


def unfreeze_report(
    staged: StagedEngine, recipe: Recipe, stage: Stage, step: int, epoch: int, seconds: float
) -> Iterator[tuple[dict[str, Any], str]]:
    """Row and log line of each event of `stage`; rebuilding the engine for it took `seconds`."""
    shown = _shown_lr(staged)
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
            "lr_scale": max(group.lr_scale for group in groups),
        }
        if norms:
            row["batch_norm"] = "frozen" if event.tower in recipe.freezing.still_norms else "batch"
        yield (
            row,
            f"unfreeze {event.tower}: {row['opened']}, {row['parameters']:,} parameters, "
            f"{_opened_lr(groups, shown)}; "
            f"{norms + '; ' if norms else ''}rebuilt in {seconds:.2f} s",
        )


def _opened_lr(groups: Sequence[Group], shown: Mapping[str, float]) -> str:
    """`lr 7.00e-06 = 0.1 x lr(step)` of an event's groups; of the lowest layer and of the highest where lr decays."""
    scales = {group.lr_scale: shown[group.name] for group in groups if group.name in shown}
    low, high = min(scales), max(scales)
    until = f" to {scales[high]:.2e}", f" to {high:g}"
    return f"lr {scales[low]:.2e}{until[0] if low < high else ''} = {low:g}{until[1] if low < high else ''} x lr(step)"


class RiseReport:
    """Says where an event raised the loss, and what may be the reason. `recent` is what a checkpoint keeps for it."""

    def __init__(self, staged: StagedEngine, recipe: Recipe, total_steps: int, recent: Sequence[float]) -> None:
        self.staged, self.recipe = staged, recipe
        self._rises = LossRises(staged.starts[1:], total_steps, recent)

    @property
    def recent(self) -> list[float]:
        """The losses of the last steps."""
        return self._rises.recent

    def lines(self, losses: Iterable[tuple[int, float]]) -> Iterator[str]:
        """A log line for each event that the (step, mean loss over ranks) that follow show to have raised the loss."""
        for rise in self._rises.add(losses):
            stage = self.staged.stages[self.staged.starts.index(rise.start)]
            events = " and ".join(f"{event.tower} {describe_amount(event)}" for event in stage.events)
            yield (
                f"the loss rose from {rise.before:.4f} to {rise.after:.4f}, means of the {rise.steps_before} steps "
                f"before and the {rise.steps_after} after step {rise.start}, where {events} opened: "
                f"{'; '.join(self._reasons(stage))}"
            )

    def _reasons(self, stage: Stage) -> Iterator[str]:
        """What may be the reason; the model is in train mode."""
        model, opened = self.staged.engine.module, {name for group in stage.opened for name in group.parameters}
        for tower in sorted({event.tower for event in stage.events}):
            norms = about_norms(model, self.recipe, tower, opened)
            if norms and tower not in self.recipe.freezing.still_norms:
                yield f"{norms} from then on (freezing.batch_norm=frozen avoids that)"
            if any(_drops(module) for module in getattr(model, PARTS[tower]).modules()):
                yield f"dropout or drop path of the {tower} tower works in what opened"
        yield (
            "what opened may learn too fast (lower freezing.new_lr_scale or the event's lr_scale, or raise "
            "freezing.new_warmup_steps)"
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
