"""The runs of a sweep: one after another in one process start, over one feature store and one evaluation set.

    SWEEP/sweep.json      what all runs share: a folder of another sweep is refused
    SWEEP/features.h5     the store
    SWEEP/runs/…/         a run's folder for each point, and its result.json once it is done

A run is the one that launch/train.py makes of the same settings, to the last digit, but keeps no weights: they would be
gigabytes, and are made again from the best settings. One that was killed starts again.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import dtype as TorchDtype

from convclip.config import UserError, first_problem, load_recipe
from convclip.distributed import on_main, world_size
from convclip.documents import parse_json, read_text
from convclip.engine.meters import Diverged
from convclip.engine.stored.extraction import expected_store
from convclip.engine.stored.frozen import FrozenWork
from convclip.engine.stored.frozen_retrieval import FrozenRetrieval
from convclip.engine.zero.ds_config import load_ds_config, precision, resolve_ds_config
from convclip.features.identity import flat, identity_difference
from convclip.features.reader import FeatureStore
from convclip.files import CannotWrite, remove_folder, write_text, writing
from convclip.run import open_task, train_recipe
from convclip.schema import Features, Recipe
from convclip.sweep.points import Point

# Fields that matter only at unfreeze events, which a sweep leaves out.
OF_EVENTS = ("freezing.unfreeze", "freezing.new_lr_scale", "freezing.new_warmup_steps")
# What a store's identity does not come from. A field that is missing here costs time; one too many is refused later,
# when its run opens the store.
NOT_STORED = {
    *("name", "description", "optim", "loss", "batch", "evaluation", "checkpoint", "log_every", "max_bad_steps"),
    *("activation_checkpointing", "epochs", "max_steps"),
}


@dataclass
class Result:
    """What came of a point: `best` of its run, with step and mean_r1, or why there is none."""

    settings: dict[str, Any]
    folder: str
    best: dict[str, Any] = field(default_factory=dict)
    failed: str = ""
    seconds: float = 0.0
    # Whether it was there before.
    kept: bool = False


@dataclass(frozen=True)
class Sweep:
    """What the runs of a sweep share. `base`: the recipe without what is swept, with its unfreeze events."""

    base: Recipe
    ds_config: str
    folder: Path
    epochs: int | None = None

    @property
    def store(self) -> Path:
        """The feature store: the recipe's own, where it names one."""
        return Path(self.base.features.store or self.folder / "features.h5")

    @property
    def dtype(self) -> TorchDtype:
        """What the runs compute in. Errors: UserError of the ds_config."""
        return precision(resolve_ds_config(load_ds_config(self.ds_config), self.base, world_size()))

    def swept(self, recipe: Recipe) -> Recipe:
        """The recipe of a run: stored, without events, and for the sweep's epochs. Errors: UserError."""
        recipe = open_task(recipe).recipe
        features = Features(mode="store", store=str(self.store), views=recipe.features.views)
        changed: dict[str, Any] = {
            "features": features,
            "freezing": recipe.freezing.model_copy(update={"unfreeze": ()}),
        }
        if self.epochs is not None:
            changed["epochs"] = self.epochs
        try:
            # Checked anew: what a live run does may do nothing in one from a store.
            return Recipe.model_validate(recipe.model_copy(update=changed).model_dump(by_alias=True))
        except ValidationError as error:
            raise UserError(f"recipe {recipe.name}, from a store: {first_problem(error, Recipe)}") from None


def check_points(sweep: Sweep, points: list[Point], recipes: list[Recipe]) -> FrozenWork:
    """What of the recipe is stored. Errors: UserError, before any work, where a point cannot share it."""
    for recipe in [sweep.base, *recipes]:
        if recipe.task != "image_text":
            raise UserError(f"recipe {recipe.name} is for videos: a sweep is of image-text recipes")
        if not recipe.evaluation.every_epochs:
            raise UserError("evaluation.every_epochs is 0, and a sweep ranks by evaluations: set it to 1 or more")
    keys = {key for point in points for key, _ in point.settings}
    for key in keys:
        if any(key == name or key.startswith(f"{name}.") for name in OF_EVENTS):
            raise UserError(f"--set {key} matters at unfreeze events, which a sweep leaves out: give it one value")
        if sweep.epochs is not None and key == "epochs":
            raise UserError("--epochs and --set epochs=… both set the epochs: give one of them")
    base = sweep.swept(sweep.base)
    if base.features.view_count == 1 and any(key.startswith("data.crop_scale") for key in keys):
        raise UserError(
            "--set data.crop_scale changes nothing where an image has one view: set features.views to 2 or more"
        )
    work, wanted = _identity(base, sweep.dtype)
    seen = {_stored_part(base)}
    for point, recipe in zip(points, recipes, strict=True):
        if recipe.features != sweep.base.features:
            raise UserError(f"{point.label}: a sweep has one feature store, so `features` takes one value")
        run = sweep.swept(recipe)
        if _stored_part(run) in seen:
            continue
        seen.add(_stored_part(run))
        difference = identity_difference(wanted, _identity(run, sweep.dtype)[1])
        if difference is not None:
            raise UserError(f"{point.label}: the runs of a sweep share one feature store, {difference}: leave it out")
    return work


def _identity(recipe: Recipe, dtype: TorchDtype) -> tuple[FrozenWork, dict[str, Any]]:
    return expected_store(recipe, open_task(recipe).initial_model()[0], dtype)


