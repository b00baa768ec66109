"""The data stream of a video recipe and what makes a step's inputs of it."""

from __future__ import annotations

from pathlib import Path

import torch

from convclip.data.loader import EpochLoader
from convclip.distributed import rank, world_size
from convclip.engine.meters import on_accelerator
from convclip.features.reader import FeatureStore
from convclip.schema import Recipe, UserError
from convclip.video.clip_loader import VideoBatches, VideoRows, open_frame_store, open_split, word_tokenizer
from convclip.video.teachers import STUDENT_FRAMES, open_teachers
from convclip.video.video_extraction import towers_identity, towers_work
from convclip.video.video_inputs import VideoSource


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
        pin_memory=on_accelerator(),
    )
    return loader, VideoSource(recipe, device, dtype, split, open_teachers(recipe, split, device), store)
