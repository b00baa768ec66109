"""What one micro batch feeds the towers and the losses, on the device.

Pictures, or what the store holds of them; token ids, or stored embeddings. Shapes: B batch, D embed, E the teacher's
embed, T tokens, C channels and H.W size of a feature map, S image side.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from convclip.data.features import FeatureStore, view_ids
from convclip.data.transforms import normalize
from convclip.engine.frozen import FrozenWork
from convclip.models.teacher import Teacher
from convclip.schema import Recipe


@dataclass(frozen=True)
class Inputs:
    """A micro batch. `image` is pixels [B, 3, S, S] at boundary 0, else what enters layer group `boundary`."""

    image: Tensor
    boundary: int
    text: Tensor | None
    image_id: Tensor
    # Unit-length embeddings [B, D] of a locked text tower, in place of `text`.
    text_embedding: Tensor | None = None
    # Unit-length image and text embeddings [B, E] of the teacher.
    teacher: tuple[Tensor, Tensor] | None = None
    # Unit-length embeddings [B, D] of the reference head.
    reference: Tensor | None = None

    def model_inputs(self, without_text: bool = False) -> tuple[Any, ...]:
        """Arguments of DualTower.forward."""
        return self.image, None if without_text else self.text, self.boundary

    def with_prefix(self, features: Tensor, boundary: int) -> Inputs:
        """The same batch, its pictures replaced by what the frozen part of the tower made of them."""
        return replace(self, image=features, boundary=boundary)

    def with_reference(self, reference: Tensor | None = None) -> Inputs:
        """The same batch with the reference head's embeddings."""
        return replace(self, reference=reference)


class InputSource:
    """Makes Inputs of the loader's batches: live, or from the store for as long as what it holds is valid."""

    def __init__(
        self,
        recipe: Recipe,
        device: torch.device,
        dtype: torch.dtype,
        teacher: Teacher | None,
        store: FeatureStore | None,
        work: FrozenWork,
    ) -> None:
        self.recipe, self.device, self.dtype = recipe, device, dtype
        self.teacher, self.store, self.work = teacher, store, work
        self.views = recipe.features.view_count or 1
        self.teacher_is_on = recipe.teacher is not None
        self.stored_image = self.stored_text = False

    def enter_stage(self, frozen_boundary: int, trainable: set[str]) -> None:
        """Decide what is read from the store in a stage that trains `trainable`, none below `frozen_boundary`."""
        text_is_frozen = not any(name.startswith("text.") for name in trainable)
        self.stored_image = self.store is not None and 0 < self.work.boundary <= frozen_boundary
        self.stored_text = self.store is not None and self.work.text and text_is_frozen

    @property
    def teacher_scale(self) -> float | None:
        """The teacher's exponentiated logit scale."""
        if self.teacher is not None:
            return self.teacher.scale
        return self.store.identity.get("teacher_logit_scale") if self.store is not None else None

    @property
    def wanted(self) -> dict[str, bool]:
        """What the loader has to read: pixels, text (arguments of TrainLoader.epoch)."""
        live_teacher = self.teacher is not None and self.teacher_is_on
        return {"pixels": live_teacher or not self.stored_image, "text": live_teacher or not self.stored_text}

    def __call__(self, batch: dict[str, Any], epoch: int) -> Inputs:
        """The micro batch on the device; pictures travel as uint8 and are normalised there, in the model's dtype."""
        image_id, caption_id = batch["image_id"], batch["caption_id"]
        views = view_ids(image_id, epoch % self.views, self.views) if self.store is not None else None
        pixels = self._to_device(batch["image"]) if "image" in batch else None
        text = None if self.stored_text else self._to_device(batch["text"])
        if self.stored_image:
            image = self._to_device(self.store.read("image_map", views))
        else:
            tower = self.recipe.model.image
            image = normalize(pixels, tower.mean, tower.std, self.dtype)
        return Inputs(
            image,
            self.work.boundary if self.stored_image else 0,
            text,
            self._to_device(image_id),
            self._to_device(self.store.read("text_embedding", caption_id)) if self.stored_text else None,
            self._teacher(batch, pixels, views),
        )

    def _teacher(self, batch: dict[str, Any], pixels: Tensor | None, views: Any) -> tuple[Tensor, Tensor] | None:
        if not self.teacher_is_on:
            return None
        if self.teacher is not None:
            text = self._to_device(batch["teacher_text"])
            return self.teacher.encode_image(pixels), self.teacher.encode_text(text)
        image = self.store.read("teacher_image", views)
        return self._to_device(image), self._to_device(self.store.read("teacher_text", batch["caption_id"]))

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)
