"""Training on videos and captions (TeachCLIP), behind the same `Task` as image-text."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

import torch

from convclip.devices import on_accelerator
from convclip.distributed import rank, world_size
from convclip.engine.task import Parts
from convclip.evaluation.embedding import Encode, Encoder
from convclip.features.reader import FeatureStore
from convclip.models.dual_tower import DualTower, build_model
from convclip.models.weights import LoadReport, load_pretrained
from convclip.schema import Recipe, UserError
from convclip.video.clip_loader import (
    VideoBatches,
    VideoLoader,
    VideoRows,
    load_video_set,
    open_frame_store,
    open_split,
    word_tokenizer,
)
from convclip.video.student import VideoStudent, video_student
from convclip.video.teachers import STUDENT_FRAMES, open_teachers
from convclip.video.video_evaluation import evaluate_videos, format_video_table, start_is_lost
from convclip.video.video_extraction import extract_towers, extract_xclip, towers_identity, towers_work
from convclip.video.video_inputs import VideoSource
from convclip.video.video_objective import VideoObjective


class VideoTask:
    """A student of videos: the recipe's towers with a temporal transformer and frame aggregation."""

    # The plan follows a step of images; what frames and a temporal part need is not in it.
    estimates_memory = False

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def build_model(self) -> VideoStudent:
        """As Task."""
        return video_student(build_model(self.recipe.model), self.recipe.video_settings)

    def initial_model(self) -> tuple[VideoStudent, LoadReport]:
        """As Task; the temporal part starts from the loaded towers."""
        torch.manual_seed(self.recipe.seed)
        towers = build_model(self.recipe.model)
        report = load_pretrained(towers, self.recipe.model)
        model = video_student(towers, self.recipe.video_settings)
        return model, LoadReport(report.new + model.new, report.loaded)

    def open(self, model: DualTower, device: torch.device, dtype: torch.dtype, store: str | Path | None) -> Parts:
        """As Task. A run whose frames all come from the store needs no frame store."""
        recipe, opened, frames = self.recipe, None, None
        usable: Collection[str]
        assert isinstance(model, VideoStudent)  # what `build_model` gives
        if recipe.data.train is None:
            raise UserError("data.train is not set: name the split's CSV with --train_data")
        if store is not None:
            opened = FeatureStore(store, towers_identity(recipe, towers_work(recipe, model), dtype))
        live = any(not path.endswith(".h5") for path in recipe.video_settings.teachers)
        if opened is None or STUDENT_FRAMES not in opened or recipe.freezing.unfreeze or live:
            frames = open_frame_store(recipe)
            usable, reasons = frames.places, frames.skipped
        else:
            usable, reasons = set(opened.ids(STUDENT_FRAMES)), {}
        split = open_split(recipe.data.train, recipe, usable, reasons)
        tokenizer = word_tokenizer(recipe.model.text, recipe.video_settings.words)
        loader = VideoLoader(
            VideoRows(split, frames),
            VideoBatches(split, frames, tokenizer),
            recipe.data,
            recipe.batch,
            rank(),
            world_size(),
            recipe.seed,
            pin_memory=on_accelerator(),
        )
        source = VideoSource(recipe, device, dtype, split, open_teachers(recipe, split, device), opened)
        return Parts(loader, source, VideoObjective(recipe))

    def evaluation(self, address: str) -> VideoRetrieval:
        """As Task."""
        return VideoRetrieval(self.recipe, address)

    def zero_shot(self, folder: Path) -> NoReturn:
        """Refused: classes are of images."""
        raise UserError(f"--zero_shot is for images, and {self.recipe.name} is a video model: leave it out")

    def extract(self, path: Path, dtype: torch.dtype) -> None:
        """As Task."""
        extract_towers(self.recipe, self.initial_model()[0], path, dtype)

    def verify(self, path: Path, dtype: torch.dtype) -> NoReturn:
        """Refused: not built for videos."""
        raise UserError("--verify is for image recipes")

    def extract_teacher(self, path: Path, checkpoint: str, precision: str) -> None:
        """As Task: an X-CLIP teacher's."""
        extract_xclip(self.recipe, path, checkpoint, precision)

    def trial_batch(self, source: Any, rows: int) -> NoReturn:
        """Not made: see `estimates_memory`."""
        raise NotImplementedError


class VideoRetrieval:
    """Retrieval on a split of videos; before the first step also by the zero-shot mean pool, the gate."""

    def __init__(self, recipe: Recipe, address: str) -> None:
        self.recipe = recipe
        self.dataset = load_video_set(address, recipe)

    def checksum(self) -> str:
        """As Evaluation."""
        return self.dataset.split.checksum()

    def figures(
        self, encode: Encode, device: torch.device, dtype: torch.dtype, zero_shot: bool = False
    ) -> dict[str, Any]:
        """As Evaluation; with `zero_shot` also the recalls of the mean pool."""
        recipe = self.recipe
        batch, workers = max(1, recipe.evaluation.batch // recipe.video_settings.frames), recipe.data.workers
        encoder = Encoder(encode, recipe.model.image, device, dtype, batch, workers)
        return evaluate_videos(encoder, self.dataset, zero_shot)

    def table(self, figures: dict[str, Any]) -> str:
        """As Evaluation."""
        return format_video_table(figures)

    def start(self, encode: Encode, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """Recalls through the untrained aggregation, and of the mean pool."""
        return self.figures(encode, device, dtype, zero_shot=True)

    def start_problem(self, figures: dict[str, Any]) -> str | None:
        """As Evaluation."""
        if not start_is_lost(figures):
            return None
        return (
            "gate: recall through the aggregation starts far below the zero-shot mean pool's: the pretrained alignment "
            "is lost at the start; set video.temporal_init=identity"
        )
