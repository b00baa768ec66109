"""Which layers locking freezes, which an unfreeze event opens, and where the two towers can be cut.

A tower's own groups are in its file (`Tower.layers`). Locking a tower freezes all of its groups; unlocking n opens the
last n. What is in no group always trains: the image head, GPT-2's projection, logit_scale.
open_clip's `lock()` is not used, because what it means by 0 changes between releases.
"""

from __future__ import annotations

from collections.abc import Collection

from convclip.models.dual_tower import Cut, DualTower
from convclip.models.tower import Tower
from convclip.schema import UserError

# A tower's name in recipes -> its attribute, with which its parameters' names begin.
PARTS = {"image": "visual", "text": "text"}


def layer_groups(model: DualTower, tower: str) -> list[list[str]]:
    """Parameter names of the lockable layer groups of `tower` (image or text), from input to output.

    Where the model locks heads, a tower's head belongs to its last group.
    """
    groups = layers_below_head(model, tower)
    if model.locks_heads:
        module: Tower = getattr(model, PARTS[tower])
        groups[-1] = [*groups[-1], *(f"{PARTS[tower]}.{name}" for name in module.head_names())]
    return groups


def layers_below_head(model: DualTower, tower: str) -> list[list[str]]:
    """Parameter names of the layer groups of `tower` (image or text), from input to output, never with its head's."""
    if tower not in PARTS:
        raise ValueError(f"a tower is image or text, not {tower!r}")
    part = PARTS[tower]
    module: Tower = getattr(model, part)
    return [[f"{part}.{name}" for name in group] for group in module.layer_groups()]


def locked_names(model: DualTower, tower: str) -> list[str]:
    """Names of the parameters that are frozen when `tower` (image or text) is locked, input first."""
    return [name for group in layer_groups(model, tower) for name in group]


def unlocked_names(
    model: DualTower, tower: str, groups: int | None = None, layers: int | None = None, all: bool = False
) -> list[str]:
    """Names that an unfreeze event of that amount opens: the last `groups` of the tower, or `all` of them.

    `layers` is another word for `groups`: a text tower's are its blocks, and after them its embeddings. Errors:
    UserError when the tower has fewer.
    """
    ordered = layer_groups(model, tower)
    if all:
        return [name for group in ordered for name in group]
    count = groups if groups is not None else layers
    if count is None or count < 1:
        raise ValueError("give groups, layers (at least 1) or all")
    if count > len(ordered):
        word = "groups" if groups is not None else "layers"
        made_of = f" ({len(ordered) - 1} blocks, then the embeddings)" if tower == "text" else ""
        raise UserError(f"{word}: {count} of the {tower} tower cannot be unlocked, it has {len(ordered)}{made_of}")
    return [name for group in ordered[-count:] for name in group]


def frozen_cut(model: DualTower, trainable: Collection[str]) -> Cut:
    """The highest cut below which nothing trains, and whose feature map the reference head can share."""
    wanted = set(trainable)
    cuts = {}
    for tower, part in PARTS.items():
        groups = layer_groups(model, tower)
        highest = next((i for i, group in enumerate(groups) if not wanted.isdisjoint(group)), len(groups))
        if tower == "image" and model.reference is not None:
            highest = min(highest, model.visual.map_cut)
        cuts[tower] = max(cut for cut in getattr(model, part).cuts if cut <= highest)
    return Cut(**cuts)


def parameter_counts(model: DualTower, trainable: Collection[str]) -> dict[str, int]:
    """Numbers of parameters named in `trainable`: {"visual", "text", "total"}; logit_scale counts in the total."""
    wanted = set(trainable)
    counts = {"visual": 0, "text": 0, "total": 0}
    for name, parameter in model.named_parameters():
        if name in wanted:
            # ZeRO-3 leaves a parameter empty and keeps its true size beside it.
            size = getattr(parameter, "ds_numel", parameter.numel())
            part = name.split(".", 1)[0]
            if part in counts:
                counts[part] += size
            counts["total"] += size
    return counts
