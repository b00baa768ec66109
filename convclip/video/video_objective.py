"""TeachCLIP's objective: its three losses by a recipe's weights, and the sign of a collapse."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from convclip.models.dual_tower import Outputs
from convclip.schema import Recipe
from convclip.video.teachclip_loss import stuck_at_chance, teachclip_loss
from convclip.video.temporal import frame_mask
from convclip.video.video_inputs import VideoInputs

# Logged steps in a row at chance that make a collapse.
STUCK_STEPS = 10


class VideoObjective:
    """TeachCLIP's losses by a recipe's weights."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        # The ground-truth losses of the latest logged steps; None once a collapse was reported.
        self.recent: list[float] | None = []

    def __call__(self, outputs: Outputs, batches: Sequence[VideoInputs], step: int) -> dict[str, Tensor]:
        """Losses by name; `total` is what is trained. The losses do not depend on the step."""
        (batch,), settings, weights = batches, self.recipe.video_settings, outputs.extras["frame_weights"]
        video, text = outputs.both()
        mask = frame_mask(batch.n_frames, weights.shape[1]) if settings.mask_padding else None
        return teachclip_loss(
            text,
            video,
            outputs.logit_scale,
            weights,
            batch.targets,
            mask,
            coarse=settings.coarse,
            weights=settings.weights,
        )

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
