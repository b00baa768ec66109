"""What a run is evaluated by: retrieval between captions and images, or captions and videos."""

from __future__ import annotations

from typing import Any

import torch

from convclip.data.evaluation_set import load_evaluation_set
from convclip.data.tokenizers import build_tokenizer
from convclip.data.transforms import EvalTransform
from convclip.evaluation.embedding import Encode, evaluate
from convclip.evaluation.report import format_table
from convclip.schema import Recipe
from convclip.video.clip_loader import load_video_set
from convclip.video.video_evaluation import evaluate_videos, format_video_table, start_is_lost


class ImageEvaluation:
    """Retrieval on an image-text set."""

    def __init__(self, recipe: Recipe, address: str) -> None:
        transform = EvalTransform(recipe.model.image.image_size)
        self.recipe = recipe
        self.dataset = load_evaluation_set(address, recipe.data, transform, build_tokenizer(recipe.model.text))

    def figures(self, encode: Encode, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """What eval.jsonl gets; the same on every rank."""
        batch, workers = self.recipe.evaluation.batch, self.recipe.data.workers
        return evaluate(encode, self.dataset, self.recipe.model.image, device, dtype, batch, workers)

    def table(self, figures: dict[str, Any]) -> str:
        """What the log gets."""
        return format_table(figures)

    def start(self, encode: Encode, device: torch.device, dtype: torch.dtype) -> dict[str, Any] | None:
        """Figures to report before the first step, if any."""
        return None

    def start_problem(self, figures: dict[str, Any]) -> str | None:
        """What the figures of the start say of a run that is bound to fail."""
        return None


class VideoEvaluation(ImageEvaluation):
    """Retrieval on a split of videos; before the first step also by the zero-shot mean pool, the gate."""

    def __init__(self, recipe: Recipe, address: str) -> None:
        self.recipe = recipe
        self.dataset = load_video_set(address, recipe)

    def figures(
        self, encode: Encode, device: torch.device, dtype: torch.dtype, zero_shot: bool = False
    ) -> dict[str, Any]:
        """As ImageEvaluation.figures."""
        recipe = self.recipe
        batch, workers = max(1, recipe.evaluation.batch // recipe.video.frames), recipe.data.workers
        return evaluate_videos(encode, self.dataset, recipe.model.image, device, dtype, batch, workers, zero_shot)

    def table(self, figures: dict[str, Any]) -> str:
        """As ImageEvaluation.table."""
        return format_video_table(figures)

    def start(self, encode: Encode, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """Recalls through the untrained aggregation, and of the mean pool."""
        return self.figures(encode, device, dtype, zero_shot=True)

    def start_problem(self, figures: dict[str, Any]) -> str | None:
        """As ImageEvaluation.start_problem."""
        if not start_is_lost(figures):
            return None
        return (
            "gate: recall through the aggregation starts far below the zero-shot mean pool's: the pretrained alignment "
            "is lost at the start; set video.temporal_init=identity"
        )


def open_evaluation(recipe: Recipe, address: str) -> ImageEvaluation:
    """The evaluation that a recipe needs, on the data behind an address. Errors: UserError."""
    return ImageEvaluation(recipe, address) if recipe.video is None else VideoEvaluation(recipe, address)
