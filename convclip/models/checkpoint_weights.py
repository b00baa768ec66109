"""What a checkpoint holds of the run and of the model, read without DeepSpeed, for any ZeRO stage and number of ranks.

`convclip.engine.zero.checkpoint` writes checkpoints, says what lies where, and gives an engine its state back.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from convclip.config import first_problem, load_recipe
from convclip.documents import parse_yaml
from convclip.files import write_text
from convclip.models.checkpoint_files import LOCKED, TensorFile, advice
from convclip.schema import Recipe, UserError

FORMAT = 2
# Format 1, of convclip 0.1.0, has no run, locked, recipe and data in its state, and no checksums.
CHECKED_FORMAT = 2
MAX_STATE_BYTES = 16 * 2**20
# A rank's tensors: of its shard n, `n/master` are the fp32 weights and `n/ema` is their moving average.
MASTER, EMA = "master", "ema"
STEP_FOLDER = re.compile(r"step-(\d{8,12})")
# How often a reader looks again for the checkpoint that a pointer names: a run that saves moves on.
LOOKS = 4
# Fields of a recipe that name files, which may lie elsewhere later.
PLACES = ("pretrained", "tokenizer", "model", "annotations", "frame_store", "teachers")


@dataclass
class RunState:
    """Where a run stands, live: optimizer steps done, the stage of the unfreeze schedule, the best figures so far; and
    what its engine is. A checkpoint's state.json holds it.

    `run` identifies the run, `locked` the file of locked weights that its checkpoints belong to, `recipe` is its recipe
    as YAML, and `data` says what its training stream was made from. `batch_norm` is the recipe's
    `freezing.batch_norm` ("auto" for None, "" before there was one). `losses` are those of the last steps, means over
    ranks, to see what an event does to the loss.
    """

    step: int
    stage: int
    world_size: int
    zero_stage: int
    precision: str
    best: dict[str, float] = field(default_factory=dict)
    format: int = FORMAT
    run: str = ""
    locked: str = ""
    recipe: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    batch_norm: str = ""
    losses: list[float] = field(default_factory=list)

    def take_best(self, recalls: Mapping[str, float]) -> bool:
        """Whether these standard recalls have the highest mean R@1 so far; they are `best` then."""
        first = [value for key, value in recalls.items() if key.endswith("_r1")]
        score = sum(first) / len(first)
        if score <= self.best.get("mean_r1", -1.0):
            return False
        self.best = {"mean_r1": score, "step": self.step, **recalls}
        return True

    def origin(self, rank: int) -> dict[str, Any] | None:
        """What the file of a rank says that it belongs to; None where it says nothing."""
        return {"run": self.run, "step": self.step, "rank": rank} if self.format >= CHECKED_FORMAT else None


def read_state(path: str | Path) -> RunState:
    """The `state.json` of a checkpoint folder; UserError where it is no checkpoint of a known format."""
    file = Path(path) / "state.json"
    try:
        if file.stat().st_size > MAX_STATE_BYTES:
            raise ValueError(f"{file.name} has more than {MAX_STATE_BYTES} bytes")
        values = json.loads(file.read_text(encoding="utf-8"))
        found = values.get("format") if isinstance(values, dict) else None
        if isinstance(found, int) and found not in (1, FORMAT):
            raise UserError(f"{path} has checkpoint format {found}, this convclip reads 1 to {FORMAT}: use a newer one")
        state = RunState(**values)
        _check_types(state)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not a convclip checkpoint: {error}; {advice(Path(path))}") from None
    return state


def write_state(path: Path, state: RunState) -> None:
    """Write the `state.json` of a checkpoint folder, whole or not at all. Errors: CannotWrite."""
    write_text(path / "state.json", json.dumps(asdict(state), indent=1))


def read_weights(path: str | Path, ema: bool = False) -> dict[str, Tensor]:
    """Full fp32 weights and buffers of a checkpoint, by name, put together from all ranks' pieces on the CPU.

    Works for any ZeRO stage and world size, without DeepSpeed. `ema`: what trains is its moving average instead; the
    buffers are the same. Errors: UserError names a missing or damaged file, one of another step or run, and one with
    values that are not finite; and a checkpoint without a moving average.
    """
    path = Path(path)
    state = read_state(path)
    locked = TensorFile(path.parent / LOCKED, {"identity": state.locked} if state.locked else None)
    weights = {key: locked.get(key) for key in locked.keys}
    trained: dict[str, Tensor] = {}
    filled: dict[str, int] = {}
    for number in range(1 if state.zero_stage == 0 else state.world_size):
        file = TensorFile(path / rank_file(number), state.origin(number))
        if ema and f"0/{EMA}" not in file.keys:
            raise UserError(
                f"{path} has no moving average of its weights (--ema, ema=True): it was trained without "
                "optim.ema_decay; leave --ema out"
            )
        try:
            _put_together(file, EMA if ema else MASTER, trained, filled)
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
            raise file.wrong_layout(error) from None
        if number == 0:
            buffers = [key for key in file.keys if key.startswith("buffer/")]
            weights.update({key.removeprefix("buffer/"): file.get(key) for key in buffers})
    short = [name for name, tensor in trained.items() if filled[name] != tensor.numel()]
    if short:
        raise UserError(f"{path} does not hold all of {short[0]}: {advice(path)}")
    return {**weights, **trained}


def trained_names(path: str | Path) -> set[str]:
    """Names of the parameters that train in the stage of a checkpoint. Errors: UserError as `read_weights`."""
    file = TensorFile(Path(path) / rank_file(0), read_state(path).origin(0))
    try:
        return set(file.layout["shapes"])
    except (KeyError, TypeError) as error:
        raise file.wrong_layout(error) from None


def load_weights(model: nn.Module, path: str | Path, ema: bool = False) -> None:
    """Load a checkpoint's fp32 weights into `model`, with `ema` their moving average.

    Errors: UserError as `read_weights`, and one that names the keys when it is another model's.
    """
    expected = model.state_dict()
    found = read_weights(path, ema)
    # The reference head of head alignment serves training alone: a model without one is none the worse.
    weights = {n: value for n, value in found.items() if n in expected or not n.startswith("reference.")}
    problems = [f"{name} is missing" for name in expected if name not in weights]
    problems += [f"{name} is not in this model" for name in weights if name not in expected]
    problems += [
        f"{name} is {tuple(weights[name].shape)} there, {tuple(value.shape)} here"
        for name, value in expected.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if problems:
        raise UserError(
            f"{path} is a checkpoint of another model: {'; '.join(problems[:3])} ({len(problems)} differences)"
        )
    model.load_state_dict(weights)


def load_from(model: nn.Module, place: str | Path, ema: bool = False) -> tuple[Path, RunState]:
    """Load the weights (`ema`: their moving average) of the checkpoint meant by `place`; its path and state.

    A run that trains meanwhile may remove a checkpoint while it is read: the one that the run names then is taken.
    """
    for look in range(LOOKS):
        path = checkpoint_path(place)
        try:
            load_weights(model, path, ema)
            return path, read_state(path)
        except UserError:
            if look == LOOKS - 1 or (path.exists() and checkpoint_path(place) == path):
                raise
    raise AssertionError("the last look returns or raises")


def recipe_of(checkpoint: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the folder of the checkpoint's run, under these overrides.

    Errors: UserError where it cannot be read, or has another model than the checkpoint was trained with. Places of
    files may differ: a run that was moved finds its tokenizer elsewhere.
    """
    file = checkpoint.parent.parent / "recipe.yaml"
    found = load_recipe(file)
    try:
        trained = read_state(checkpoint).recipe
    except UserError:
        # Gone, as a run that trains removes it, or damaged: whoever loads the weights finds that.
        trained = ""
    if trained:
        source = f"the recipe in {checkpoint}/state.json"
        try:
            before = Recipe.model_validate(parse_yaml(trained, source))
        except ValidationError as error:
            raise UserError(f"{source} is damaged ({first_problem(error, Recipe)}): {advice(checkpoint)}") from None
        then, now = _model_of(before), _model_of(found)
        differ = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
        if differ:
            key = differ[0]
            raise UserError(
                f"{file} has {key} {now.get(key)}, {checkpoint.name} was trained with {then.get(key)}: put it back, "
                "or say what you want changed with --set"
            )
    return load_recipe(file, overrides) if overrides else found


