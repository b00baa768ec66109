"""Features of videos and captions, once: of an X-CLIP teacher, or of a video student's locked towers.

A teacher's encoder outputs are stored un-normalised in the fp16 they are computed in, so that scores from the store
are the live teacher's. Shapes: V videos, C captions, F frames, W words, D embed width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convclip.data.transforms import normalize
from convclip.devices import PRECISIONS, current_device
from convclip.distributed import is_main, rank, world_size
from convclip.engine.stages.groups import reached_stages
from convclip.engine.stored.extraction import ComputedRows, write_missing
from convclip.engine.stored.frozen import PRECISION_NAMES, WITHOUT_FILES
from convclip.features.layout import ArraySpec, estimate
from convclip.features.reader import state_dict_sha256
from convclip.features.writer import FeatureWriter
from convclip.files import sha256_of
from convclip.models.batch_norm import to_precision
from convclip.schema import AS_BEFORE, Recipe, UserError
from convclip.video.clip_loader import VideoEvaluationSet, load_video_set
from convclip.video.msrvtt import tokenize_captions
from convclip.video.student import VideoStudent
from convclip.video.teachers import (
    CAPTION_CRC32,
    CAPTION_TO_VIDEO,
    N_FRAMES,
    SCORE_ITEM,
    SCORE_PREFIX,
    STUDENT_FRAMES,
    STUDENT_TEXT,
    caption_crc32,
)
from convclip.video.xclip_teacher import XClipTeacher, load_xclip


def extract_towers(recipe: Recipe, model: VideoStudent, path: Path, dtype: torch.dtype) -> None:
    """Store what the recipe's locked towers make of its training videos and captions, on all ranks."""
    data, work = load_video_set(_training_data(recipe), recipe), towers_work(recipe, model)
    settings = {"fps": data.frames.settings.fps, "jpeg_quality": data.frames.settings.quality}
    _write(path, TowersFeatures(recipe, work, data, dtype), {**towers_identity(recipe, work, dtype), **settings})


def extract_xclip(recipe: Recipe, path: Path, checkpoint: str, precision: str) -> None:
    """Store what an X-CLIP teacher makes of the recipe's training data, on all ranks; precision fp32 or fp16."""
    if precision == "bf16":
        raise UserError("--precision bf16: the X-CLIP teacher's encoders run in fp32 or, as the original's, in fp16")
    teacher, video = load_xclip(checkpoint, "fp16" if precision == "fp16" else "fp32"), recipe.video_settings
    size = teacher.size
    if (size.frames, size.words) != (video.frames, video.words):
        raise UserError(
            f"teacher {checkpoint} takes {size.frames} frames and {size.words} words, the recipe "
            f"has {video.frames} and {video.words}: set video.frames={size.frames} and video.words={size.words}"
        )
    data = load_video_set(
        _training_data(recipe), recipe, lambda texts: tokenize_captions(texts, size.words), size.image_size
    )
    identity = {
        "kind": "xclip",
        "teacher": Path(checkpoint).name,
        "teacher_sha256": sha256_of(checkpoint),
        "frames": size.frames,
        "words": size.words,
        "image_size": size.image_size,
        "fps": data.frames.settings.fps,
        "jpeg_quality": data.frames.settings.quality,
        "sampling": "one frame per 1/fps seconds, thinned to linspace(0, n - 1, frames)",
        "transform": "shorter side bicubic, centre crop, CLIP's mean and deviation",
        "tokenizer": "open_clip",
        "precision": PRECISION_NAMES[PRECISIONS[precision]],
    }
    _write(path, XClipFeatures(teacher, data, recipe), identity)


@dataclass(frozen=True)
class TowersWork:
    """The student as a run starts with it, and which of its towers are locked then."""

    model: VideoStudent
    frames: bool
    text: bool


