"""Batch norms of what an unfreeze event opens: whether they keep their running statistics, and in which words.

Opened batch norms that take each batch's statistics change the whole tower's output from one step to the next: on
EfficientNet-Lite0 the loss jumped from 0.29 to 1.04. With their running statistics kept there is no jump.
"""

from __future__ import annotations

from collections.abc import Collection

from convclip.models.dual_tower import DualTower
from convclip.models.layer_groups import PARTS
from convclip.schema import Recipe


def opened_norms(model: DualTower, tower: str, names: Collection[str]) -> int:
    """How many batch norms of `tower` (image or text) have a parameter among `names`."""
    wanted, part = set(names), PARTS[tower]
    owners = {id(p): f"{part}.{name}" for name, p in getattr(model, part).named_parameters()}
    return sum(
        any(owners[id(p)] in wanted for p in norm.parameters(recurse=False)) for norm in model.tower_norms(tower)
    )


def about_norms(model: DualTower, recipe: Recipe, tower: str, names: Collection[str]) -> str:
    """What the batch norms of `tower` with parameters among `names` do in training, in words; "" without any."""
    count = opened_norms(model, tower, names)
    if not count:
        return ""
    if tower in recipe.freezing.still_norms:
        return f"{count} batch norms keep their running statistics"
    return f"{count} batch norms take each batch's statistics"


def norms_kept(model: DualTower, recipe: Recipe, names: Collection[str]) -> int:
    """How many batch norms with parameters among `names` keep their running statistics."""
    return sum(opened_norms(model, tower, names) for tower in recipe.freezing.still_norms)
