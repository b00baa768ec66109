"""The teacher of distillation: any open_clip model, frozen. Shapes: B batch, S image side, T tokens, E its embed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convclip import schema
from convclip.files import sha256_of
from convclip.schema import UserError

WHOLE_MODELS = ("local-dir:", "hf-hub:")


def weights_sha256(config: schema.TeacherConfig) -> str:
    """What identifies a teacher's weights without loading it: the hash of its files, or the name of a release."""
    folder = Path(config.model.removeprefix("local-dir:"))
    if config.model.startswith("local-dir:") and folder.is_dir():
        files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pt"))
    else:
        files = [Path(config.pretrained)] if config.pretrained and Path(config.pretrained).is_file() else []
    if not files:
        return str(config.pretrained)
    return " ".join(sha256_of(path) for path in files)


def model_sizes(config: schema.TeacherConfig) -> dict[str, Any] | None:
    """open_clip's configuration of a teacher's model, without its weights; None where it is not at hand: an export that
    is still to be made, or a repository that was not downloaded.
    """
    try:
        return open_clip.get_model_config(config.model)
    except (OSError, RuntimeError, ValueError):
        return None


class Teacher(nn.Module):
    """open_clip's model of `config` with its weights: eval mode, no gradient, its own image size, mean, std, tokens.

    Errors: UserError when the model is unknown or its weights cannot be had.
    """

    def __init__(self, config: schema.TeacherConfig) -> None:
        super().__init__()
        if config.pretrained is None and not config.model.startswith(WHOLE_MODELS):
            raise UserError(
                f"teacher.model {config.model} needs its weights: set teacher.pretrained to an open_clip checkpoint, "
                f"or teacher.model to local-dir:FOLDER or hf-hub:owner/name"
            )
        try:
            release = open_clip.get_pretrained_cfg(config.model, config.pretrained or "")
            # By itself open_clip only warns where a release was trained with QuickGELU and its name does not say it.
            self.model = open_clip.create_model(
                config.model, pretrained=config.pretrained, force_quick_gelu=release.get("quick_gelu", False)
            )
            self.tokenizer: Callable[[list[str]], Tensor] = open_clip.get_tokenizer(config.model)
        except Exception as error:  # open_clip raises whatever the name, the network or the file leads it to
            raise UserError(f"teacher {config.model} cannot be loaded: {' '.join(str(error).split())[:300]}") from None
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Teacher:
        """A teacher stays in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] of any S -> unit-length float32 [B, E]."""
        visual: Any = self.model.visual
        size = visual.image_size if isinstance(visual.image_size, tuple) else (visual.image_size,) * 2
        pixels = images.float() / 255
        if images.shape[-2:] != tuple(size):
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
        statistics = (visual.image_mean, visual.image_std)
        mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in statistics)
        pixels = ((pixels - mean) / std).to(next(self.parameters()).dtype)
        return F.normalize(self.model.encode_image(pixels).float(), dim=-1)

    @torch.no_grad()
    def encode_text(self, tokens: Tensor) -> Tensor:
        """Token ids [B, T] of its own tokenizer -> unit-length float32 [B, E]."""
        return F.normalize(self.model.encode_text(tokens).float(), dim=-1)

    @property
    def width(self) -> int:
        """Its embedding's size E."""
        return self.encode_text(self.tokenizer(["a"]).to(self.model.logit_scale.device)).shape[1]

    @property
    def scale(self) -> float:
        """Its logit scale, exponentiated."""
        return math.exp(float(self.model.logit_scale))
