"""A run from its recipe: seed, build the parts, fit; and the evaluation of a finished one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from convclip.config import load_recipe
from convclip.data.loader import TrainLoader
from convclip.data.tokenizers import build_tokenizer
from convclip.data.transforms import EvalTransform, TrainTransform
from convclip.distributed import barrier, is_main, rank, world_size
from convclip.engine.evaluations import open_evaluation
from convclip.engine.inputs import InputSource
from convclip.engine.meters import logger, on_accelerator
from convclip.engine.objective import Objective, VideoObjective
from convclip.engine.run_folder import open_run_folder
from convclip.engine.stored.extraction import PRECISIONS, expected_store, initial_model
from convclip.engine.stored.frozen import FrozenWork, recipe_views
from convclip.engine.trainer import Trainer
from convclip.engine.zero.checkpoint import write_text
from convclip.engine.zero.ds_config import load_ds_config, precision, resolve_ds_config
from convclip.evaluation.zero_shot import load_zero_shot_set, zero_shot_accuracy
from convclip.features.reader import FeatureStore
from convclip.models import build_model
from convclip.models.checkpoint_weights import checkpoint_path, load_weights, read_state
from convclip.models.teacher import Teacher
from convclip.schema import Recipe, UserError
from convclip.video.student import with_video_head
from convclip.video.video_extraction import extract_frozen
from convclip.video.video_parts import open_video_inputs


def train_recipe(
    recipe: Recipe, ds_config: str | Path, folder: str | Path, resume: str | Path = "never"
) -> dict[str, Any]:
    """Train `recipe` in this process group and return the summary.

    `resume`: never, auto, or the path of a checkpoint. Errors: UserError.
    """
    folder = Path(folder)
    config = resolve_ds_config(load_ds_config(ds_config), recipe, world_size())
    dtype, device = precision(config), torch.device(get_accelerator().current_device_name())
    evaluation = open_evaluation(recipe, recipe.data.val) if recipe.data.val else None
    checkpoint = open_run_folder(folder, recipe, config, str(resume))
    store = recipe.features.store
    if recipe.features.mode == "fill":
        store = folder / "features.h5"
        extract_frozen(recipe, store, dtype)
    # The one place where image-text and video-text training part ways.
    if recipe.video is None:
        loader, source = open_inputs(recipe, device, dtype, store)
        objective = Objective(recipe, source.teacher_scale)
    else:
        loader, source = open_video_inputs(recipe, device, dtype, store)
        objective = VideoObjective(recipe)
    model, report = initial_model(recipe)
    if recipe.activation_checkpointing:
        model.set_grad_checkpointing(True)
    trainer = Trainer(model, recipe, config, loader, source, objective, evaluation, folder, checkpoint)
    if checkpoint is None and report.new:
        logger.info(f"newly initialised: {', '.join(report.new[:6])}{' …' if len(report.new) > 6 else ''}")
    logger.info(loader.describe())
    summary = trainer.fit()
    # A rank that leaves while others are still writing would take their connections with it.
    barrier()
    return summary


def open_inputs(
    recipe: Recipe, device: torch.device, dtype: torch.dtype, store_path: str | Path | None
) -> tuple[TrainLoader, InputSource]:
    """The data stream, and what makes a step's inputs of it: from the store where there is one, else live."""
    work, store, teacher = FrozenWork(0, False, False), None, None
    if store_path is not None:
        work, expected = expected_store(recipe, dtype)
        store = FeatureStore(store_path, expected)
    elif recipe.teacher is not None:
        teacher = Teacher(recipe.teacher).to(device, dtype)
    stored = None
    if work.boundary:
        stored = frozenset((store.ids("image_map") // recipe.features.view_count).tolist())
    loader = TrainLoader(
        recipe.data,
        recipe.batch,
        TrainTransform(recipe.model.image.image_size, recipe.data.crop_scale),
        build_tokenizer(recipe.model.text),
        rank(),
        world_size(),
        recipe.seed,
        pin_memory=on_accelerator(),
        views=recipe_views(recipe),
        teacher_tokenizer=teacher.tokenizer if teacher else None,
        stored=stored,
    )
    return loader, InputSource(recipe, device, dtype, teacher, store, work)


def evaluate_checkpoint(
    place: str | Path,
    data: str | Path,
    folder: str | Path,
    precision: str = "fp32",
    overrides: Sequence[str] = (),
    zero_shot: str | Path | None = None,
) -> dict[str, Any]:
    """Figures of a run's best checkpoint (or the one that `place` is) on `data`, printed and written to eval.jsonl.

    Any ZeRO stage and world size may have trained it. `zero_shot` is a folder of classnames.txt, templates.txt and a
    sub-folder of pictures for each class. Errors: UserError names what is missing or damaged.
    """
    folder, data = Path(folder), str(data)
    path = checkpoint_path(place)
    recipe = load_recipe(path.parent.parent / "recipe.yaml", overrides)
    if zero_shot is not None and recipe.video is not None:
        raise UserError(f"--zero_shot is for images, and {path} is a video model: leave it out")
    classes = load_zero_shot_set(zero_shot) if zero_shot is not None else None
    model = with_video_head(build_model(recipe.model), recipe.video)
    load_weights(model, path)
    dtype, device = PRECISIONS[precision], torch.device(get_accelerator().current_device_name())
    model = model.to(device, dtype).eval()
    evaluation = open_evaluation(recipe, data)
    figures = evaluation.figures(model, device, dtype)
    table = evaluation.table(figures)
    if classes is not None:
        transform, tokenizer = EvalTransform(recipe.model.image.image_size), build_tokenizer(recipe.model.text)
        settings = (recipe.model.image, device, dtype, recipe.evaluation.batch, recipe.data.workers)
        found = zero_shot_accuracy(model, classes, transform, tokenizer, *settings)
        figures["zero_shot"] = found
        table += f"\nzero-shot, {found['classes']} classes, {found['images']} images: "
        table += f"top-1 {found['top1']:.2f} top-5 {found['top5']:.2f}"
    if is_main():
        print(table)
        row = {"checkpoint": str(path), "data": data, "precision": precision, "step": read_state(path).step, **figures}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / "eval.jsonl", json.dumps(row) + "\n")
        except OSError as error:
            raise UserError(f"--output_dir {folder} cannot be written: {error}") from None
    return figures
