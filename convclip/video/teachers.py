"""Teachers' targets for a batch of videos and captions: from a store, or live.

Shapes: B micro batch, W world, C captions, E the teacher's embed.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from convclip.distributed import gather, rank
from convclip.features.reader import FeatureStore
from convclip.schema import Recipe, UserError
from convclip.video.clip_loader import VideoBatch
from convclip.video.hf_xclip_teacher import HfXClipTeacher, load_hf_xclip
from convclip.video.msrvtt import VideoSplit
from convclip.video.teachclip_loss import TeacherTargets
from convclip.video.xclip_score import SCORE_MATRICES, score_targets
from convclip.video.xclip_teacher import XClipTeacher, load_xclip

# Names in the stores.
TEACHER_VIDEO, TEACHER_TEXT = ("frame_raw", "video_out", "n_frames"), ("word_raw", "eot")
STUDENT_FRAMES, STUDENT_TEXT, N_FRAMES = "student_frames", "student_text", "student_n_frames"
CAPTION_TO_VIDEO, CAPTION_CRC32 = "caption_to_video", "caption_crc32"
SCORE_PREFIX, SCORE_ITEM = "score.", "score"


class VideoTeacher(Protocol):
    """A teacher, live or stored."""

    live: bool

    def targets(self, batch: VideoBatch) -> TeacherTargets:
        """What it says of this rank's pairs among those of all ranks; a collective."""


class StoredTeacher:
    """An X-CLIP teacher whose features lie in a store; ranks exchange ids, not features."""

    live = False

    def __init__(self, store: FeatureStore, split: VideoSplit, device: torch.device) -> None:
        self.store, self.device = store, device
        self.videos, self.captions = np.array(split.video_ids), np.array(split.caption_ids)
        check_captions(store, split)
        names = (*SCORE_MATRICES, "logit_scale")
        self.parameters = {n: store.read(SCORE_PREFIX + n, [SCORE_ITEM])[0].to(device) for n in names}

    @torch.no_grad()
    def targets(self, batch: VideoBatch) -> TeacherTargets:
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
    def targets(self, batch: VideoBatch) -> TeacherTargets:
        """As VideoTeacher.targets."""
        read = (batch["frames"], batch["n_frames"], batch["text"])
        given = (value.to(self.device, non_blocking=True) for value in read)
        features = {name: gather(rows.contiguous()) for name, rows in self.teacher(*given).items()}
        return TeacherTargets(*score_targets(features, self.parameters, _own(len(batch["caption_id"]))))


class LiveCoarseTeacher:
    """Hugging Face's XCLIPModel, which runs on every batch and knows no fine target."""

    live = True

    def __init__(self, teacher: HfXClipTeacher, device: torch.device) -> None:
        self.teacher, self.device = teacher.to(device), device

    @torch.no_grad()
    def targets(self, batch: VideoBatch) -> TeacherTargets:
        """As VideoTeacher.targets."""
        videos = self.teacher.encode_video(batch["frames"].to(self.device))
        texts = self.teacher.encode_text(batch["text"].to(self.device))
        text, video, patches = texts["text_embed"], videos["video_embed"], videos["patches"]
        rows = self.teacher.score(text, gather(video), gather(patches))
        columns = self.teacher.score(gather(text), video, patches).T
        return TeacherTargets(rows, columns)


def open_teachers(recipe: Recipe, split: VideoSplit, device: torch.device) -> list[VideoTeacher]:
    """The recipe's teachers; UserError where there is none but a loss that needs one, or one does not fit."""
    video = recipe.video_settings
    if not video.teachers and any(video.weights[1:]):
        raise UserError(
            "video.teachers is not set: name a store of tools/extract_features.py --kind xclip (.h5) or an X-CLIP "
            "checkpoint, or train without a teacher by video.weights=[1, 0, 0]"
        )
    return [_open_teacher(path, recipe, split, device) for path in video.teachers]


def _open_teacher(path: str, recipe: Recipe, split: VideoSplit, device: torch.device) -> VideoTeacher:
    video = recipe.video_settings
    if path.endswith(".h5"):
        expected = {"kind": "xclip", "frames": video.frames, "words": video.words}
        return StoredTeacher(FeatureStore(path, expected), split, device)
    pixels = recipe.model.image.image_size
    if Path(path).is_dir() or not Path(path).suffix:
        coarse = load_hf_xclip(path)
        _check_fit(path, recipe, (coarse.frames, coarse.image_size), (video.frames, pixels))
        return LiveCoarseTeacher(coarse, device)
    teacher = load_xclip(path)
    size = teacher.size
    _check_fit(path, recipe, (size.frames, size.image_size, size.words), (video.frames, pixels, video.words))
    return LiveTeacher(teacher, device)


def _check_fit(path: str, recipe: Recipe, takes: tuple[object, ...], has: tuple[int, ...]) -> None:
    """UserError where a live teacher takes other videos or tokens than the student."""
    if takes != has:
        raise UserError(
            f"teacher {path} takes (frames, pixels, words) of {takes}, the recipe has {has}: change the recipe, or "
            "extract an X-CLIP teacher's features into a store of its own"
        )
    if recipe.model.text.tokenizer != "open_clip":
        raise UserError(f"teacher {path} reads open_clip's tokens, the student others: extract its features")


def caption_crc32(captions: Sequence[str]) -> Tensor:
    """int64 [C]: checksum of each caption's text, so that a store of other captions under the same ids is found."""
    return torch.tensor([zlib.crc32(caption.encode("utf-8", "surrogatepass")) for caption in captions])


def check_captions(store: FeatureStore, split: VideoSplit) -> None:
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
