"""The dual tower: an image and a text tower whose embeddings meet in one space.

Shapes: B batch, C channels and H.W size of images, T tokens, D embed.
"""

from __future__ import annotations

from typing import NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convclip import schema
from convclip.models.batch_norm import batch_norms
from convclip.models.tower import TextPrefix
from convclip.models.towers import build_image_tower, build_text_tower


class Cut(NamedTuple):
    """A cut through both towers: how many layer groups of each, counted from the input, lie below it."""

    image: int = 0
    text: int = 0


# The lowest cut: images and token ids enter there.
INPUT = Cut()


class Outputs(NamedTuple):
    """The outputs of a dual tower for a batch. A tower without input gives None.

    image, text: float32 [B, D] of unit length (a video student's `image` is the video). logit_scale [1], exponentiated;
    logit_bias [1] where the model has one. extras: further tensors by name, each [B, ...].
    """

    image: Tensor | None
    text: Tensor | None
    logit_scale: Tensor
    logit_bias: Tensor | None
    extras: dict[str, Tensor]

    def both(self) -> tuple[Tensor, Tensor]:
        """(image, text) of a batch in which both towers had input. ValueError where one had none."""
        if self.image is None or self.text is None:
            raise ValueError("the batch had no input for one of the towers")
        return self.image, self.text


class Entering(NamedTuple):
    """What enters each tower at a cut; None for a tower without input."""

    image: Tensor | None
    text: TextPrefix | None


class DualTower(nn.Module):
    """`visual`, `text`, `logit_scale` and perhaps `logit_bias`; names are those of open_clip's CustomTextCLIP."""

    # Whether locking a tower locks its head too; here heads are new and always train.
    locks_heads = False
    # What `keep_norms` was last told.
    _still_norms: tuple[str, ...] = ()

    def __init__(self, config: schema.Model):
        super().__init__()
        self.visual = build_image_tower(config.image, config.embed_dim)
        self.text = build_text_tower(config.text, config.embed_dim)
        # Shape (1,), not (): DeepSpeed fails on parameters without a dimension.
        self.logit_scale = nn.Parameter(torch.full((1,), config.init_logit_scale))
        bias = config.init_logit_bias
        self.logit_bias = None if bias is None else nn.Parameter(torch.full((1,), bias))
        # The frozen head of head alignment, where a recipe asks for one.
        self.reference: nn.Module | None = None

    def encode_image(self, images: Tensor, normalize: bool = False, cut: int = 0) -> Tensor:
        """Images [B, 3, H, W] (float, normalised) -> embeddings [B, D].

        `cut` > 0: `images` is instead what `visual.forward_prefix` gave there. `normalize`: unit length, float32.
        """
        features = self.visual.forward_from(images, cut) if cut else self.visual(images)
        return _unit_length(features) if normalize else features

    def encode_text(self, tokens: Tensor | TextPrefix, normalize: bool = False, cut: int = 0) -> Tensor:
        """Token ids [B, T] (int64) -> embeddings [B, D]; `normalize`: unit length, float32.

        `cut` > 0: `tokens` is instead what enters layer group `cut` of the text tower.
        """
        features = self.text(tokens, cut)
        return _unit_length(features) if normalize else features

    @overload
    def forward(
        self, images: Tensor | None = None, texts: Tensor | TextPrefix | None = None, start: Cut = INPUT
    ) -> Outputs: ...

    @overload
    def forward(
        self, images: Tensor | None = None, texts: Tensor | TextPrefix | None = None, start: Cut = INPUT, *, stop: Cut
    ) -> Entering: ...

    def forward(
        self,
        images: Tensor | None = None,
        texts: Tensor | TextPrefix | None = None,
        start: Cut = INPUT,
        stop: Cut | None = None,
    ) -> Outputs | Entering:
        """Embeddings of images and texts, or with `stop` what enters the towers there.

        `images` and `texts` are what enters the towers at `start`: at first images [B, 3, H, W] and token ids [B, T].
        With a `reference` head (see `convclip.models.reference_head`), extras["reference"] has its embeddings [B, D] of
        the same feature map, of unit length.
        """
        if stop is not None:
            return Entering(
                None if images is None else self.visual.forward_between(images, start.image, stop.image),
                None if texts is None else self.text(texts, start.text, stop.text),
            )
        # Text first: it reads its longest caption's length, which on an accelerator waits for the work queued so far.
        text = None if texts is None else self.encode_text(texts, normalize=True, cut=start.text)
        image, extras = None, {}
        if images is not None and self.reference is None:
            image = self.encode_image(images, normalize=True, cut=start.image)
        elif images is not None and self.reference is not None:
            features = self.visual.forward_between(images, start.image, self.visual.map_cut)
            image = _unit_length(self.visual.forward_from(features, self.visual.map_cut))
            extras["reference"] = _unit_length(self.reference(features.detach()))
        # A copy: without one an fp32 output would be the parameter itself, and read as it is after the update.
        bias = None if self.logit_bias is None else self.logit_bias.float().clone()
        return Outputs(image, text, self.logit_scale.float().exp(), bias, extras)

    def train(self, mode: bool = True) -> DualTower:
        """As nn.Module, except that a module none of whose parameters is trainable stays in eval mode.

        So a locked part has no dropout or drop path and its batch norms use, and keep, their running statistics, as do
        those of `keep_norms`. Call it again after changing either, or `requires_grad`.
        """
        super().train(mode)
        if mode:
            _rest_frozen(self)
            for tower in self._still_norms:
                for norm in self.tower_norms(tower):
                    norm.eval()
        return self

    def keep_norms(self, towers: tuple[str, ...]) -> None:
        """Batch norms of these towers' layers (image, text) keep their running statistics in training from now on."""
        self._still_norms = towers

    def tower_norms(self, tower: str) -> list[nn.Module]:
        """The batch norms with running statistics of a tower (image or text), without its head's."""
        module = self.visual if tower == "image" else self.text
        head = set(module.embed_head().modules())
        return [norm for norm in batch_norms(module) if norm not in head]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Activation checkpointing of both towers: memory for about a third more computation."""
        self.visual.set_grad_checkpointing(enable)
        self.text.set_grad_checkpointing(enable)


def build_model(config: schema.Model) -> DualTower:
    """The model that `config` describes, with random weights; works under `torch.device("meta")`."""
    return DualTower(config)


def _unit_length(features: Tensor) -> Tensor:
    # In half precision a unit vector is off by up to 5e-4, which a logit scale of 100 makes visible in the loss.
    return F.normalize(features.float(), dim=-1)


def _rest_frozen(module: nn.Module) -> None:
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        module.eval()
        return
    for child in module.children():
        _rest_frozen(child)