def towers_work(recipe: Recipe, model: VideoStudent) -> TowersWork:
    """What of a video recipe can be stored; UserError where it locks no tower."""
    trainable = reached_stages(model, recipe)[0].trainable
    frames, text = (not any(name.startswith(part) for name in trainable) for part in ("visual.", "text."))
    if not frames and not text:
        raise UserError(f"recipe {recipe.name}: no tower is locked from the start, so there is nothing to store")
    return TowersWork(model, frames, text)


def towers_identity(recipe: Recipe, work: TowersWork, dtype: torch.dtype) -> dict[str, Any]:
    """What a store of the locked towers' features must have been made of."""
    parts = [part for part, is_locked in (("visual.", work.frames), ("text.", work.text)) if is_locked]
    weights = {name: p for name, p in work.model.state_dict().items() if name.startswith(tuple(parts))}
    return {
        "kind": "video towers",
        "model": recipe.model.model_dump_json(exclude=WITHOUT_FILES, context=AS_BEFORE),
        "weights_sha256": state_dict_sha256(weights),
        "frames_stored": work.frames,
        "text_stored": work.text,
        "frames": recipe.video_settings.frames,
        "words": recipe.video_settings.words,
        "mask_padding": recipe.video_settings.mask_padding,
        "precision": PRECISION_NAMES[dtype],
    }


