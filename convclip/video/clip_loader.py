"""Training and evaluation batches of videos and captions, frames from the frame store.

Shapes: V videos, C captions, B micro batch, F frames, S frame side, W words. Videos and captions are known by their
places in the split, 0..V-1 and 0..C-1.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import torch
from torch.utils.data import Dataset

from convclip.data.evaluation_set import Batches, dealt_batches, listed_batches
from convclip.data.loader import EpochLoader
from convclip.data.micro_batches import Rows
from convclip.data.tokenizers import Tokenizer, build_tokenizer
from convclip.schema import Recipe, TextTowerConfig, UserError
from convclip.video.frame_store import FrameStore
from convclip.video.msrvtt import VideoSplit, read_split

NAMED = 3


class VideoBatch(TypedDict, total=False):
    """A micro batch of videos and captions, on the CPU; `frames` with `n_frames`, and `text`, only where they are read.

    frames: uint8 [B, F, 3, S, S]. n_frames: int64 [B], the frames that are not padding. text: int64 [B, W].
    video_id, caption_id: int64 [B], places in the split. broken: always empty, since a split is cut to what is usable.
    """

    frames: torch.Tensor
    n_frames: torch.Tensor
    text: torch.Tensor
    video_id: torch.Tensor
    caption_id: torch.Tensor
    broken: list[str]


def open_frame_store(recipe: Recipe, size: int | None = None) -> FrameStore:
    """The recipe's frame store; UserError where it is not named, or is of another number of frames or `size`, which is
    the image tower's unless given."""
    video = recipe.video_settings
    if video.frame_store is None:
        raise UserError("video.frame_store is not set: write one with tools/make_shards.py --kind video")
    return FrameStore(video.frame_store, size=size or recipe.model.image.image_size, frames=video.frames)


def open_split(address: str, recipe: Recipe, usable: Collection[str], reasons: dict[str, str]) -> VideoSplit:
    """The split behind `address` without the videos that are not `usable`.

    UserError when these are more than data.max_broken_share; it names some, with what `reasons` say.
    """
    split = read_split(address, recipe.video_settings.annotations)
    gone = [name for name in split.video_ids if name not in usable]
    if len(gone) > recipe.data.max_broken_share * len(split.video_ids):
        named = ", ".join(f"{name} ({reasons.get(name, 'not decoded or extracted')})" for name in gone[:NAMED])
        raise UserError(
            f"{len(gone)} of {len(split.video_ids)} videos of {address} cannot be used: {named}; more than "
            f"data.max_broken_share {recipe.data.max_broken_share} allows"
        )
    return split.without(gone) if gone else split


def word_tokenizer(tower: TextTowerConfig, words: int) -> Tokenizer:
    """The text tower's tokenizer, cut to `words` tokens. UserError where the tower has fewer positions."""
    if words > tower.context_length:
        raise UserError(f"video.words is {words}, but the text tower has context_length {tower.context_length}")
    return build_tokenizer(tower.model_copy(update={"context_length": words}))


class VideoRows:
    """What the order of an epoch is made from: videos in place of images, all in one shard.

    counts: int64 [V], captions of each video. shard: int64 [V], zeros, since the frame store is read in any order.
    checksums: of each video's frames, where there is a frame store.
    """

    def __init__(self, split: VideoSplit, frames: FrameStore | None) -> None:
        self.split, self.counts = split, split.counts
        self.checksums = None if frames is None else [frames.checksums.get(name) for name in split.video_ids]
        self.shard = np.zeros(len(split.video_ids), dtype=np.int64)
        # A frame store is read by video: none is lost without its name.
        self.damage: list[str] = []
        self.lost = 0

    def describe(self) -> str:
        """One line for the log."""
        return f"{len(self.split.video_ids):,} videos with {len(self.split.captions):,} captions"


class VideoLoader(EpochLoader):
    """An EpochLoader of videos, whose captions are all at hand."""

    source: VideoRows

    def fingerprint(self) -> dict[str, Any]:
        """As above, and checksums of all videos' and captions' names and texts, and of all frames that are read."""
        found = {**super().fingerprint(), "videos and captions (checksum)": self.source.split.checksum()}
        if self.source.checksums is None:
            return found
        frames = hashlib.sha256(json.dumps(self.source.checksums).encode("ascii")).hexdigest()[:16]
        return {**found, "frames (checksum)": frames}


