"""A training run from its recipe: seed, build the parts, fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from convclip.data.evaluation_set import load_evaluation_set
from convclip.data.loader import TrainLoader
from convclip.data.tokenizers import build_tokenizer
from convclip.data.transforms import EvalTransform, TrainTransform
from convclip.distributed import rank, world_size
from convclip.engine.ds_config import load_ds_config, resolve_ds_config
from convclip.engine.meters import logger
from convclip.engine.run_folder import open_run_folder
from convclip.engine.trainer import Trainer
from convclip.models import build_model
from convclip.models.weights import load_pretrained
from convclip.schema import Recipe, UserError


def train_recipe(recipe: Recipe, ds_config: str | Path, folder: Path, resume: str = "never") -> dict[str, Any]:
    """Train `recipe` in this process group and return the summary. Errors: UserError, before anything is written
    where the mistake can be seen beforehand."""
    if recipe.teacher or recipe.head_alignment:
        field = "teacher" if recipe.teacher else "head_alignment"
        raise UserError(f"recipe {recipe.name} uses {field}, which cannot be trained yet: add --set {field}=null")
    config = resolve_ds_config(load_ds_config(ds_config), recipe, world_size())
    on_device = get_accelerator().device_name() != "cpu"
    tokenizer = build_tokenizer(recipe.model.text)
    size = recipe.model.image.image_size
    loader = TrainLoader(
        recipe.data,
        recipe.batch,
        TrainTransform(size, recipe.data.crop_scale),
        tokenizer,
        rank(),
        world_size(),
        recipe.seed,
        pin_memory=on_device,
    )
    evaluation_set = None
    if recipe.data.val:
        evaluation_set = load_evaluation_set(recipe.data.val, recipe.data, EvalTransform(size), tokenizer)
    checkpoint = open_run_folder(folder, recipe, config, resume)
    torch.manual_seed(recipe.seed)
    model = build_model(recipe.model)
    report = load_pretrained(model, recipe.model) if checkpoint is None else None
    if recipe.activation_checkpointing:
        model.set_grad_checkpointing(True)
    trainer = Trainer(model, recipe, config, loader, evaluation_set, folder, checkpoint)
    if report is not None and report.new:
        logger.info(f"newly initialised: {', '.join(report.new[:6])}{' …' if len(report.new) > 6 else ''}")
    logger.info(loader.describe())
    return trainer.fit()
