"""What a kind of training provides: its model, loader, inputs, objective and evaluation. Image-text is here.

The trainer and the plan know a `Task` and never ask which one it is; `convclip.run.open_task` chooses. No DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from convclip.data.evaluation_set import load_evaluation_set
from convclip.data.loader import EpochLoader, TrainLoader
from convclip.data.micro_batches import Batch
from convclip.data.tokenizers import build_tokenizer
from convclip.data.transforms import EvalTransform, TrainTransform
from convclip.devices import on_accelerator
from convclip.distributed import rank, world_size
from convclip.engine.inputs import ImageTextSource, Reads
from convclip.engine.objective import ImageTextObjective, Losses
from convclip.engine.plan.memory import longest_captions
from convclip.engine.stored.extraction import Extraction, expected_store, extract, verify
from convclip.engine.stored.frozen import FrozenWork, recipe_views
from convclip.evaluation.embedding import Encode, Encoder, evaluate
from convclip.evaluation.report import format_table
from convclip.evaluation.zero_shot import load_zero_shot_set, zero_shot_accuracy
from convclip.features.reader import FeatureStore
from convclip.models.dual_tower import Cut, DualTower, Outputs, build_model
from convclip.models.reference_head import load_reference_head
from convclip.models.teacher import Teacher
from convclip.models.weights import LoadReport, load_pretrained
from convclip.schema import Recipe, UserError


class Source(Protocol):
    """Turns the loader's batches into a step's inputs."""

    def reads(self, frozen: Cut, trainable: Set[str], step: int) -> Reads:
        """What a step reads from the store, in a stage that trains `trainable`, all of it above the cut `frozen`."""

    def inputs(self, batch: Any, epoch: int, reads: Reads) -> Any:
        """A batch of the loader on the device, as the towers and the objective take it."""

    @property
    def store(self) -> FeatureStore | None:
        """What frozen work is read from, if anything."""


class Objective(Protocol):
    """The losses of a step."""

    def __call__(self, outputs: Outputs, batches: Sequence[Any], step: int) -> Losses:
        """Losses by name, `total` among them; rows of `outputs` are those of `batches` in turn."""

    def warnings(self, row: Mapping[str, Any]) -> list[str]:
        """What a row of metrics.jsonl says of a run gone wrong."""


class Evaluation(Protocol):
    """What a run is scored by."""

    def checksum(self) -> str:
        """What identifies the images or videos and captions that it scores."""

    def figures(self, encode: Encode, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """What eval.jsonl gets; the same on every rank."""

    def table(self, figures: dict[str, Any]) -> str:
        """What the log gets."""

    def start(self, encode: Encode, device: torch.device, dtype: torch.dtype) -> dict[str, Any] | None:
        """Figures to report before the first step, if any."""

    def start_problem(self, figures: dict[str, Any]) -> str | None:
        """What the figures of the start say of a run that is bound to fail."""


class Parts(NamedTuple):
    """The loader, the source that turns its batches into inputs, and the losses."""

    loader: EpochLoader
    source: Source
    objective: Objective


class Task(Protocol):
    """A kind of training, for one recipe."""

    recipe: Recipe
    # Whether the plan and the trial step know what a step of it takes.
    estimates_memory: bool

    def build_model(self) -> DualTower:
        """The model with random weights; works under `torch.device("meta")`."""

    def initial_model(self) -> tuple[DualTower, LoadReport]:
        """The model as a run starts with it, in fp32 on the CPU, and what of it is new. Errors: UserError."""

    def open(self, model: DualTower, device: torch.device, dtype: torch.dtype, store: str | Path | None) -> Parts:
        """The parts of a run of `model`, which is only looked at. `store`: a feature file. Errors: UserError."""

    def evaluation(self, address: str) -> Evaluation:
        """The evaluation on the data behind `address`. Errors: UserError."""

    def zero_shot(self, folder: Path) -> ZeroShot:
        """Zero-shot classification of a folder (see `convclip.evaluation.zero_shot`). Errors: UserError."""

    def extract(self, path: Path, dtype: torch.dtype) -> None:
        """Store what the locked towers make of the training data, on all ranks. Errors: UserError."""

    def verify(self, path: Path, dtype: torch.dtype) -> dict[str, float]:
        """Compute a sample of a finished store again; largest difference by array. Errors: UserError."""

    def extract_teacher(self, path: Path, checkpoint: str, precision: str) -> None:
        """Store a video teacher's features. Errors: UserError where the task has no such teacher."""

    def trial_batch(self, source: Any, rows: int) -> Batch:
        """A made-up batch as the loader gives it; only where `estimates_memory`."""


