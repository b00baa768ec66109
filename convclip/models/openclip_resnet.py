"""open_clip's ResNets (RN50, RN101, RN50x4, …) with their own attention pool, under open_clip's parameter names."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import open_clip
from open_clip.modified_resnet import ModifiedResNet
from torch import nn

from convclip import schema
from convclip.models.tower import ImageTower, Layer, Unit, names_under


class OpenClipResNet(ImageTower, ModifiedResNet):
    """Layer groups and cuts: the stem and the four stages; the head is the attention pool.

    `channels_last` is on: on CPU a ResNet-50 step takes 0.88x the time in float32 and 0.78x in bfloat16.
    """

    channels_last = True
    # open_clip has no types.
    attnpool: nn.Module

    @classmethod
    def build(cls, config: schema.ImageTowerConfig, embed_dim: int) -> OpenClipResNet:
        """Random weights. Errors: UserError when the recipe asks for a head, size or option that it does not have."""
        if config.head != "attention_pool":
            raise schema.UserError(
                f"model.image.head: {config.backbone} has a pool of its own; "
                f"set attention_pool instead of {config.head}"
            )
        if config.image_size % 32 or config.drop_path:
            raise schema.UserError(
                f"model.image: {config.backbone} needs an image_size that 32 divides, and drop_path 0"
            )
        sizes = resnet_sizes(config.backbone)
        assert sizes is not None
        heads = sizes["width"] * 32 // sizes.get("head_width", 64)
        return cls(sizes["layers"], embed_dim, heads, config.image_size, sizes["width"])

    def units(self) -> list[Unit]:
        """The stem and the four stages."""
        names = ("conv1", "bn1", "act1", "conv2", "bn2", "act2", "conv3", "bn3", "act3", "avgpool")
        stem = tuple(getattr(self, name) for name in names)
        return [stem, (self.layer1,), (self.layer2,), (self.layer3,), (self.layer4,)]

    def layers(self) -> list[Layer]:
        """The units."""
        return list(self.units())

    def embed_head(self) -> nn.Module:
        """The attention pool with its output projection."""
        return self.attnpool

    def released_names(self, names: Collection[str]) -> dict[str, str]:
        """The image part of an open_clip checkpoint, or the tower alone."""
        return names_under("visual.", names) or {name: name for name in names}

    def open_clip_config(self, config: schema.Model) -> dict[str, Any]:
        """open_clip's own `vision_cfg` of this ResNet, with the recipe's image size."""
        return {**(resnet_sizes(config.image.backbone) or {}), "image_size": config.image.image_size}


def resnet_sizes(backbone: str) -> dict[str, Any] | None:
    """open_clip's `vision_cfg` (layers, width, …) if `backbone` is one of its ResNets, else None."""
    sizes = (open_clip.get_model_config(backbone) or {}).get("vision_cfg", {})
    return sizes if isinstance(sizes.get("layers"), list) else None