def _stored_part(recipe: Recipe) -> str:
    return recipe.model_dump_json(exclude=NOT_STORED)


def open_folder(sweep: Sweep) -> None:
    """Make `sweep.folder` this sweep's, on the main rank. Errors: UserError where it holds anything else."""
    path = sweep.folder / "sweep.json"
    base = sweep.base.model_dump(mode="json", by_alias=True, exclude={"features": {"store"}})
    config = load_ds_config(sweep.ds_config)
    shared = {"recipe": base, "epochs": sweep.epochs, "world": world_size(), "ds_config": config}
    if not path.exists():
        others = [file.name for file in sweep.folder.iterdir() if file.suffix not in (".lock", ".part")]
        if others:
            raise UserError(f"--output_dir {sweep.folder} holds {others[0]} and no sweep: name a new folder")
        write_text(path, json.dumps(shared, indent=1) + "\n", "--output_dir")
        return
    found = parse_json(read_text(path, str(path)), str(path))
    then, now = flat(found if isinstance(found, dict) else {}), flat(json.loads(json.dumps(shared)))
    for key in sorted(then.keys() | now.keys()):
        if then.get(key) != now.get(key):
            raise UserError(
                f"--output_dir {sweep.folder} holds another sweep: {key} was {then.get(key)}, is {now.get(key)}; name "
                "a new folder"
            )


def fill_store(sweep: Sweep) -> None:
    """Extract the store on all ranks, or what is missing of it. Errors: UserError."""
    recipe = sweep.swept(sweep.base)
    if not on_main(sweep.store.exists):
        if sweep.base.features.mode == "store":
            raise UserError(f"features.store {sweep.store} is not there: make it with tools/extract_features.py")
        open_task(recipe).extract(sweep.store, sweep.dtype)
    expected = _identity(recipe, sweep.dtype)[1]
    on_main(lambda: FeatureStore(sweep.store, expected) and None)


def run_points(
    sweep: Sweep, points: list[Point], recipes: list[Recipe], work: FrozenWork, report: Callable[[Result], None]
) -> list[Result]:
    """Run what is not there yet; each result is reported as it comes. On all ranks; silent. Errors: UserError."""
    evaluations: dict[str, FrozenRetrieval] = {}
    results = []
    # It would say of each run that diverges which steps were skipped; so does the run's own log.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # What is there by now stays: the collections below need not walk it.
    gc.freeze()
    with open(os.devnull, "w") as nowhere:
        for point, recipe in zip(points, recipes, strict=True):
            run, folder = sweep.swept(recipe), sweep.folder / "runs" / point.name
            result = on_main(functools.partial(_found, run, folder))
            if result is None:
                result = Result(dict(point.settings), str(folder))
                with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                    _run(sweep, run, folder, result, _shared_evaluation(evaluations, run, work))
                # Models and engines refer to themselves: without this, those of several runs would wait in memory.
                gc.collect()
            results.append(result)
            report(result)
    return results


def _shared_evaluation(evaluations: dict[str, FrozenRetrieval], recipe: Recipe, work: FrozenWork) -> FrozenRetrieval:
    """The evaluation that all recipes share which read and score alike. The frozen towers are those of the store."""
    key = json.dumps([recipe.model_dump(mode="json", include={"data", "evaluation"}), recipe.model.text.model_dump()])
    if key not in evaluations:
        assert recipe.data.val is not None  # the command line asks for it
        evaluations[key] = FrozenRetrieval(recipe, recipe.data.val, work)
    return evaluations[key]


def _run(sweep: Sweep, recipe: Recipe, folder: Path, result: Result, evaluation: FrozenRetrieval) -> None:
    """Train one point; `result` gets what came of it."""
    started = time.perf_counter()
    try:
        summary = train_recipe(recipe, sweep.ds_config, folder, shared=evaluation)
        result.best = summary["best"]
        result.failed = "" if result.best else "the loss was not finite at any evaluation"
    except CannotWrite:
        raise
    except Diverged as error:
        result.failed = str(error)
    except UserError as error:
        if world_size() > 1:
            # It may be of this rank alone, and the others would wait for it.
            raise
        # Of this point, such as a batch larger than the data. It may be mended from outside: it is tried again.
        result.failed = str(error)
        return
    result.seconds = time.perf_counter() - started
    on_main(lambda: write_text(folder / "result.json", json.dumps(asdict(result), indent=1) + "\n", "--output_dir"))


def _found(recipe: Recipe, folder: Path) -> Result | None:
    """The result of a finished run; None where it has to run, and then nothing is there. Errors: UserError."""
    path = folder / "result.json"
    if not path.is_file():
        if (folder / "latest").exists():
            raise UserError(f"{folder} holds a run that is not of this sweep: move it away")
        with writing(folder, "--output_dir"):
            remove_folder(folder)
            folder.mkdir(parents=True)
        return None
    then = load_recipe(folder / "recipe.yaml")
    if then.model_copy(update={"features": recipe.features}) != recipe:
        raise UserError(f"{folder} holds a run of other settings, by its recipe.yaml: move it away")
    found = parse_json(read_text(path, str(path)), str(path))
    try:
        return Result(**{**found, "kept": True})
    except TypeError:
        raise UserError(f"{path} is no result of a sweep: remove it, and the run is made again") from None
