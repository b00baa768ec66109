"""The training objective: which losses a recipe adds up, on the features of one step."""

from __future__ import annotations

import torch
from torch import Tensor

from convclip.engine.inputs import Inputs
from convclip.losses.contrastive import clip_loss
from convclip.schema import Recipe


class Objective:
    """The weighted sum of a recipe's losses. The trainer sets `step`, after which some losses end."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.step = recipe, 0

    def __call__(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, batches: list[Inputs]
    ) -> dict[str, Tensor]:
        """Losses by name; `total` is what is trained. Features [B, D], unit length: the rows of `batches` in turn."""
        loss = self.recipe.loss
        contrastive = clip_loss(
            image_features,
            text_features,
            logit_scale,
            tile=loss.tile,
            ids=torch.cat([batch.image_id for batch in batches]) if loss.mask_same_image else None,
        )
        return {"total": contrastive, "contrastive": contrastive}
