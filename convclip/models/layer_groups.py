"""Layer groups of each tower, from input to output: what locking freezes and what an unfreeze event opens.

Pure functions of parameter names, so they work on the meta device. Locking a tower freezes all of its groups;
unlocking n opens the last n. What is in no group always trains: the image head, GPT-2's projection, logit_scale.
open_clip's `lock()` is not used, because what it means by 0 changes between releases.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from timm.models import group_parameters

from convclip.models.dual_tower import Cut, DualTower
from convclip.models.image_tower import ImageTower
from convclip.schema import UserError


def layer_groups(model: DualTower, tower: str) -> list[list[str]]:
    """Parameter names of the lockable layer groups of `tower` (image or text), from input to output.

    Where the model locks heads, all that no group has belongs to the last one.
    """
    groups = _trunk_groups(model, tower)
    if model.locks_heads:
        prefix = "text." if tower == "text" else "visual."
        known = {name for group in groups for name in group}
        head = [name for name, _ in model.named_parameters() if name.startswith(prefix) and name not in known]
        groups[-1] = [*groups[-1], *head]
    return groups


def _trunk_groups(model: DualTower, tower: str) -> list[list[str]]:
    """The groups without heads.

    Image: timm's `group_matcher` groups of the trunk (a ConvNeXt's last is its final norm); an open_clip ResNet's stem
    and four stages. Text: the embeddings, then the blocks; the last one has the final norm and CLIP's text_projection.
    """
    if tower == "text":
        return _text_groups([name for name, _ in model.named_parameters() if name.startswith("text.")])
    if tower != "image":
        raise ValueError(f"a tower is image or text, not {tower!r}")
    if isinstance(model.visual, ImageTower):
        trunk = model.visual.trunk
        groups = group_parameters(trunk, trunk.group_matcher())
        return [[f"visual.trunk.{name}" for name in groups[number]] for number in sorted(groups)]
    return _resnet_groups([name for name, _ in model.named_parameters() if name.startswith("visual.")])


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
    """The highest line below which nothing trains, and whose feature map the reference head can share."""
    wanted = set(trainable)
    frozen = {}
    for tower in Cut._fields:
        groups = layer_groups(model, tower)
        frozen[tower] = next((i for i, group in enumerate(groups) if not wanted.isdisjoint(group)), len(groups))
    highest = frozen["image"] if model.reference is None else min(frozen["image"], model.visual.map_boundary)
    return Cut(max(boundary for boundary in model.visual.boundaries if boundary <= highest), frozen["text"])


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


def _text_groups(names: list[str]) -> list[list[str]]:
    """Embeddings, then one group per block; final norm and CLIP's projection go with the last block."""
    embeddings, after, blocks = [], [], {}
    for name in names:
        block = re.match(r"text\.transformer\.(?:resblocks|h)\.(\d+)\.", name)
        if block:
            blocks.setdefault(int(block[1]), []).append(name)
        elif re.match(r"text\.(token_embedding|positional_embedding|transformer\.(wte|wpe))", name):
            embeddings.append(name)
        elif re.match(r"text\.(ln_final|text_projection|transformer\.ln_f)", name):
            after.append(name)
        elif not name.startswith("text.proj."):
            raise ValueError(f"{name} belongs to no layer group: extend convclip/models/layer_groups.py")
    ordered = [blocks[number] for number in sorted(blocks)]
    return [embeddings, *ordered[:-1], ordered[-1] + after]


def _resnet_groups(names: list[str]) -> list[list[str]]:
    """Stem, layer1 … layer4 of open_clip's ResNet; the attention pool is the head, in no group."""
    stages = [f"visual.layer{number}." for number in range(1, 5)]
    others = (*stages, "visual.attnpool.")
    stem = [name for name in names if not name.startswith(others)]
    return [stem, *([name for name in names if name.startswith(stage)] for stage in stages)]
