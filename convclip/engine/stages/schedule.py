"""Learning rate as a pure function of the step (steps count optimizer updates from 0)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from convclip.schema import Recipe

# A warm-up that would not end is shortened to one part in so many of the steps there are.
SHORTENED = 10
# A moving average that ends with more than this share of the weights it began with has seen too few updates.
LARGE_REST = 0.1


def peak_lr(recipe: Recipe) -> float:
    """The recipe's lr after scaling with the global batch (Goyal et al. 2017: linear; Krizhevsky 2014: square root)."""
    ratio = recipe.batch.global_ / recipe.optim.reference_batch
    return recipe.optim.lr * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[recipe.optim.scale_lr_with_batch]


def asked_warmup(recipe: Recipe, total_steps: int) -> int:
    """Warm-up length by the recipe: `warmup_steps`, or `warmup_share` of all steps where that is 0."""
    return recipe.optim.warmup_steps or round(recipe.optim.warmup_share * total_steps)


def fitted_warmup(asked: int, steps: int) -> int:
    """`asked` where a warm-up of that length ends within `steps` steps, else a tenth of them, at least 1.

    Without the rule a short try of a long recipe would end at a small share of its lr, and look like a bad recipe.
    """
    return asked if asked < steps else min(asked, max(1, steps // SHORTENED))


def warmup_steps(recipe: Recipe, total_steps: int) -> int:
    """Steps of the warm-up in a run of `total_steps`; the last of them has the peak lr."""
    return fitted_warmup(asked_warmup(recipe, total_steps), total_steps)


def shortened_warmups(recipe: Recipe, total_steps: int, starts: Mapping[str, int]) -> list[str]:
    """What the rule of `fitted_warmup` changes in a run, one line each; `starts` as in LearningRates."""
    lines = []
    asked, taken = asked_warmup(recipe, total_steps), warmup_steps(recipe, total_steps)
    if taken < asked:
        lines.append(
            f"the warm-up of {asked} steps would not end within the run's {total_steps}: it takes {taken}, a tenth of "
            "them; set optim.warmup_steps to choose"
        )
    asked = recipe.freezing.new_warmup_steps
    for start in sorted({start for start in starts.values() if start < total_steps}):
        left = total_steps - start
        if fitted_warmup(asked, left) < asked:
            lines.append(
                f"the warm-up of {asked} steps of what opens at step {start} would not end within the {left} steps "
                f"left: it takes {fitted_warmup(asked, left)}, a tenth of them; set freezing.new_warmup_steps to choose"
            )
    return lines


def about_ema(recipe: Recipe, total_steps: int) -> list[str]:
    """How far back the moving average reaches, and what it has of the weights it began with after `total_steps`."""
    decay = recipe.optim.ema_decay
    if decay is None:
        return []
    half, left = math.ceil(math.log(0.5) / math.log(decay)), decay**total_steps
    line = f"moving average of what trains (optim.ema_decay {decay:g}): half of it is of the last {half:,} updates"
    if left > LARGE_REST:
        line += f"; after {total_steps:,} steps {left:.0%} of it is still the weights it began with: lower the decay"
    return [line]


def lr_at(step: int, total_steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up to `peak` over `warmup` steps, then half a cosine to zero at `total_steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def group_warmup(step: int, start: int, length: int) -> float:
    """Factor on a group opened at step `start`: linear from 1/length to 1 over `length` steps."""
    return min(1.0, (step - start + 1) / length) if length else 1.0


class LearningRates:
    """The lr of every parameter group at every step of a run."""

    def __init__(self, recipe: Recipe, total_steps: int, starts: Mapping[str, int]) -> None:
        """`starts`: the step at which a group was opened by an unfreeze event, by its name."""
        self.recipe, self.total_steps, self.starts = recipe, total_steps, starts
        self.peak, self.warmup = peak_lr(recipe), warmup_steps(recipe, total_steps)

    def set(self, step: int, groups: Iterable[dict[str, Any]]) -> None:
        """Write `lr` of the optimizer's `groups` for the update after `step` others."""
        for group in groups:
            group["lr"] = self.at(step, group["name"], group["lr_scale"])

    def at(self, step: int, name: str, lr_scale: float) -> float:
        """lr of the group `name` for the update after `step` others."""
        lr = lr_at(step, self.total_steps, self.warmup, self.peak) * lr_scale
        if name not in self.starts:
            return lr
        start = self.starts[name]
        length = fitted_warmup(self.recipe.freezing.new_warmup_steps, self.total_steps - start)
        return lr * group_warmup(step, start, length)

    def describe(self) -> str:
        """The peak, where it comes from and when it is reached, in one line."""
        optim, batch = self.recipe.optim, self.recipe.batch.global_
        root = "the square root of " if optim.scale_lr_with_batch == "sqrt" else ""
        scaled = f" = {optim.lr:g} x {root}(global batch {batch} / {optim.reference_batch})"
        if optim.scale_lr_with_batch == "none":
            scaled = ""
        shortened = shortened_warmups(self.recipe, self.total_steps, self.starts)
        return "; ".join([f"peak lr {self.peak:g}{scaled}, {self.warmup} warm-up steps", *shortened])
