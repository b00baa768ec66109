"""The training objective: which losses a recipe adds up, on the features of one step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from convclip.engine.inputs import Inputs
from convclip.losses.contrastive import clip_loss, siglip_loss
from convclip.losses.distillation import distillation_loss
from convclip.losses.head_alignment import head_alignment_loss
from convclip.schema import HeadAlignment, Recipe, TeacherConfig
from convclip.video.teachclip_loss import stuck_at_chance, teachclip_loss
from convclip.video.temporal import frame_mask
from convclip.video.video_inputs import VideoInputs

# Logged steps in a row at chance that make a collapse.
STUCK_STEPS = 10


class Objective:
    """The weighted sum of a recipe's losses. The trainer sets `step`: from its end step on, a loss counts no more."""

    def __init__(self, recipe: Recipe, teacher_scale: float | None = None) -> None:
        self.recipe, self.teacher_scale, self.step = recipe, teacher_scale, 0

    def __call__(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, batches: list[Inputs]
    ) -> dict[str, Tensor]:
        """Losses by name; `total` is what is trained. Features [B, D], unit length: the rows of `batches` in turn.

        logit_scale [1], exponentiated, or [2] with the logit bias behind it.
        """
        recipe, tile = self.recipe, self.recipe.loss.tile
        ids = torch.cat([batch.image_id for batch in batches]) if recipe.loss.mask_same_image else None
        loss = clip_loss if recipe.loss.kind == "softmax" else siglip_loss
        losses = {"contrastive": loss(image_features, text_features, *logit_scale.split(1), tile=tile, ids=ids)}
        total = losses["contrastive"]
        if self.is_on(recipe.teacher):
            teacher = [torch.cat(rows) for rows in zip(*(batch.teacher for batch in batches), strict=True)]
            student = (image_features, text_features, logit_scale[:1])
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

    def is_on(self, part: TeacherConfig | HeadAlignment | None) -> bool:
        """Whether the recipe has this loss and the run has not come to its end step."""
        return part is not None and (part.end_step is None or self.step < part.end_step)

    def warnings(self, row: Mapping[str, Any]) -> list[str]:
        """What a row of metrics.jsonl says of a run gone wrong."""
        return []


class VideoObjective:
    """TeachCLIP's losses by a recipe's weights; the trainer sets `step`, which they do not depend on."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.step = recipe, 0
        # The ground-truth losses of the latest logged steps; None once a collapse was reported.
        self.recent: list[float] | None = []

    def __call__(self, video: Tensor, text: Tensor, logit_scale: Tensor, batches: list[VideoInputs]) -> dict:
        """Losses by name; `total` is what is trained. Features [B, D], unit length, of the one micro batch given."""
        (batch,), settings = batches, self.recipe.video
        mask = frame_mask(batch.n_frames, batch.frame_weights.shape[1]) if settings.mask_padding else None
        return teachclip_loss(
            *(text, video, logit_scale, batch.frame_weights, batch.targets, mask),
            coarse=settings.coarse,
            weights=settings.weights,
        )

    def is_on(self, part: object) -> bool:
        """Whether the recipe has this loss."""
        return part is not None

    def warnings(self, row: Mapping[str, Any]) -> list[str]:
        """One line, once, when the ground-truth loss has stayed at ln(global batch)."""
        if self.recent is None:
            return []
        self.recent = [*self.recent, row["loss_ground_truth"]][-STUCK_STEPS:]
        batch = self.recipe.batch.global_ // self.recipe.batch.accumulation
        if len(self.recent) < STUCK_STEPS or not stuck_at_chance(self.recent, batch):
            return []
        self.recent = None
        return [
            f"step {row['step']}: collapse: the ground-truth loss has stayed at ln({batch}) = {math.log(batch):.3f} "
            f"for {STUCK_STEPS} logged steps: all pairs score alike; check the pretrained weights, lower optim.lr"
        ]