def _model_of(recipe: Recipe) -> dict[str, Any]:
    """What makes the model and its pictures, `model.a.b: value`, without the places of files."""
    values = recipe.model_dump(mode="json", by_alias=True)
    waiting: list[tuple[str, Any]] = [(section, values.get(section)) for section in ("model", "video")]
    flat: dict[str, Any] = {}
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(f"{place}.{key}", inner) for key, inner in value.items()]
        elif place.rpartition(".")[2] not in PLACES:
            flat[place] = value
    return flat


def checkpoint_path(place: str | Path) -> Path:
    """The checkpoint meant by `place`: a checkpoint folder, or a run folder (its `best`, else its `latest`)."""
    # `step-00000012`, said within checkpoints/, has its recipe two folders above.
    place = Path(place).absolute()
    # Not Path.is_file, which raises for a name that is too long.
    if os.path.isfile(place / "state.json"):
        return place
    for pointer in ("best", "latest"):
        if os.path.isfile(place / pointer):
            found = read_pointer(place, pointer)
            if found is None:
                names = ", ".join(path.name for path in whole_checkpoints(place)) or "none is there"
                raise UserError(f"{place / pointer} does not name a checkpoint: give one of checkpoints/ ({names})")
            return found
    raise UserError(f"{place} holds no checkpoint: give a run's folder, or one of its checkpoints/step-XXXXXXXX")


