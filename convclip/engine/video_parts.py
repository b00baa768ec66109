"""The data stream of a video recipe and what makes a step's inputs of it."""

from __future__ import annotations

from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator

from convclip.data.features import FeatureStore
from convclip.data.loader import EpochLoader
from convclip.data.msrvtt import VideoSplit
from convclip.data.video_loader import VideoBatches, VideoRows, open_frame_store, open_split, word_tokenizer
from convclip.distributed import rank, world_size
from convclip.engine.video_extraction import towers_identity, towers_work
from convclip.engine.video_inputs import (
    STUDENT_FRAMES,
    LiveTeacher,
    StoredTeacher,
    VideoSource,
    VideoTeacher,
)
from convclip.models.xclip_teacher import load_xclip
from convclip.schema import Recipe, UserError


def open_video_inputs(
    recipe: Recipe, device: torch.device, dtype: torch.dtype, store_path: str | Path | None
) -> tuple[EpochLoader, VideoSource]:
    """The loader and the source; `store_path` holds what the locked towers make. Errors: UserError.

    A run whose frames all come from the store needs no frame store.
    """
    if recipe.data.train is None:
        raise UserError("data.train is not set: name the split's CSV with --train_data")
    store, frames = None, None
    if store_path is not None:
        store = FeatureStore(store_path, towers_identity(recipe, towers_work(recipe), dtype))
    live = [path for path in recipe.video.teachers if not path.endswith(".h5")]
    reads_frames = store is None or STUDENT_FRAMES not in store or bool(recipe.freezing.unfreeze) or bool(live)
    if reads_frames:
        frames = open_frame_store(recipe)
        usable, reasons = frames.places, frames.skipped
    else:
        usable, reasons = set(store.ids(STUDENT_FRAMES)), {}
    split = open_split(recipe.data.train, recipe, usable, reasons)
    tokenizer = word_tokenizer(recipe.model.text, recipe.video.words)
    loader = EpochLoader(
        VideoRows(split),
        VideoBatches(split, frames, tokenizer),
        recipe.data,
        recipe.batch,
        rank(),
        world_size(),
        recipe.seed,
        pin_memory=get_accelerator().device_name() != "cpu",
    )
    return loader, VideoSource(recipe, device, dtype, split, open_teachers(recipe, split, device), store)


def open_teachers(recipe: Recipe, split: VideoSplit, device: torch.device) -> list[VideoTeacher]:
    """The recipe's teachers; UserError where there is none but a loss that needs one, or one does not fit."""
    video = recipe.video
    if not video.teachers and any(video.weights[1:]):
        raise UserError(
            "video.teachers is not set: name a store of tools/extract_features.py --kind xclip (.h5) or an X-CLIP "
            "checkpoint, or train without a teacher by video.weights=[1, 0, 0]"
        )
    return [_open_teacher(path, recipe, split, device) for path in video.teachers]


def _open_teacher(path: str, recipe: Recipe, split: VideoSplit, device: torch.device) -> VideoTeacher:
    video = recipe.video
    if path.endswith(".h5"):
        expected = {"kind": "xclip", "frames": video.frames, "words": video.words}
        return StoredTeacher(FeatureStore(path, expected), split, device)
    teacher = load_xclip(path)
    size, side = teacher.size, recipe.model.image.image_size
    if (size.frames, size.words, size.image_size) != (video.frames, video.words, side):
        raise UserError(
            f"teacher {path} takes {size.frames} frames of {size.image_size} pixels and {size.words} words, the recipe "
            f"has {video.frames} of {side} and {video.words}: extract its features into a store of its own"
        )
    if recipe.model.text.tokenizer != "open_clip":
        raise UserError(f"teacher {path} reads open_clip's tokens, the student others: extract its features")
    return LiveTeacher(teacher, device)
