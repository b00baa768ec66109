"""What one micro batch feeds the towers and the losses, on the device.

Pictures, or what the store holds of them; token ids, or stored embeddings. Shapes: B batch, D embed, E the teacher's
embed, T tokens, C channels and H.W size of a feature map, S image side.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from convclip.data.transforms import normalize
from convclip.engine.stored.frozen import FrozenWork
from convclip.features.reader import FeatureStore, view_ids
from convclip.models.dual_tower import INPUT, Cut
from convclip.models.teacher import Teacher
from convclip.models.text_tower import TextPrefix
from convclip.schema import Recipe


@dataclass(frozen=True)
class Inputs:
    """A micro batch. `image` and `text` are what enters the towers at `cut`: at first pictures [B, 3, S, S] and token
    ids [B, T]. Pictures of bytes are normalised only when the tower runs: a chunked step holds those of all its rows.
    """

    image: Tensor
    text: Tensor | TextPrefix | None
    image_id: Tensor
    cut: Cut = INPUT
    # Unit-length embeddings [B, D] of a locked text tower, in place of `text`.
    text_embedding: Tensor | None = None
    # Unit-length image and text embeddings [B, E] of the teacher.
    teacher: tuple[Tensor, Tensor] | None = None
    # Unit-length embeddings [B, D] of the reference head.
    reference: Tensor | None = None
    # Makes of pictures of bytes what the tower takes.
    normalize: Callable[[Tensor], Tensor] | None = None

    @property
    def tower_image(self) -> Tensor:
        """`image` as the tower takes it."""
        return self.normalize(self.image) if self.image.dtype == torch.uint8 else self.image

    def model_inputs(self, without_text: bool = False) -> tuple[Any, ...]:
        """Arguments of DualTower.forward."""
        return self.tower_image, None if without_text else self.text, self.cut

    def up_to(self, stop: Cut) -> tuple[Tensor | None, Tensor | TextPrefix | None]:
        """(image, text) that have to run to get to `stop`; None for a tower that is there already."""
        image = self.tower_image if stop.image > self.cut.image else None
        return image, self.text if stop.text > self.cut.text else None

    def entering(self, tower: str, value: Tensor | TextPrefix, stop: Cut) -> Inputs:
        """The same batch with `value`, which enters `tower` (image or text) at `stop`."""
        return replace(self, **{tower: value}, cut=self.cut._replace(**{tower: getattr(stop, tower)}))

    def nbytes(self, tower: str) -> int:
        """Bytes of what enters `tower` (image or text)."""
        value = getattr(self, tower)
        return value.nbytes if isinstance(value, Tensor) else sum(part.nbytes for part in value)

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
        tower = recipe.model.image
        self.normalize = functools.partial(normalize, mean=tower.mean, std=tower.std, dtype=dtype)
        self.views = recipe.features.view_count or 1
        self.teacher_is_on = recipe.teacher is not None
        self.stored_image = self.stored_text = False

    def enter_stage(self, frozen: Cut, trainable: set[str]) -> None:
        """Decide what is read from the store in a stage that trains `trainable`, none below `frozen`."""
        text_is_frozen = not any(name.startswith("text.") for name in trainable)
        self.stored_image = self.store is not None and 0 < self.work.boundary <= frozen.image
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
        """The micro batch on the device."""
        image_id, caption_id = batch["image_id"], batch["caption_id"]
        views = view_ids(image_id, epoch % self.views, self.views) if self.store is not None else None
        pixels = self._to_device(batch["image"]) if "image" in batch else None
        text = None if self.stored_text else self._to_device(batch["text"])
        image = self._to_device(self.store.read("image_map", views)) if self.stored_image else pixels
        return Inputs(
            image,
            text,
            self._to_device(image_id),
            Cut(self.work.boundary) if self.stored_image else INPUT,
            self._to_device(self.store.read("text_embedding", caption_id)) if self.stored_text else None,
            self._teacher(batch, pixels, views),
            normalize=self.normalize,
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
