"""The inputs of the towers and the losses for one micro batch, on the device.

Images or stored feature maps; token ids or stored embeddings. Shapes: B batch, D embed, E the teacher's
embed, T tokens, C channels and H.W size of a feature map, S image side.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from convclip.data.micro_batches import Batch
from convclip.data.transforms import normalize
from convclip.engine.objective import is_on
from convclip.engine.stored.frozen import FrozenWork
from convclip.features.reader import FeatureStore, view_ids
from convclip.models.dual_tower import INPUT, Cut
from convclip.models.teacher import Teacher
from convclip.models.tower import TextPrefix
from convclip.schema import Recipe


@dataclass(frozen=True)
class Inputs:
    """A micro batch. `image` and `text` enter the towers at `cut`; at cut 0 they are images [B, 3, S, S] and token
    ids [B, T]. Images stay uint8 until the tower runs, because a chunked step holds those of all its rows.
    """

    image: Tensor
    text: Tensor | TextPrefix | None
    image_id: Tensor
    cut: Cut = INPUT
    # Unit-length embeddings [B, D] of a locked text tower, in place of `text`.
    text_embedding: Tensor | None = None
    # Unit-length image and text embeddings [B, E] of the teacher.
    teacher: tuple[Tensor, Tensor] | None = None
    # Normalises uint8 images for the tower.
    normalize: Callable[[Tensor], Tensor] | None = None

    @property
    def tower_image(self) -> Tensor:
        """`image` as the tower takes it."""
        return self.normalize(self.image) if self.normalize and self.image.dtype == torch.uint8 else self.image

    def model_inputs(self, without_text: bool = False) -> tuple[Any, ...]:
        """Arguments of DualTower.forward."""
        return self.tower_image, None if without_text else self.text, self.cut

    def up_to(self, stop: Cut) -> tuple[Tensor | None, Tensor | TextPrefix | None]:
        """(image, text) that have to run to get to `stop`; None for a tower that is there already."""
        image = self.tower_image if stop.image > self.cut.image else None
        return image, self.text if stop.text > self.cut.text else None

    def entering(self, tower: str, value: Tensor | TextPrefix, stop: Cut) -> Inputs:
        """The same batch with `value`, which enters `tower` (image or text) at `stop`."""
        if tower == "text":
            return replace(self, text=value, cut=self.cut._replace(text=stop.text))
        assert isinstance(value, Tensor)  # a pair enters text towers alone
        return replace(self, image=value, cut=self.cut._replace(image=stop.image))

    def nbytes(self, tower: str) -> int:
        """Bytes of what enters `tower` (image or text)."""
        value = getattr(self, tower)
        return value.nbytes if isinstance(value, Tensor) else sum(part.nbytes for part in value)


@dataclass(frozen=True)
class Reads:
    """Which inputs of a step come from the store, and which the loader has to read."""

    stored_image: bool
    stored_text: bool
    teacher: bool
    # Arguments of EpochLoader.epoch.
    pixels: bool
    text: bool


class ImageTextSource:
    """Turns the loader's batches into Inputs, from the store as long as what it holds is valid."""

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

    def reads(self, frozen: Cut, trainable: Set[str], step: int) -> Reads:
        """For a step of a stage that trains `trainable`, all of it above the cut `frozen`."""
        text_is_frozen = not any(name.startswith("text.") for name in trainable)
        stored_image = self.store is not None and 0 < self.work.boundary <= frozen.image
        stored_text = self.store is not None and self.work.text and text_is_frozen
        teacher = is_on(self.recipe.teacher, step)
        live_teacher = self.teacher is not None and teacher
        return Reads(
            stored_image,
            stored_text,
            teacher,
            pixels=live_teacher or not stored_image,
            text=live_teacher or not stored_text,
        )

    @property
    def teacher_scale(self) -> float | None:
        """The teacher's exponentiated logit scale."""
        if self.teacher is not None:
            return self.teacher.scale
        return self.store.identity.get("teacher_logit_scale") if self.store is not None else None

    def inputs(self, batch: Batch, epoch: int, reads: Reads) -> Inputs:
        """The micro batch on the device."""
        image_id, caption_id = batch["image_id"], batch["caption_id"]
        views = view_ids(image_id, epoch % self.views, self.views) if self.store is not None else None
        pixels = self._to_device(batch["image"]) if "image" in batch else None
        image = self._stored("image_map", views) if reads.stored_image else pixels
        assert image is not None  # the loader reads images where the store has no maps
        return Inputs(
            image,
            None if reads.stored_text else self._to_device(batch["text"]),
            self._to_device(image_id),
            Cut(self.work.boundary) if reads.stored_image else INPUT,
            self._stored("text_embedding", caption_id) if reads.stored_text else None,
            self._teacher(batch, pixels, views) if reads.teacher else None,
            normalize=self.normalize,
        )

    def first_stored(self) -> dict[str, int]:
        """image_id and caption_id of items that the store holds; those it has no features of are left out."""
        ids = {}
        for name, key in (
            ("image_map", "image_id"),
            ("teacher_image", "image_id"),
            ("text_embedding", "caption_id"),
            ("teacher_text", "caption_id"),
        ):
            if self.store is not None and name in self.store:
                ids[key] = int(self.store.ids(name)[0]) // (self.views if key == "image_id" else 1)
        return ids

    def _teacher(self, batch: Batch, pixels: Tensor | None, views: Any) -> tuple[Tensor, Tensor]:
        if self.teacher is not None:
            assert pixels is not None  # for a live teacher the loader reads images
            text = self._to_device(batch["teacher_text"])
            return self.teacher.encode_image(pixels), self.teacher.encode_text(text)
        return self._stored("teacher_image", views), self._stored("teacher_text", batch["caption_id"])

    def _stored(self, name: str, ids: Any) -> Tensor:
        assert self.store is not None
        return self._to_device(self.store.read(name, ids))

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)
