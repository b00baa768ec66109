"""A run from its recipe, top to bottom: task, parts, trainer, fit; and the evaluation of a finished one."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from convclip.data.workers import plain_worker_errors
from convclip.devices import PRECISIONS, current_device
from convclip.distributed import alike, barrier, gather_objects, is_main, on_main, world_size
from convclip.engine.agreement import refuse_differing, refuse_other_recipe, refuse_unshared, weights_checksum
from convclip.engine.guard import Guard
from convclip.engine.meters import logger
from convclip.engine.plan.plan import make_plan
from convclip.engine.planned_stop import PlannedStop
from convclip.engine.resume_rules import planned_resume
from convclip.engine.task import Evaluation, ImageTextTask, Parts, Task
from convclip.engine.zero.ds_config import precision as precision_of
from convclip.engine.zero.ds_config import zero_stage
from convclip.files import write_text, writing
from convclip.locks import Lock
from convclip.models.batch_norm import synchronised, to_precision
from convclip.models.checkpoint_weights import RunState, checkpoint_path, load_from, read_pointer, recipe_of
from convclip.models.dual_tower import DualTower
from convclip.models.hf_folder import with_encoder
from convclip.schema import Recipe, UserError
from convclip.video.video_task import VideoTask


def open_task(recipe: Recipe) -> Task:
    """The kind of training that `recipe` asks for: the one place where image-text and video part ways."""
    recipe = _whole(recipe)
    return VideoTask(recipe) if recipe.task == "video" else ImageTextTask(recipe)


def _whole(recipe: Recipe) -> Recipe:
    """`recipe` with the configuration of a Hugging Face text encoder, read by the main rank. Errors: UserError."""
    return recipe.model_copy(update={"model": on_main(lambda: with_encoder(recipe.model))})


def plan_recipe(recipe: Recipe, ds_config: Mapping[str, Any] | None = None, world: int = 1) -> dict[str, Any]:
    """What `recipe` will do (see `make_plan`): no data, no weights, no DeepSpeed. Errors: UserError."""
    return make_plan(open_task(recipe), ds_config, world)


def plan_resume(
    recipe: Recipe, ds_config: Mapping[str, Any] | None, world: int, resume: str, folder: str | None
) -> list[str]:
    """What the plan says of a run that would go on from `resume` (a checkpoint, or auto: the latest of `folder`)."""
    if resume == "auto" and folder is None:
        raise UserError("--plan --resume auto needs --output_dir, the run's folder: add it, or name a checkpoint")
    checkpoint = read_pointer(Path(folder or ""), "latest") if resume == "auto" else Path(resume).absolute()
    if checkpoint is None:
        return [f"--resume auto: {folder} names no latest checkpoint, this is a new run"]
    engine = None
    if ds_config is not None:
        engine = RunState(0, 0, world, zero_stage(ds_config), str(precision_of(ds_config)))
    return planned_resume(checkpoint, _whole(recipe), engine)


@plain_worker_errors()
def train_recipe(
    recipe: Recipe,
    ds_config: str | Path,
    folder: str | Path,
    resume: str | Path = "never",
    resume_other_data: bool = False,
    shared: Evaluation | None = None,
    guard: Guard | None = None,
) -> dict[str, Any]:
    """Train `recipe` in this process group and return the summary.

    `resume`: never, auto, or the path of a checkpoint. With `resume_other_data` it may go on with other training data
    than before: epochs, events and warm-up are then counted by the new steps per epoch. `shared` is the evaluation
    on `data.val` of all runs of a sweep; such a run keeps its figures, and no weights. A run with a `guard` may stop
    early, and its summary says why under `stopped`. Errors: UserError.
    """
    folder = Path(folder)
    lock = Lock(folder / ".lock", f"--output_dir {folder}", heartbeat=True)
    try:
        dead = on_main(lambda: _only_run(lock, folder))
        return _train(recipe, ds_config, folder, resume, resume_other_data, lock, dead, shared, guard)
    finally:
        lock.release()


def _only_run(lock: Lock, folder: Path) -> str:
    """Take the lock of a run's folder: a second run at once would mix its files with the first one's. The dead run
    that it is taken from, if any. Errors: UserError."""
    with writing(folder, "--output_dir"):
        folder.mkdir(parents=True, exist_ok=True)
        return lock.acquire().taken_over


def _train(
    recipe: Recipe,
    ds_config: str | Path,
    folder: Path,
    resume: str | Path,
    resume_other_data: bool,
    lock: Lock,
    dead: str,
    shared: Evaluation | None,
    guard: Guard | None,
) -> dict[str, Any]:
    """`train_recipe` in a folder whose `lock` is held, taken from the `dead` run."""
    # Here and not above: --plan and the tools do without DeepSpeed, whose import takes seconds.
    from convclip.engine.run_folder import open_run_folder, refuse_other_data, take_up
    from convclip.engine.trainer import Trainer
    from convclip.engine.zero.ds_config import load_ds_config, precision, resolve_ds_config

    refuse_unshared(folder, "--output_dir")
    given = alike(lambda: load_ds_config(ds_config))
    refuse_other_recipe(recipe, resume=resume, ds_config=given)
    # The run's folder and checkpoints keep it: the text encoder's folder may move.
    recipe = _whole(recipe)
    task = open_task(recipe)
    config = resolve_ds_config(given, recipe, world_size())
    device, dtype = current_device(), precision(config)
    evaluation = shared
    if evaluation is None and recipe.data.val:
        evaluation = task.evaluation(recipe.data.val)
    start = replace(open_run_folder(folder, recipe, config, str(resume)), lock=lock, keeps_weights=shared is None)
    start.stop = PlannedStop(guard)
    if dead:
        start.notes.append(f"the folder was that of a run which is dead: {dead}")
    store: str | Path | None = recipe.features.store
    if recipe.features.mode == "fill":
        store = folder / "features.h5"
        task.extract(store, dtype)
    model, report = task.initial_model()
    parts = task.open(model, device, dtype, store)
    fingerprint = parts.loader.fingerprint()
    refuse_differing(_data_of(parts, model, fingerprint, evaluation))
    alike(lambda: refuse_other_data(start, recipe, fingerprint, resume_other_data))
    if recipe.batch.sync_batch_norm:
        model = synchronised(model)
    if recipe.activation_checkpointing:
        model.set_grad_checkpointing(True)
    trainer = Trainer(task, model, parts, config, evaluation, folder, start)
    take_up(folder, recipe, config, start)
    if start.checkpoint is None and report.new:
        logger.info(f"newly initialised: {', '.join(report.new[:6])}{' …' if len(report.new) > 6 else ''}")
    logger.info(parts.loader.describe())
    summary = trainer.fit()
    # A rank that exits while others still write would close their connections.
    barrier()
    return summary


def _data_of(
    parts: Parts, model: DualTower, fingerprint: Mapping[str, Any], evaluation: Evaluation | None
) -> dict[str, Any]:
    """What a rank has read from its disks before a run, for a comparison of ranks."""
    found = {f"training data, {name}": value for name, value in fingerprint.items()}
    found["weights to start from (checksum)"] = weights_checksum(model)
    if parts.source.store is not None:
        found["feature store (checksum)"] = parts.source.store.checksum()
    if evaluation is not None:
        found["evaluation data (checksum)"] = evaluation.checksum()
    return found


@plain_worker_errors()
def evaluate_checkpoint(
    place: str | Path,
    data: str | Path,
    folder: str | Path,
    precision: str = "fp32",
    overrides: Sequence[str] = (),
    zero_shot: str | Path | None = None,
    ema: bool = False,
) -> dict[str, Any]:
    """Figures of a run's best checkpoint (or the one that `place` is) on `data`, printed and written to eval.jsonl.

    Any ZeRO stage and world size may have trained it. `zero_shot` is a folder of classnames.txt, templates.txt and a
    sub-folder of images for each class. `ema`: of the moving average of its weights (optim.ema_decay).
    Errors: UserError names what is missing or damaged.
    """
    folder, data = Path(folder), str(data)
    on_main(lambda: _open_output(folder))
    # Only the run is fixed here. Its best checkpoint may still change while it trains.
    task = open_task(on_main(lambda: recipe_of(checkpoint_path(place), overrides)))
    classes = task.zero_shot(Path(zero_shot)) if zero_shot is not None else None
    model = task.build_model()
    path, state = _load_alike(model, place, ema)
    dtype, device = PRECISIONS[precision], current_device()
    model = to_precision(model, dtype, device).eval()
    evaluation = task.evaluation(data)
    refuse_differing({"evaluation data (checksum)": evaluation.checksum()})
    figures = evaluation.figures(model, device, dtype)
    table = evaluation.table(figures)
    if classes is not None:
        figures["zero_shot"] = classes.figures(model, device, dtype)
        table += f"\n{classes.table(figures['zero_shot'])}"
    if is_main():
        average = "the moving average of the weights (--ema)\n" if ema else ""
        print(average + _evaluated_as(precision, _precision_name(state.precision), overrides) + table)
    row = {"checkpoint": str(path), "data": data, "precision": precision, "step": state.step, **figures}
    if ema:
        row["weights"] = "ema"
    if overrides:
        row["overrides"] = list(overrides)
    on_main(lambda: write_text(folder / "eval.jsonl", json.dumps(row) + "\n", "--output_dir"))
    return figures


def _precision_name(dtype: str) -> str:
    """`fp32` for the `torch.float32` of a checkpoint."""
    return next((name for name, known in PRECISIONS.items() if str(known) == dtype), dtype)


def _evaluated_as(precision: str, trained: str, overrides: Sequence[str]) -> str:
    """Lines above a table: its precision, the run's where that differs, and the overrides of the run's recipe."""
    lines = [f"evaluated in {precision}"]
    if precision != trained:
        lines[0] += (
            f"; the run computed in {trained}, so its own figures differ a little from these: --precision {trained} "
            "gives the run's"
        )
    if overrides:
        lines.append(f"with the recipe changed by {' '.join(f'--set {override}' for override in overrides)}")
    return "\n".join(lines) + "\n"


def _open_output(folder: Path) -> None:
    """Make the folder for eval.jsonl; CannotWrite before the work, not after it."""
    if (folder / "recipe.yaml").exists():
        raise UserError(f"--output_dir {folder} is a run's folder, whose eval.jsonl this would replace: name another")
    with writing(folder, "--output_dir"):
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "eval.jsonl").is_dir():
            raise IsADirectoryError(f"{folder / 'eval.jsonl'} is a folder")
        with tempfile.TemporaryFile(dir=folder):
            pass


def _load_alike(model: DualTower, place: str | Path, ema: bool) -> tuple[Path, RunState]:
    """Load the same checkpoint on every rank; its path and state. Errors: UserError on all of them."""
    while True:
        found = gather_objects(alike(lambda: load_from(model, place, ema)))
        if len({path for path, _ in found}) == 1:
            return found[0]
