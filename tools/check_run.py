"""Read a run's folder whole and say what is wrong with it.

    python tools/check_run.py RUN

Looked at are recipe.yaml and ds_config.json, every tensor of every checkpoint (weights put together as a resume and an
evaluation do, and finite; the optimizer's state finite too), `latest` and `best`, the rows of metrics.jsonl and
eval.jsonl, and what a killed run left (*.part; a run that is training has some too). A stored features.h5 is for
tools/check_data.py. Exit code 0: nothing was found, 1: something was, the table says what, 2: it is no run's folder.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from convclip.command_line import Findings, run
from convclip.config import load_recipe
from convclip.engine.zero.ds_config import load_ds_config
from convclip.models.checkpoint_weights import RunState, open_tensors, rank_file, read_state, read_weights
from convclip.schema import UserError

LOGS = ("metrics.jsonl", "eval.jsonl")
# Any one of these makes a folder a run's.
PARTS = ("recipe.yaml", "checkpoints", *LOGS)


def main(arguments: list[str] | None = None) -> int:
    """Check the run that the command line names; the exit code is the module's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", type=Path, help="the --output_dir of a run")
    return run("check_run", check, parser.parse_args(arguments), "; nothing was changed")


def check(options: argparse.Namespace) -> int:
    """Print what was read and the table; 0 when nothing was found, else 1."""
    folder: Path = options.run
    if not any((folder / name).exists() for name in PARTS):
        raise UserError(f"{folder} is not a run folder: name the --output_dir of a run")
    findings = Findings()
    for name, read in (("recipe.yaml", load_recipe), ("ds_config.json", load_ds_config)):
        try:
            read(folder / name)
        except UserError as error:
            findings.add(f"{name} cannot be read", str(error))
    states = check_checkpoints(folder, findings)
    check_pointers(folder, states, findings)
    counts = {name: check_rows(folder / name, findings) for name in LOGS}
    for name, steps in counts.items():
        if states and not steps:
            findings.add("no rows are there", f"{folder / name}, though the run has a checkpoint of step {max(states)}")
    for path in leftovers(folder):
        findings.add("left by a killed run, or being written", str(path))
    rows = ", ".join(f"{len(steps):,} rows of {name}" for name, steps in counts.items())
    print(f"{folder}: {len(states):,} checkpoints ({', '.join(map(str, states)) or 'none'}), {rows}")
    return findings.report()


def check_checkpoints(folder: Path, findings: Findings) -> dict[int, RunState]:
    """Read every checkpoint; the states of those that are whole, by step."""
    states: dict[int, RunState] = {}
    shapes: dict[str, torch.Size] = {}
    paths = [path for path in sorted((folder / "checkpoints").glob("step-*")) if not path.name.endswith(".part")]
    for path in tqdm(paths, desc="checkpoints", delay=1):
        try:
            state = read_state(path)
            weights = read_weights(path)
            broken = [name for name, tensor in weights.items() if not is_finite(tensor)]
            broken += [f"{rank_file(rank)} {key}" for rank, key in unsound_tensors(path, state)]
        except (UserError, OSError, ValueError, KeyError) as error:
            findings.add(
                "checkpoint cannot be read", str(error) if isinstance(error, UserError) else f"{path}: {error}"
            )
            continue
        if broken:
            findings.add("values are not finite", f"{path}: {broken[0]} and {len(broken) - 1} more", len(broken))
        if path.name != f"step-{state.step:08d}":
            findings.add("checkpoint has another step than its name", f"{path}: its state says {state.step}")
        found = {name: tensor.shape for name, tensor in weights.items()}
        if shapes and found != shapes:
            other = sorted(name for name in found.keys() | shapes.keys() if found.get(name) != shapes.get(name))
            findings.add("checkpoint is of another model than the one before", f"{path}: {other[0]} differs")
        shapes = found
        states[state.step] = state
    return states


def unsound_tensors(path: Path, state: RunState) -> Iterator[tuple[int, str]]:
    """(rank, name) of each tensor of a checkpoint that is not finite, of what every rank wrote: optimizer state, too."""
    for rank in range(state.world_size):
        with open_tensors(path / rank_file(rank)) as file:
            for key in file.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
                if not is_finite(file.get_tensor(key)) and not key.endswith("/master"):
                    yield rank, key


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether every value is; integers are."""
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def check_pointers(folder: Path, states: dict[int, RunState], findings: Findings) -> None:
    """`latest` names the newest checkpoint, and `best` the one that the newest one's state says."""
    if not states:
        return
    newest = max(states)
    expected = {"latest": newest, "best": states[newest].best.get("step")}
    for name, step in expected.items():
        path = folder / name
        try:
            text = path.read_text(encoding="utf-8").strip() if path.exists() else None
        except (OSError, UnicodeDecodeError):
            text = "what cannot be read"
        wanted = None if step is None else f"checkpoints/step-{int(step):08d}"
        if text != wanted:
            findings.add("pointer is wrong", f"{path} names {text or 'nothing'}, not {wanted or 'nothing'}")
        elif step is not None and int(step) not in states:
            findings.add("pointer is wrong", f"{path} names {text}, which is not there or cannot be read")


def check_rows(path: Path, findings: Findings) -> list[int]:
    """The steps of the sound rows of a log, ascending where nothing is wrong with it."""
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    except OSError as error:
        findings.add("rows cannot be read", f"{path}: {error.strerror}")
        return []
    if lines.pop():
        findings.add("last row is cut", f"{path} line {len(lines) + 1}: a kill came between, a resume drops it")
    steps: list[int] = []
    last: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        place = f"{path} line {number}"
        row = row_of(line)
        if row is None:
            findings.add("row is no object with a step", place)
            continue
        # An unfreeze event stands at the step of a row.
        kind, step = str(row.get("event", "")), row["step"]
        if step <= last.get(kind, -1):
            findings.add("steps of rows do not ascend", f"{place}: step {step} comes behind step {last[kind]}")
        last[kind] = step
        wrong = [key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
        if wrong:
            findings.add("row has a figure that is not finite", f"{place}, step {step}: {', '.join(wrong)}")
        steps.append(step)
    return steps


def row_of(line: bytes) -> dict[str, Any] | None:
    """The object of a line, with a step; None where it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    good = isinstance(row, dict) and isinstance(row.get("step"), int) and not isinstance(row["step"], bool)
    return row if good else None


def leftovers(folder: Path) -> list[Path]:
    """What was being written; of a folder only its name."""
    found = sorted(path for path in folder.rglob("*.part*") if path.suffix == ".part")
    return [path for path in found if not any(above in found for above in path.parents)]


if __name__ == "__main__":
    sys.exit(main())
