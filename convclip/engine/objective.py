"""The training objective: which losses a recipe adds up, on the features of one step."""

from __future__ import annotations

import torch
from torch import Tensor

from convclip.engine.inputs import Inputs
from convclip.losses.contrastive import clip_loss
from convclip.losses.distillation import distillation_loss
from convclip.losses.head_alignment import head_alignment_loss
from convclip.schema import HeadAlignment, Recipe, Teacher


class Objective:
    """The weighted sum of a recipe's losses. The trainer sets `step`: from its end step on, a loss counts no more."""

    def __init__(self, recipe: Recipe, teacher_scale: float | None = None) -> None:
        self.recipe, self.teacher_scale, self.step = recipe, teacher_scale, 0

    def __call__(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, batches: list[Inputs]
    ) -> dict[str, Tensor]:
        """Losses by name; `total` is what is trained. Features [B, D], unit length: the rows of `batches` in turn."""
        recipe, tile = self.recipe, self.recipe.loss.tile
        ids = torch.cat([batch.image_id for batch in batches]) if recipe.loss.mask_same_image else None
        losses = {"contrastive": clip_loss(image_features, text_features, logit_scale, tile=tile, ids=ids)}
        total = losses["contrastive"]
        if self.is_on(recipe.teacher):
            teacher = [torch.cat(rows) for rows in zip(*(batch.teacher for batch in batches), strict=True)]
            student = (image_features, text_features, logit_scale)
            scale = logit_scale.new_tensor(self.teacher_scale)
            losses["distillation"] = distillation_loss(
                *student, *teacher, scale, temperature=recipe.teacher.temperature, tile=tile
            )
            total = total + recipe.teacher.weight * losses["distillation"]
        if self.is_on(recipe.head_alignment):
            reference = torch.cat([batch.reference for batch in batches])
            losses["head_alignment"] = head_alignment_loss(image_features, reference, recipe.head_alignment.kind)
            total = total + recipe.head_alignment.weight * losses["head_alignment"]
        return {"total": total, **losses}

    def is_on(self, part: Teacher | HeadAlignment | None) -> bool:
        """Whether the recipe has this loss and the run has not come to its end step."""
        return part is not None and (part.end_step is None or self.step < part.end_step)