class VideoBatches(Dataset):
    """Rows -> VideoBatch, in the worker."""

    def __init__(self, split: VideoSplit, frames: FrameStore | None, tokenizer: Tokenizer):
        self.split, self.frames, self.tokenizer = split, frames, tokenizer
        # captions_of[start[v] : start[v + 1]] are the captions of video v.
        self.captions_of = np.argsort(split.video_of_caption, kind="stable")
        self.start = np.concatenate([[0], np.cumsum(split.counts)])

    def __getitem__(self, rows: Rows) -> VideoBatch:
        captions = self.captions_of[self.start[rows.image] + rows.caption]
        batch: VideoBatch = {
            "video_id": torch.from_numpy(rows.image),
            "caption_id": torch.from_numpy(captions),
            "broken": [],
        }
        if rows.pixels:
            assert self.frames is not None  # only where the store has all frames is there none
            batch["frames"], batch["n_frames"] = read_frames(self.frames, self.split, rows.image)
        if rows.text:
            batch["text"] = self.tokenizer([self.split.captions[caption] for caption in captions])
        return batch


def read_frames(frames: FrameStore, split: VideoSplit, videos: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [B, F, 3, S, S] and int64 [B] of the videos at these places; one that comes twice is read once."""
    unique, inverse = np.unique(videos, return_inverse=True)
    clips, counts = zip(*(frames[split.video_ids[video]] for video in unique.tolist()), strict=True)
    places = torch.from_numpy(inverse)
    return torch.stack(clips)[places], torch.tensor(counts)[places]


@dataclass(frozen=True)
class VideoEvaluationSet:
    """Videos 0..V-1 and captions 0..C-1 in the CSV's order; caption c belongs to video `video_of_text[c]`."""

    split: VideoSplit
    n_frames: torch.Tensor
    frames: FrameStore
    _videos: Dataset
    _texts: Dataset

    @property
    def video_of_text(self) -> torch.Tensor:
        """int64 [C]."""
        return torch.from_numpy(self.split.video_of_caption)

    def video_batches(self, rank: int, world: int, batch: int, workers: int = 0) -> Batches:
        """This rank's videos as (numbers int64 [B], uint8 [B, F, 3, S, S]), as in EvaluationSet.image_batches."""
        return dealt_batches(self._videos, len(self.split.video_ids), rank, world, batch, workers)

    def text_batches(self, rank: int, world: int, batch: int, workers: int = 0) -> Batches:
        """This rank's captions as (numbers int64 [B], int64 [B, W])."""
        return dealt_batches(self._texts, len(self.split.captions), rank, world, batch, workers)

    def read_videos(self, numbers: list[int], batch: int, workers: int = 0) -> Batches:
        """These videos as (numbers int64 [B], uint8 [B, F, 3, S, S]), in this order."""
        return listed_batches(self._videos, numbers, batch, workers)

    def read_texts(self, numbers: list[int], batch: int, workers: int = 0) -> Batches:
        """These captions as (numbers int64 [B], int64 [B, W]), in this order."""
        return listed_batches(self._texts, numbers, batch, workers)


def load_video_set(
    address: str, recipe: Recipe, tokenizer: Tokenizer | None = None, size: int | None = None
) -> VideoEvaluationSet:
    """The videos of a split CSV that the recipe's frame store holds; tokenizer and frame size are the
    student's unless given.

    Raises:
        UserError: nothing readable is there, or too many videos are not in the frame store.
    """
    frames = open_frame_store(recipe, size)
    split = open_split(address, recipe, frames.places, frames.skipped)
    tokenizer = tokenizer or word_tokenizer(recipe.model.text, recipe.video_settings.words)
    n_frames = torch.tensor([len(frames.places[name][2]) for name in split.video_ids])
    return VideoEvaluationSet(split, n_frames, frames, _Videos(frames, split), _Captions(split, tokenizer))


class _Videos(Dataset):
    """Numbers of videos [B] -> uint8 [B, F, 3, S, S]."""

    def __init__(self, frames: FrameStore, split: VideoSplit):
        self.frames, self.split = frames, split

    def __getitem__(self, numbers: list[int]) -> torch.Tensor:
        return read_frames(self.frames, self.split, np.asarray(numbers))[0]


class _Captions(Dataset):
    """Numbers of captions [B] -> int64 [B, W]."""

    def __init__(self, split: VideoSplit, tokenizer: Tokenizer):
        self.split, self.tokenizer = split, tokenizer

    def __getitem__(self, numbers: list[int]) -> torch.Tensor:
        return self.tokenizer([self.split.captions[number] for number in numbers])
