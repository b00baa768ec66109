"""The training objective: which losses a recipe adds up, on the features of one step."""

from __future__ import annotations

from torch import Tensor

from convclip.losses.contrastive import clip_loss
from convclip.schema import Recipe


class Objective:
    """Weighted sum of the losses of `recipe`; called with one (micro) batch's features on every rank."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def __call__(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, image_id: Tensor
    ) -> dict[str, Tensor]:
        """Losses by name; `total` is what is trained. Features [B, D] normalised, image_id [B]."""
        loss = self.recipe.loss
        contrastive = clip_loss(
            image_features,
            text_features,
            logit_scale,
            tile=loss.tile,
            ids=image_id if loss.mask_same_image else None,
        )
        return {"total": contrastive, "contrastive": contrastive}