class XClipFeatures:
    """An X-CLIP teacher, and the features it gives for videos and captions."""

    def __init__(self, teacher: XClipTeacher, data: VideoEvaluationSet, recipe: Recipe) -> None:
        self.device = current_device()
        self.teacher, self.data = teacher.to(self.device), data
        self.batch, self.workers = recipe.evaluation.batch, recipe.data.workers
        size, width = teacher.size, teacher.size.embed_dim
        self.arrays = {
            "frame_raw": ArraySpec((size.frames, width), "float16", "activation", "video"),
            "video_out": ArraySpec((width,), "float32", "activation", "video"),
            "n_frames": ArraySpec((), "uint8", "frames", "video"),
            "word_raw": ArraySpec((size.words, width), "float16", "activation", "caption"),
            "eot": ArraySpec((), "uint8", "place", "caption"),
            CAPTION_TO_VIDEO: ArraySpec((), "int32", "place of the video in the sorted ids", "caption"),
            CAPTION_CRC32: ArraySpec((), "int64", "checksum of the text", "caption"),
        }
        self.score = {SCORE_PREFIX + n: p.cpu() for n, p in teacher.score_parameters().items()}
        for name, value in self.score.items():
            self.arrays[name] = ArraySpec(tuple(value.shape), "float32", "parameter", "score")

    def compute(self, kind: str, ids: Sequence[str]) -> Iterator[ComputedRows]:
        """(ids, rows by array) of items of one kind, batch by batch."""
        if kind == "score":
            if len(ids):
                yield ids, {name: value[None] for name, value in self.score.items()}
            return
        yield from (self._videos(ids) if kind == "video" else self._captions(ids))

    @torch.no_grad()
    def _videos(self, ids: Sequence[str]) -> Iterator[ComputedRows]:
        numbers = _numbers(self.data.split.video_ids, ids)
        step = max(1, self.batch // self.teacher.size.frames)
        for items, frames in self.data.read_videos(numbers, step, self.workers):
            counts = self.data.n_frames[items]
            rows = self.teacher.encode_video(frames.to(self.device), counts.to(self.device))
            yield _names(self.data.split.video_ids, items), {**rows, "n_frames": counts.to(torch.uint8)}

    @torch.no_grad()
    def _captions(self, ids: Sequence[str]) -> Iterator[ComputedRows]:
        split = self.data.split
        place = np.argsort(np.argsort(np.array(split.video_ids)))[split.video_of_caption]
        for items, tokens in self.data.read_texts(_numbers(split.caption_ids, ids), self.batch, self.workers):
            rows = self.teacher.encode_text(tokens.to(self.device))
            rows = {"word_raw": rows["word_raw"], "eot": rows["eot"].to(torch.uint8)}
            rows[CAPTION_TO_VIDEO] = torch.from_numpy(place[items.numpy()]).int()
            rows[CAPTION_CRC32] = caption_crc32([split.captions[item] for item in items.tolist()])
            yield _names(split.caption_ids, items), rows


class TowersFeatures:
    """A student's locked towers, and the features they give: un-normalised, in the run's precision."""

    def __init__(self, recipe: Recipe, work: TowersWork, data: VideoEvaluationSet, dtype: torch.dtype) -> None:
        self.recipe, self.data, self.dtype = recipe, data, dtype
        self.device = current_device()
        self.model = to_precision(work.model, dtype, self.device).requires_grad_(False).eval()
        width, name = work.model.text.embed_dim, PRECISION_NAMES[dtype]
        self.arrays: dict[str, ArraySpec] = {}
        if work.frames:
            self.arrays[STUDENT_FRAMES] = ArraySpec((recipe.video_settings.frames, width), name, "activation", "video")
            self.arrays[N_FRAMES] = ArraySpec((), "uint8", "frames", "video")
        if work.text:
            self.arrays[STUDENT_TEXT] = ArraySpec((width,), name, "activation", "caption")
            self.arrays[CAPTION_CRC32] = ArraySpec((), "int64", "checksum of the text", "caption")

    @torch.no_grad()
    def compute(self, kind: str, ids: Sequence[str]) -> Iterator[ComputedRows]:
        """As XClipFeatures.compute."""
        split, batch, workers = self.data.split, self.recipe.evaluation.batch, self.recipe.data.workers
        if kind == "caption":
            for items, tokens in self.data.read_texts(_numbers(split.caption_ids, ids), batch, workers):
                rows = {STUDENT_TEXT: self.model.encode_text(tokens.to(self.device)).to(self.dtype)}
                rows[CAPTION_CRC32] = caption_crc32([split.captions[item] for item in items.tolist()])
                yield _names(split.caption_ids, items), rows
            return
        tower = self.recipe.model.image
        step = max(1, batch // self.recipe.video_settings.frames)
        for items, frames in self.data.read_videos(_numbers(split.video_ids, ids), step, workers):
            counts = self.data.n_frames[items]
            pixels = normalize(frames.to(self.device).flatten(0, 1), tower.mean, tower.std, self.dtype)
            features = self.model.encode_frames(pixels.unflatten(0, frames.shape[:2]), counts.to(self.device))
            rows = {STUDENT_FRAMES: features.to(self.dtype), N_FRAMES: counts.to(torch.uint8)}
            yield _names(split.video_ids, items), rows


def _write(path: Path, work: XClipFeatures | TowersFeatures, identity: dict[str, Any]) -> None:
    """Write a store on all ranks; what an earlier, killed run has done is not done again."""
    split = work.data.split
    ids: dict[str, list[str]] = {
        "video": list(split.video_ids),
        "caption": list(split.caption_ids),
        "score": [SCORE_ITEM],
    }
    kinds = {spec.item_kind for spec in work.arrays.values()}
    ids = {kind: items for kind, items in ids.items() if kind in kinds}
    counts = {kind: len(items) for kind, items in ids.items()}
    # Ids have one length per kind; captions are by far the most.
    longest = max(len(name) for name in ids["caption" if "caption" in ids else "video"])
    if is_main():
        size = estimate(work.arrays, counts, longest)
        counted = ", ".join(f"{count} {kind}s" for kind, count in counts.items() if kind != "score")
        print(f"{path}: {counted}, {size / 1e6:.2f} MB ({size} bytes) when done", flush=True)
    write_missing(FeatureWriter(path, work.arrays, identity, ids, rank(), world_size()), ids, work.compute)


def _training_data(recipe: Recipe) -> str:
    if recipe.data.train is None:
        raise UserError("data.train is not set: name the split's CSV with --train_data")
    return recipe.data.train


def _numbers(names: Sequence[str], wanted: Sequence[str]) -> list[int]:
    place: dict[str, int] = {name: number for number, name in enumerate(names)}
    return [place[name] for name in wanted]


def _names(names: Sequence[str], numbers: Tensor) -> list[str]:
    return [names[number] for number in numbers.tolist()]
