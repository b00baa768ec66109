"""Which tower a recipe's `model.image` and `model.text` mean: the only list of towers."""

from __future__ import annotations

from convclip import schema
from convclip.models.clip_text import ClipText
from convclip.models.gpt2_text import Gpt2Text
from convclip.models.hf_text import HfText
from convclip.models.openclip_resnet import OpenClipResNet, resnet_sizes
from convclip.models.timm_image import TimmImage
from convclip.models.tower import ImageTower, TextTower

# schema.TextTowerConfig.kind -> its tower
TEXT_TOWERS: dict[str, type[TextTower]] = {"clip": ClipText, "gpt2": Gpt2Text, "hf": HfText}


def build_image_tower(config: schema.ImageTowerConfig, embed_dim: int) -> ImageTower:
    """The tower that `config` describes, with random weights; works under `torch.device("meta")`."""
    kind: type[ImageTower] = TimmImage if resnet_sizes(config.backbone) is None else OpenClipResNet
    return kind.build(config, embed_dim)


def build_text_tower(config: schema.TextTowerConfig, embed_dim: int) -> TextTower:
    """The tower that `config` describes, with random weights; works under `torch.device("meta")`."""
    return TEXT_TOWERS[config.kind].build(config, embed_dim)
