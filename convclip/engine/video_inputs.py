"""What one micro batch of videos feeds the student and the losses, on the device: live, or from stores.

Shapes: B micro batch, W world, F frames, S frame side, T words, D student's embed, E a teacher's embed.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from convclip.data.features import FeatureStore
from convclip.data.msrvtt import VideoSplit
from convclip.data.transforms import normalize
from convclip.distributed import gather, rank
from convclip.losses.teachclip import TeacherTargets
from convclip.models.xclip_score import SCORE_MATRICES, score_targets
from convclip.models.xclip_teacher import XClipTeacher
from convclip.schema import Recipe, UserError

# Names in the stores.
TEACHER_VIDEO, TEACHER_TEXT = ("frame_raw", "video_out", "n_frames"), ("word_raw", "eot")
STUDENT_FRAMES, STUDENT_TEXT, N_FRAMES = "student_frames", "student_text", "student_n_frames"
CAPTION_TO_VIDEO, CAPTION_CRC32 = "caption_to_video", "caption_crc32"
SCORE_PREFIX, SCORE_ITEM = "score.", "score"


@dataclass(frozen=True)
class VideoInputs:
    """A micro batch. `frames`: pixels [B, F, 3, S, S] or stored embeddings [B, F, D]; `text`: tokens [B, T] or stored
    embeddings [B, D]; n_frames [B]; `targets`: what each teacher says."""

    frames: Tensor
    text: Tensor
    n_frames: Tensor
    targets: tuple[TeacherTargets, ...]
    # The student's, [B, F]: known once it has run.
    frame_weights: Tensor | None = None

    def model_inputs(self) -> tuple[Tensor, ...]:
        """Arguments of VideoStudent.forward."""
        return self.frames, self.text, self.n_frames

    def with_reference(self, frame_weights: Tensor, frame_features: Tensor) -> VideoInputs:
        """The same batch with what the student gives besides embeddings and logit scale."""
        return replace(self, frame_weights=frame_weights)


class VideoTeacher(Protocol):
    """A teacher, live or stored."""

    live: bool

    def targets(self, batch: dict[str, Any]) -> TeacherTargets:
        """What it says of this rank's pairs among those of all ranks; a collective."""


class StoredTeacher:
    """An X-CLIP teacher whose features lie in a store; ranks exchange ids, not features."""

    live = False

    def __init__(self, store: FeatureStore, split: VideoSplit, device: torch.device) -> None:
        self.store, self.device = store, device
        self.videos, self.captions = np.array(split.video_ids), np.array(split.caption_ids)
        _check_captions(store, split)
        names = (*SCORE_MATRICES, "logit_scale")
        self.parameters = {n: store.read(SCORE_PREFIX + n, [SCORE_ITEM])[0].to(device) for n in names}

    @torch.no_grad()
    def targets(self, batch: dict[str, Any]) -> TeacherTargets:
        """As VideoTeacher.targets."""
        ids = torch.stack([batch["video_id"], batch["caption_id"]], dim=1).to(self.device)
        videos, captions = gather(ids).cpu().numpy().T
        read = {name: self.store.read(name, self.videos[videos].tolist()) for name in TEACHER_VIDEO[:2]}
        read |= {name: self.store.read(name, self.captions[captions].tolist()) for name in TEACHER_TEXT}
        features = {name: rows.to(self.device, non_blocking=True) for name, rows in read.items()}
        return TeacherTargets(*score_targets(features, self.parameters, _own(len(ids))))


class LiveTeacher:
    """An X-CLIP teacher that runs on every batch."""

    live = True

    def __init__(self, teacher: XClipTeacher, device: torch.device) -> None:
        self.teacher, self.device = teacher.to(device), device
        self.parameters = teacher.score_parameters()

    @torch.no_grad()
    def targets(self, batch: dict[str, Any]) -> TeacherTargets:
        """As VideoTeacher.targets."""
        given = (batch[name].to(self.device, non_blocking=True) for name in ("frames", "n_frames", "text"))
        features = {name: gather(rows.contiguous()) for name, rows in self.teacher(*given).items()}
        return TeacherTargets(*score_targets(features, self.parameters, _own(len(batch["caption_id"]))))


class VideoSource:
    """Makes VideoInputs of the loader's batches; frames and texts of locked towers come from `store`."""

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
        self.stored_frames = self.stored_text = False
        self.teacher_is_on = True
        if store is not None:
            _check_captions(store, split)

    def enter_stage(self, frozen_boundary: int, trainable: set[str]) -> None:
        """Decide what is read from the store in a stage that trains these parameters."""
        has = self.store.arrays if self.store is not None else ()
        self.stored_frames = STUDENT_FRAMES in has and not any(name.startswith("visual.") for name in trainable)
        self.stored_text = STUDENT_TEXT in has and not any(name.startswith("text.") for name in trainable)

    @property
    def wanted(self) -> dict[str, bool]:
        """What the loader has to read: pixels, text (arguments of EpochLoader.epoch)."""
        live = any(teacher.live for teacher in self.teachers)
        return {"pixels": live or not self.stored_frames, "text": live or not self.stored_text}

    def __call__(self, batch: dict[str, Any], epoch: int) -> VideoInputs:
        """The micro batch on the device; frames travel as uint8 and are normalised there, in the model's dtype."""
        if self.stored_frames:
            names = self.videos[batch["video_id"].numpy()].tolist()
            frames = self._to_device(self.store.read(STUDENT_FRAMES, names))
            n_frames = self._to_device(self.store.read(N_FRAMES, names).long())
        else:
            tower, pixels = self.recipe.model.image, self._to_device(batch["frames"])
            flat = normalize(pixels.flatten(0, 1), tower.mean, tower.std, self.dtype)
            frames, n_frames = flat.unflatten(0, pixels.shape[:2]), self._to_device(batch["n_frames"])
        if self.stored_text:
            text = self.store.read(STUDENT_TEXT, self.captions[batch["caption_id"].numpy()].tolist())
        else:
            text = batch["text"]
        targets = tuple(teacher.targets(batch) for teacher in self.teachers)
        return VideoInputs(frames, self._to_device(text), n_frames, targets)

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)


def caption_crc32(captions: Sequence[str]) -> Tensor:
    """int64 [C]: checksum of each caption's text, so that a store of other captions under the same ids is found."""
    return torch.tensor([zlib.crc32(caption.encode("utf-8", "surrogatepass")) for caption in captions])


def _check_captions(store: FeatureStore, split: VideoSplit) -> None:
    """UserError unless the store holds every caption of the split, with the same text and of the same video."""
    if CAPTION_CRC32 not in store.arrays:
        return
    ids = list(split.caption_ids)
    other = store.read(CAPTION_CRC32, ids) != caption_crc32(split.captions)
    if CAPTION_TO_VIDEO in store.arrays:
        videos, wanted = np.sort(np.array(store.ids("frame_raw"))), np.array(split.video_ids)[split.video_of_caption]
        other |= torch.from_numpy(videos[store.read(CAPTION_TO_VIDEO, ids).numpy()] != wanted)
    if other.any():
        first = ids[int(other.nonzero()[0])]
        raise UserError(
            f"{store.path}: {int(other.sum())} captions differ from the data's, the first is {first!r}: extract again"
        )


def _own(rows: int) -> slice:
    return slice(rank() * rows, (rank() + 1) * rows)
