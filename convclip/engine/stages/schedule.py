"""Learning rate as a pure function of the step (steps count optimizer updates from 0)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from convclip.schema import Recipe


def peak_lr(recipe: Recipe) -> float:
    """The recipe's lr after scaling with the global batch (Goyal et al. 2017: linear; Krizhevsky 2014: square root)."""
    ratio = recipe.batch.global_ / recipe.optim.reference_batch
    return recipe.optim.lr * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[recipe.optim.scale_lr_with_batch]


def warmup_steps(recipe: Recipe, total_steps: int) -> int:
    """Warm-up length: `warmup_steps`, or `warmup_share` of all steps where that is 0."""
    return recipe.optim.warmup_steps or round(recipe.optim.warmup_share * total_steps)


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
        return lr * group_warmup(step, self.starts[name], self.recipe.freezing.new_warmup_steps)

    def describe(self) -> str:
        """The peak and where it comes from, in one line."""
        optim, batch = self.recipe.optim, self.recipe.batch.global_
        root = "the square root of " if optim.scale_lr_with_batch == "sqrt" else ""
        scaled = f" = {optim.lr:g} x {root}(global batch {batch} / {optim.reference_batch})"
        if optim.scale_lr_with_batch == "none":
            scaled = ""
        return f"peak lr {self.peak:g}{scaled}, {self.warmup} warm-up steps"
