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
import os
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from convclip.command_line import Findings, run
from convclip.config import load_recipe
from convclip.engine.zero.ds_config import load_ds_config
from convclip.models.checkpoint_files import TensorFile
from convclip.models.checkpoint_weights import (
    RunState,
    rank_file,
    read_pointer,
    read_state,
    read_weights,
    recipe_of,
    step_folders,
    step_of,
)
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
    if not any(os.path.lexists(folder / name) for name in PARTS):
        raise UserError(f"{folder} is not a run folder: name the --output_dir of a run")
    findings = Findings()
    for name, read in (("recipe.yaml", load_recipe), ("ds_config.json", load_ds_config)):
        with findings.catching(f"{name} cannot be read"):
            read(folder / name)
    states = check_checkpoints(folder, findings)
    if "recipe.yaml cannot be read" not in findings.counts:
        for path in (path for path in step_folders(folder) if step_of(path) in states):
            with findings.catching("recipe.yaml has another model than a checkpoint"):
                recipe_of(path)
    check_pointers(folder, states, findings)
    counts = {name: check_rows(folder / name, findings) for name in LOGS}
    best = states[max(states)].best.get("step") if states else None
    if best is not None and int(best) not in counts["eval.jsonl"]:
        findings.add("row is missing", f"{folder / 'eval.jsonl'} has none of step {int(best)}, the best one's")
    for path in leftovers(folder):
        findings.add("left by a killed run, or being written", str(path))
    rows = ", ".join(f"{len(steps):,} rows of {name}" for name, steps in counts.items())
    print(f"{folder}: {len(states):,} checkpoints ({', '.join(map(str, states)) or 'none'}), {rows}")
    return findings.report()


def check_checkpoints(folder: Path, findings: Findings) -> dict[int, RunState]:
    """Read every checkpoint; the states of those that can be used, by step."""
    states: dict[int, RunState] = {}
    shapes: dict[str, torch.Size] = {}
    for path in tqdm(step_folders(folder), desc="checkpoints", unit="checkpoint", delay=1):
        state = weights = None
        with findings.catching("checkpoint cannot be read"):
            state = read_state(path)
            if not check_tensors(path, state, findings):
                continue
            weights = read_weights(path)
        if state is None or weights is None:
            continue
        if step_of(path) != state.step:
            findings.add("checkpoint has another step than its name", f"{path}: its state says {state.step}")
            continue
        found = {name: tensor.shape for name, tensor in weights.items()}
        if shapes and found != shapes:
            other = sorted(name for name in found.keys() | shapes.keys() if found.get(name) != shapes.get(name))
            findings.add("checkpoint is of another model than the one before it", f"{path}: {other[0]} differs")
        shapes = found
        states[state.step] = state
    runs = {state.run for state in states.values() if state.run}
    if len(runs) > 1:
        findings.add("checkpoints are of more than one run", f"{folder}: {', '.join(sorted(runs))}")
    return states


def check_tensors(path: Path, state: RunState, findings: Findings) -> bool:
    """Whether the reader takes every tensor of the ranks' files: optimizer state, too."""
    before = dict(findings.counts)
    for rank in range(state.world_size):
        file = TensorFile(path / rank_file(rank), state.origin(rank))
        for key in file.keys:
            with findings.catching("tensor of a checkpoint is damaged or not finite"):
                file.get(key)
    return findings.counts == before


def check_pointers(folder: Path, states: dict[int, RunState], findings: Findings) -> None:
    """`latest` names the newest checkpoint, and `best` the one that the newest one's state says."""
    folders = {step_of(path): path.name for path in step_folders(folder)}
    if not folders:
        return
    expected = {"latest": max(folders)}
    if max(folders) in states:
        best = states[max(folders)].best.get("step")
        expected |= {} if best is None else {"best": int(best)}
    for name in ("latest", "best"):
        pointer, step = folder / name, expected.get(name)
        found = read_pointer(folder, name)
        if found is None and pointer.exists():
            findings.add("pointer is wrong", f"{pointer} names no checkpoint")
        elif found is None and step is not None:
            findings.add("pointer is wrong", f"{pointer} is not there, it should name step {step}")
        elif found is not None and not found.is_dir():
            findings.add("pointer is wrong", f"{pointer} names {found.name}, which is not there")
        elif found is not None and step is not None and step_of(found) != step:
            findings.add("pointer is wrong", f"{pointer} names {found.name}, not that of step {step}")


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
        # Events stand at the step of a row, and two towers may open at once.
        kind, step = str(row.get("event", "")), row["step"]
        if step < last.get(kind, -1) or (step == last.get(kind) and not kind):
            findings.add("steps of rows do not ascend", f"{place}: step {step} comes behind step {last[kind]}")
        last[kind] = step
        # A step that fp16 skips has an infinite gradient norm, and nothing is wrong.
        figures = [(key, value) for key, value in row.items() if key != "grad_norm"]
        figures += [pair for _, value in figures if isinstance(value, dict) for pair in value.items()]
        wrong = [key for key, value in figures if isinstance(value, float) and not math.isfinite(value)]
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
