"""A run's folder: what is in it before training, who may write into it, and which run a resume continues."""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import replace
from pathlib import Path
from typing import Any

from convclip.config import UserError
from convclip.distributed import on_main, world_size
from convclip.engine.resume_rules import about_engine, about_length, about_recipe, refuse_changed_recipe, saved_recipe
from convclip.engine.zero.checkpoint import remove_old
from convclip.engine.zero.ds_config import precision, zero_stage
from convclip.engine.zero.staged_engine import Start
from convclip.files import write_text, writing
from convclip.models.checkpoint_weights import (
    RunState,
    best_checkpoint,
    is_whole,
    read_pointer,
    read_state,
    step_folders,
    whole_checkpoints,
)
from convclip.schema import Recipe

LOGS = ("metrics.jsonl", "eval.jsonl")


def open_run_folder(folder: Path, recipe: Recipe, ds_config: dict[str, Any], resume: str) -> Start:
    """Where the run in `folder` begins, on all ranks; `take_up` then makes the folder that run's.

    `resume` is `never` (a new run; the folder may not hold another), `auto` (go on from `latest`, or the newest whole
    checkpoint where that is lost) or the path of a checkpoint. Nothing in the folder is changed. Errors: UserError
    when the folder holds a run that this would overwrite, or when the recipe differs in a field that may not from what
    is being resumed. Another world size, ZeRO stage or precision is a note.
    """
    return on_main(lambda: _open(folder, recipe, ds_config, resume))


def take_up(folder: Path, recipe: Recipe, ds_config: dict[str, Any], start: Start) -> None:
    """Make the folder, on all ranks, that of the run which goes on from `start`: only now is anything in it replaced.

    Both pointers come to say what the checkpoint says: a kill may have come between them, and it may be an older one.
    That is done before rows are dropped: killed in between, the run goes on from here all the same.
    """
    on_main(lambda: _take_up(folder, recipe, ds_config, start))
    if start.is_own:
        # What a kill kept the last save from removing.
        remove_old(folder, recipe.checkpoint.keep_last, later=False)


def _take_up(folder: Path, recipe: Recipe, ds_config: dict[str, Any], start: Start) -> None:
    write_text(folder / "recipe.yaml", recipe.to_yaml(), "--output_dir")
    write_text(folder / "ds_config.json", json.dumps(ds_config, indent=2) + "\n", "--output_dir")
    if start.checkpoint is not None and start.is_own:
        write_text(folder / "latest", f"checkpoints/{start.checkpoint.name}\n")
        best = best_checkpoint(folder, start.state)
        if best is not None:
            write_text(folder / "best", f"checkpoints/{best.name}\n")
        else:
            with writing(folder / "best"):
                (folder / "best").unlink(missing_ok=True)
    for name in LOGS:
        text = _rows_until(folder / name, start)
        if text is not None:
            write_text(folder / name, text)


def refuse_other_data(start: Start, recipe: Recipe, data: dict[str, Any], accepted: bool) -> None:
    """Take down what the training stream is made from; UserError where it differs from the checkpoint's, unless that
    is `accepted`, and where the run is longer already than its recipe says now."""
    # A checkpoint of 0.1.0 does not say.
    then = start.state.data if start.checkpoint is not None else {}
    different = [f"{key} {then[key]}, now {data.get(key)}" for key in then if then[key] != data.get(key)]
    if different and not accepted:
        raise UserError(
            f"cannot resume, {start.checkpoint} was trained on other data: {'; '.join(different)}; give the same, or "
            "add --resume_other_data: epochs, events and warm-up then follow the new steps per epoch"
        )
    if different:
        start.notes.append(f"other training data than before (--resume_other_data): {'; '.join(different)}")
    start.state.data = data
    if start.saved is not None:
        start.notes += about_length(start.saved, recipe, start.state.step, data["steps per epoch"])


def _open(folder: Path, recipe: Recipe, ds_config: dict[str, Any], resume: str) -> Start:
    start = Start(RunState(0, 0, world_size(), zero_stage(ds_config), str(precision(ds_config))))
    steps = step_folders(folder)
    occupied = bool(steps) or os.path.lexists(folder / "latest")
    if resume == "auto":
        start.checkpoint = _newest(folder, occupied, start.notes)
    elif resume == "never" and occupied:
        raise UserError(
            f"--output_dir {folder} holds another run: add --resume auto to go on with it, or name a new folder"
        )
    elif resume != "never":
        # Absolute: `step-00000012`, said within checkpoints/, has its recipe two folders above.
        start.checkpoint = Path(resume).absolute()
    if start.checkpoint is not None:
        beside = os.path.realpath(start.checkpoint.parent)
        start.is_own = beside == os.path.realpath(folder / "checkpoints")
        then = read_state(start.checkpoint)
        if not start.is_own and occupied:
            raise UserError(
                f"--output_dir {folder} holds another run than --resume {start.checkpoint}: name a new folder"
            )
        saved = saved_recipe(start.checkpoint, then)
        refuse_changed_recipe(start.checkpoint, then, saved, recipe)
        start.notes += [*about_recipe(saved, recipe, then.step), *about_engine(then, start.state)]
        start.saved, now = saved, start.state
        start.state = replace(
            then, format=now.format, world_size=now.world_size, zero_stage=now.zero_stage, precision=now.precision
        )
    state = start.state
    if not start.is_own or not state.run:
        state.run = secrets.token_hex(8)
    state.recipe = recipe.to_yaml()
    if not start.is_own:
        # Figures of a checkpoint that is not in this folder: the best of this folder is still to come.
        state.best = {}
    elif state.best and best_checkpoint(folder, state) is None:
        start.notes.append(f"the best checkpoint, of step {state.best['step']}, is gone: the best is sought anew")
        state.best = {}
    for name in LOGS:
        _rows_until(folder / name, start)
    with writing(folder, "--output_dir"):
        folder.mkdir(parents=True, exist_ok=True)
    return start


def _newest(folder: Path, occupied: bool, notes: list[str]) -> Path | None:
    """What `auto` goes on from: `latest`, else the newest whole checkpoint; None in a folder without any."""
    if not occupied:
        notes.append(f"--resume auto: {folder} holds no checkpoint, this is a new run")
        return None
    latest = read_pointer(folder, "latest")
    if latest is not None and is_whole(latest):
        return latest
    whole = whole_checkpoints(folder)
    if not whole:
        raise UserError(
            f"--output_dir {folder} has no checkpoint that is whole, though it holds a run: put its files back, or "
            "name a new folder"
        )
    what = "is lost or unreadable" if latest is None else f"names {latest.name}, which is not whole"
    notes.append(f"{folder / 'latest'} {what}: going on from {whole[-1].name}, the newest whole checkpoint")
    return whole[-1]


def _rows_until(path: Path, start: Start) -> str | None:
    """The rows of a log that a run keeps which goes on from `start`, for it writes the later ones again; None: no file.

    An event at that very step comes again, before the next step. A torn last line is what a kill left. What the folder
    has of another run, which came to no checkpoint, goes. Errors: UserError names a line that is no row.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    kept: list[str] = []
    if not start.is_own:
        return ""
    step = start.state.step
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            at, is_unfreeze = int(row["step"]), row.get("event") == "unfreeze"
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            if number == len(lines):
                break
            raise UserError(f"{path}: line {number} is no row of a run: remove that line to go on") from None
        if at < step or (at == step and not is_unfreeze):
            kept.append(line.decode("utf-8") + "\n")
    return "".join(kept)
