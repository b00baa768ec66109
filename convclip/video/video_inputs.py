"""The inputs of the student and the losses for one micro batch of videos, on the device: live, or from stores.

Shapes: B micro batch, W world, F frames, S frame side, T words, D student's embed, E a teacher's embed.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from convclip.data.transforms import normalize
from convclip.engine.inputs import Reads
from convclip.features.reader import FeatureStore
from convclip.models.dual_tower import Cut
from convclip.schema import Recipe
from convclip.video.clip_loader import VideoBatch
from convclip.video.msrvtt import VideoSplit
from convclip.video.teachclip_loss import TeacherTargets
from convclip.video.teachers import N_FRAMES, STUDENT_FRAMES, STUDENT_TEXT, VideoTeacher, check_captions


@dataclass(frozen=True)
class VideoInputs:
    """A micro batch. `frames`: pixels [B, F, 3, S, S] or stored embeddings [B, F, D]; `text`: tokens [B, T] or stored
    embeddings [B, D]; n_frames [B]; `targets`: what each teacher says."""

    frames: Tensor
    text: Tensor
    n_frames: Tensor
    targets: tuple[TeacherTargets, ...]

    def model_inputs(self) -> tuple[Tensor, ...]:
        """Arguments of VideoStudent.forward."""
        return self.frames, self.text, self.n_frames


class VideoSource:
    """Turns the loader's batches into VideoInputs; frames and texts of locked towers come from `store`."""

    def __init__(
        self,
        recipe: Recipe,
        device: torch.device,
        dtype: torch.dtype,
        split: VideoSplit,
        teachers: Sequence[VideoTeacher],
        store: FeatureStore | None,
    ) -> None:
        self.recipe, self.device, self.dtype, self.teachers, self.store = recipe, device, dtype, teachers, store
        self.videos, self.captions = np.array(split.video_ids), np.array(split.caption_ids)
        if store is not None:
            check_captions(store, split)

    def reads(self, frozen: Cut, trainable: Set[str], step: int) -> Reads:
        """For a step of a stage that trains `trainable`: locked towers are read from the store."""
        has = self.store.arrays if self.store is not None else ()
        frames = STUDENT_FRAMES in has and not any(name.startswith("visual.") for name in trainable)
        text = STUDENT_TEXT in has and not any(name.startswith("text.") for name in trainable)
        live = any(teacher.live for teacher in self.teachers)
        return Reads(frames, text, bool(self.teachers), pixels=live or not frames, text=live or not text)

    def inputs(self, batch: VideoBatch, epoch: int, reads: Reads) -> VideoInputs:
        """The micro batch on the device; frames travel as uint8 and are normalised there, in the model's dtype."""
        if reads.stored_image:
            names = self.videos[batch["video_id"].numpy()].tolist()
            frames = self._to_device(self._read(STUDENT_FRAMES, names))
            n_frames = self._to_device(self._read(N_FRAMES, names).long())
        else:
            tower, pixels = self.recipe.model.image, self._to_device(batch["frames"])
            flat = normalize(pixels.flatten(0, 1), tower.mean, tower.std, self.dtype)
            frames, n_frames = flat.unflatten(0, pixels.shape[:2]), self._to_device(batch["n_frames"])
        if reads.stored_text:
            text = self._read(STUDENT_TEXT, self.captions[batch["caption_id"].numpy()].tolist())
        else:
            text = batch["text"]
        targets = tuple(teacher.targets(batch) for teacher in self.teachers)
        return VideoInputs(frames, self._to_device(text), n_frames, targets)

    def _read(self, name: str, ids: Sequence[str]) -> Tensor:
        assert self.store is not None
        return self.store.read(name, ids)

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)
