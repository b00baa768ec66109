"""The training objective: which losses a recipe adds up, on the features of one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from convclip.losses.contrastive import clip_loss, siglip_loss
from convclip.losses.distillation import distillation_loss
from convclip.losses.head_alignment import head_alignment_loss
from convclip.models.dual_tower import Outputs
from convclip.schema import HeadAlignment, Recipe, TeacherConfig

if TYPE_CHECKING:
    from convclip.engine.inputs import Inputs

# Losses by name; `total` is what is trained.
Losses: TypeAlias = dict[str, Tensor]


def is_on(part: TeacherConfig | HeadAlignment | None, step: int) -> bool:
    """Whether the recipe has this loss and `step` comes before its end step."""
    return part is not None and (part.end_step is None or step < part.end_step)


class ImageTextObjective:
    """The weighted sum of a recipe's losses."""

    def __init__(self, recipe: Recipe, teacher_scale: float | None = None) -> None:
        self.recipe, self.teacher_scale = recipe, teacher_scale

    def __call__(self, outputs: Outputs, batches: Sequence[Inputs], step: int) -> Losses:
        """Losses of optimizer step `step`, counted from 0. Rows of `outputs` are those of `batches` in turn.

        Where a locked text tower's embeddings came from the store, outputs.text is None and the batches have them.
        """
        recipe, tile = self.recipe, self.recipe.loss.tile
        image, scale = outputs.image, outputs.logit_scale
        assert image is not None  # the image tower runs in every step
        text = _joined(batches, "text_embedding") if outputs.text is None else outputs.text
        ids = _joined(batches, "image_id") if recipe.loss.mask_same_image else None
        if recipe.loss.kind == "softmax":
            contrastive = clip_loss(image, text, scale, tile=tile, ids=ids)
        else:
            assert outputs.logit_bias is not None  # the schema: a sigmoid loss has one
            contrastive = siglip_loss(image, text, scale, outputs.logit_bias, tile=tile, ids=ids)
        losses, total = {"contrastive": contrastive}, contrastive
        if recipe.teacher is not None and is_on(recipe.teacher, step):
            said = [batch.teacher for batch in batches if batch.teacher is not None]
            teacher_image, teacher_text = (torch.cat(rows) for rows in zip(*said, strict=True))
            losses["distillation"] = distillation_loss(
                image,
                text,
                scale,
                teacher_image,
                teacher_text,
                scale.new_tensor(self.teacher_scale),
                temperature=recipe.teacher.temperature,
                tile=tile,
            )
            total = total + recipe.teacher.weight * losses["distillation"]
        if recipe.head_alignment is not None and is_on(recipe.head_alignment, step):
            reference = outputs.extras["reference"]
            losses["head_alignment"] = head_alignment_loss(image, reference, recipe.head_alignment.kind)
            total = total + recipe.head_alignment.weight * losses["head_alignment"]
        return {"total": total, **losses}

    def warnings(self, row: Mapping[str, Any]) -> list[str]:
        """What a row of metrics.jsonl says of a run gone wrong."""
        return []


def _joined(batches: Sequence[Inputs], field: str) -> Tensor:
    rows = [getattr(batch, field) for batch in batches]
    return rows[0] if len(rows) == 1 else torch.cat(rows)