class ImageTextTask:
    """Images and captions."""

    estimates_memory = True

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def build_model(self) -> DualTower:
        """As Task."""
        return build_model(self.recipe.model)

    def initial_model(self) -> tuple[DualTower, LoadReport]:
        """As Task; with a reference head where the recipe aligns heads."""
        torch.manual_seed(self.recipe.seed)
        model = self.build_model()
        report = load_pretrained(model, self.recipe.model)
        if self.recipe.head_alignment is not None:
            has_norm = model.visual.map_cut < len(model.visual.layers())
            model.reference = load_reference_head(self.recipe.model, has_norm)
        return model, report

    def open(self, model: DualTower, device: torch.device, dtype: torch.dtype, store: str | Path | None) -> Parts:
        """As Task."""
        recipe, work, opened, teacher, stored = self.recipe, FrozenWork(0, False, False), None, None, None
        if store is not None:
            work, expected = expected_store(recipe, model, dtype)
            opened = FeatureStore(store, expected)
        elif recipe.teacher is not None:
            teacher = Teacher(recipe.teacher).to(device, dtype)
        if opened is not None and work.boundary:
            stored = frozenset((np.asarray(opened.ids("image_map")) // (recipe.features.view_count or 1)).tolist())
        loader = TrainLoader(
            recipe.data,
            recipe.batch,
            TrainTransform.of(recipe.data, recipe.model.image),
            build_tokenizer(recipe.model.text),
            rank(),
            world_size(),
            recipe.seed,
            pin_memory=on_accelerator(),
            views=recipe_views(recipe),
            teacher_tokenizer=teacher.tokenizer if teacher else None,
            stored=stored,
        )
        source = ImageTextSource(recipe, device, dtype, teacher, opened, work)
        return Parts(loader, source, ImageTextObjective(recipe, source.teacher_scale))

    def evaluation(self, address: str) -> Retrieval:
        """As Task."""
        return Retrieval(self.recipe, address)

    def zero_shot(self, folder: Path) -> ZeroShot:
        """As Task."""
        return ZeroShot(self.recipe, folder)

    def extract(self, path: Path, dtype: torch.dtype) -> None:
        """As Task."""
        extract(Extraction(self.recipe, self.initial_model()[0], dtype), path)

    def verify(self, path: Path, dtype: torch.dtype) -> dict[str, float]:
        """As Task."""
        return verify(Extraction(self.recipe, self.initial_model()[0], dtype), path)

    def extract_teacher(self, path: Path, checkpoint: str, precision: str) -> None:
        """Refused: an image recipe's teacher is a section of its own."""
        raise UserError(f"--kind xclip: recipe {self.recipe.name} is not for videos; use one with a video section")

    def trial_batch(self, source: ImageTextSource, rows: int) -> Batch:
        """As Task."""
        ids = source.first_stored()
        tokenizer = source.teacher.tokenizer if source.teacher is not None else None
        return made_up_batch(self.recipe, rows, ids, tokenizer)


class Retrieval:
    """Retrieval between the images and captions of a set."""

    def __init__(self, recipe: Recipe, address: str) -> None:
        transform = EvalTransform(recipe.model.image.image_size, recipe.model.image.interpolation)
        self.recipe, self._explained = recipe, False
        self.dataset = load_evaluation_set(address, recipe.data, transform, build_tokenizer(recipe.model.text))

    def checksum(self) -> str:
        """As Evaluation."""
        return self.dataset.checksum()

    def figures(self, encode: Encode, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """As Evaluation."""
        return evaluate(encoder_of(self.recipe, encode, device, dtype), self.dataset)

    def table(self, figures: dict[str, Any]) -> str:
        """As Evaluation; the first one says what rowwise means."""
        explained, self._explained = self._explained, True
        return format_table(figures, explain=not explained)

    def start(self, encode: Encode, device: torch.device, dtype: torch.dtype) -> dict[str, Any] | None:
        """None: training may start from random heads, of which retrieval says nothing."""
        return None

    def start_problem(self, figures: dict[str, Any]) -> str | None:
        """None: there are no figures."""
        return None


class ZeroShot:
    """Zero-shot classification of a folder of images by class."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.classes = recipe, load_zero_shot_set(folder)

    def figures(self, encode: Encode, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """As Evaluation."""
        recipe, image = self.recipe, self.recipe.model.image
        transform, tokenizer = EvalTransform(image.image_size, image.interpolation), build_tokenizer(recipe.model.text)
        encoder = encoder_of(recipe, encode, device, dtype)
        return zero_shot_accuracy(encoder, self.classes, transform, tokenizer, recipe.data.max_image_pixels)

    def table(self, figures: dict[str, Any]) -> str:
        """As Evaluation."""
        return (
            f"zero-shot, {figures['classes']} classes, {figures['images']} images: "
            f"top-1 {figures['top1']:.2f} top-5 {figures['top5']:.2f}"
        )


def encoder_of(recipe: Recipe, encode: Encode, device: torch.device, dtype: torch.dtype) -> Encoder:
    """How `recipe` says that an evaluation runs a model."""
    return Encoder(encode, recipe.model.image, device, dtype, recipe.evaluation.batch, recipe.data.workers)


def made_up_batch(
    recipe: Recipe,
    rows: int,
    ids: Mapping[str, int],
    teacher_tokenizer: Callable[[list[str]], torch.Tensor] | None = None,
) -> Batch:
    """A batch as the loader gives it: noise, and captions as long as the context.

    `ids` are the image_id and caption_id of its rows where a feature store must hold them.
    """
    generator, side = torch.Generator().manual_seed(0), recipe.model.image.image_size
    batch: Batch = {
        "image": torch.randint(0, 256, (rows, 3, side, side), dtype=torch.uint8, generator=generator),
        "text": longest_captions(recipe, rows),
        "image_id": torch.full((rows,), ids["image_id"]) if "image_id" in ids else torch.arange(rows),
        "caption_id": torch.full((rows,), ids["caption_id"]) if "caption_id" in ids else torch.arange(rows),
        "broken": [],
    }
    if teacher_tokenizer is not None:
        batch["teacher_text"] = teacher_tokenizer(["made up"]).repeat(rows, 1)
    return batch
