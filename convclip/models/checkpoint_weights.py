"""What a checkpoint holds of the model, read without DeepSpeed, for any ZeRO stage and number of ranks.

`convclip.engine.zero.checkpoint` writes checkpoints, says what lies where, and gives an engine its state back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from convclip.schema import UserError

FORMAT = 1


@dataclass
class RunState:
    """Where a run stands, live: optimizer steps done, the stage of the unfreeze schedule, the best figures so far; and
    what its engine is. A checkpoint's state.json holds it."""

    step: int
    stage: int
    world_size: int
    zero_stage: int
    precision: str
    best: dict[str, float] = field(default_factory=dict)
    format: int = FORMAT

    def take_best(self, recalls: Mapping[str, float]) -> bool:
        """Whether these standard recalls have the highest mean R@1 so far; they are `best` then."""
        first = [value for key, value in recalls.items() if key.endswith("_r1")]
        score = sum(first) / len(first)
        if score <= self.best.get("mean_r1", -1.0):
            return False
        self.best = {"mean_r1": score, "step": self.step, **recalls}
        return True


def read_state(path: str | Path) -> RunState:
    """The `state.json` of a checkpoint folder; UserError where it is no checkpoint of this format."""
    try:
        state = RunState(**json.loads((Path(path) / "state.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not a convclip checkpoint: {error}") from None
    if state.format != FORMAT:
        raise UserError(f"{path} has checkpoint format {state.format}, this convclip reads {FORMAT}")
    return state


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Full fp32 weights and buffers of a checkpoint, by name, put together from all ranks' pieces on the CPU.

    Works for any ZeRO stage and world size, without DeepSpeed. Errors: UserError names a missing or damaged file.
    """
    path = Path(path)
    state = read_state(path)
    with open_tensors(path.parent / "locked.safetensors") as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    trained: dict[str, Tensor] = {}
    for number in range(1 if state.zero_stage == 0 else state.world_size):
        with open_tensors(path / rank_file(number)) as file:
            layout = json.loads(file.metadata()["layout"])
            for index, pieces in enumerate(layout["shards"]):
                flat = file.get_tensor(f"{index}/master").view(-1)
                for name, start, offset, length in pieces:
                    if name not in trained:
                        trained[name] = torch.empty(layout["shapes"][name])
                    trained[name].view(-1)[start : start + length] = flat[offset : offset + length]
            if number == 0:
                keys = [key for key in file.keys() if key.startswith("buffer/")]  # noqa: SIM118
                weights.update({key.removeprefix("buffer/"): file.get_tensor(key) for key in keys})
    return {**weights, **trained}


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a checkpoint's fp32 weights into `model`; UserError names the keys when it is another model's."""
    expected = model.state_dict()
    # The reference head of head alignment serves training alone: a model without one is none the worse.
    weights = {n: value for n, value in read_weights(path).items() if n in expected or not n.startswith("reference.")}
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


def checkpoint_path(place: str | Path) -> Path:
    """The checkpoint meant by `place`: a checkpoint folder, or a run folder (its `best`, else its `latest`)."""
    place = Path(place)
    if (place / "state.json").is_file():
        return place
    for pointer in ("best", "latest"):
        if (place / pointer).is_file():
            return place / (place / pointer).read_text().strip()
    raise UserError(f"{place} holds no checkpoint: give a run's folder, or one of its checkpoints/step-XXXXXXXX")


def rank_file(number: int) -> str:
    """File name of one rank's part of a checkpoint."""
    return f"rank-{number:05d}.safetensors"


def open_tensors(path: Path) -> Any:
    """A handle on a checkpoint's safetensors file; UserError where it is missing or damaged."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is missing or damaged ({error}): resume from another checkpoint") from None
