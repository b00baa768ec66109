"""What a run leaves in its folder, to compare with another to the bit: weights, rows, pointers, files."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

TIMES = ("samples_per_s", "data_share", "step_seconds", "memory_gib")


def stop_after(run: Path, step: int, stopped: Path) -> None:
    """A copy of the run as a kill after the save of `step` leaves it, but for rows that came later."""
    shutil.rmtree(stopped, ignore_errors=True)
    shutil.copytree(run, stopped)
    for checkpoint in (stopped / "checkpoints").glob("step-*"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    (stopped / "latest").write_text(f"checkpoints/step-{step:08d}\n")


def outcome(run: Path) -> dict[str, Any]:
    """What a run leaves, but for times and for what is drawn at random."""
    files = contents(run)
    found: dict[str, Any] = {}
    for name, data in files.items():
        if name.endswith(".jsonl"):
            rows = [json.loads(line) for line in data.splitlines()]
            found[name] = [{k: v for k, v in row.items() if k not in TIMES} for row in rows]
        elif name.endswith("state.json"):
            found[name] = {**json.loads(data), "run": ""}
        elif name.endswith(".safetensors"):
            found[name] = load(data)
        else:
            found[name] = data
    return found


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What differs between two outcomes, to the bit; empty when they are the same."""
    wrong = [f"{name} is there" for name in found.keys() - expected.keys()]
    for name, value in expected.items():
        if name not in found:
            wrong.append(f"{name} is missing")
        elif name.endswith(".safetensors"):
            wrong += [f"{name} {key}" for key in value if not torch.equal(value[key], found[name][key])]
        elif value != found[name]:
            wrong.append(f"{name}: {value} != {found[name]}")
    return wrong


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes by file name, with process numbers taken out of temporary names; not what nobody reads back."""
    found: dict[str, bytes] = {}
    for path in sorted(folder.rglob("*")):
        name = re.sub(r"\.[0-9a-f]{8}-\d+-\d+\.part", ".N.part", str(path.relative_to(folder)))
        if not name.startswith("tensorboard") and name != "train.log":
            found[name] = path.read_bytes() if path.is_file() else b""
    return found