def read_pointer(run_folder: Path, name: str) -> Path | None:
    """The checkpoint that `latest` or `best` names; None where the pointer is lost or unreadable."""
    try:
        with open(run_folder / name, "rb") as file:
            text = file.read(200).decode("ascii").strip()
    except (OSError, ValueError):
        return None
    folder, _, step = text.partition("/")
    return run_folder / text if folder == "checkpoints" and STEP_FOLDER.fullmatch(step) else None


def best_checkpoint(run_folder: Path, state: RunState) -> Path | None:
    """The checkpoint that is the run's best by `state`; None where that knows of none, or it is not there."""
    step = state.best.get("step")
    path = None if step is None else run_folder / "checkpoints" / f"step-{int(step):08d}"
    return path if path is not None and path.is_dir() else None


def step_folders(run_folder: Path) -> list[Path]:
    """Folders of a run's checkpoints, whole or not, by step."""
    found = [path for path in (run_folder / "checkpoints").glob("step-*") if STEP_FOLDER.fullmatch(path.name)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def whole_checkpoints(run_folder: Path) -> list[Path]:
    """Those that can be read as far as their names and their state tell, by step."""
    return [path for path in step_folders(run_folder) if is_whole(path)]


def is_whole(path: Path) -> bool:
    """Whether a checkpoint's state can be read and all its files are there."""
    try:
        state = read_state(path)
    except UserError:
        return False
    return all((path / rank_file(number)).is_file() for number in range(state.world_size))


def rank_file(number: int) -> str:
    """File name of one rank's part of a checkpoint."""
    return f"rank-{number:05d}.safetensors"


def _put_together(file: TensorFile, what: str, trained: dict[str, Tensor], filled: dict[str, int]) -> None:
    """Lay a rank's pieces of what trains (MASTER or EMA) into `trained`; `filled` counts the values of each."""
    shapes = file.layout["shapes"]
    for index, pieces in enumerate(file.layout["shards"]):
        flat = file.get(f"{index}/{what}").view(-1)
        for name, start, offset, length in pieces:
            if name not in trained:
                trained[name], filled[name] = torch.empty(shapes[name]), 0
            trained[name].view(-1)[start : start + length] = flat[offset : offset + length]
            filled[name] += length


def _check_types(state: RunState) -> None:
    """ValueError names the first field of another type, or of a value that cannot be."""
    example = RunState(0, 0, 1, 0, "")
    for known in fields(RunState):
        value, wanted = getattr(state, known.name), type(getattr(example, known.name))
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise ValueError(f"its {known.name} is a {type(value).__name__}, not a {wanted.__name__}")
    if min(state.step, state.stage) < 0 or not 1 <= state.world_size <= 10**6 or state.zero_stage not in range(4):
        raise ValueError("its step, stage, world_size or zero_stage cannot be")
    figures = list(state.best.values())
    if not all(isinstance(x, int | float) and math.isfinite(x) for x in figures) or (
        figures and "step" not in state.best
    ):
        raise ValueError("its best figures are not numbers")
