"""What a run's checkpoint was trained from and on, and its recalls, as a model card says it (Markdown).

Of places it has the last part alone: neither folders of a machine nor what an address may hold of keys and signatures.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from convclip import schema
from convclip.devices import PRECISIONS
from convclip.documents import dump_yaml
from convclip.evaluation.report import format_table
from convclip.models.checkpoint_weights import RunState
from convclip.schema import Recipe

EVALUATIONS = "eval.jsonl"
MAX_READ, MAX_RECIPE, MAX_WORDS = 2**24, 12_000, 300
# Text of a recipe that is no place, whatever it holds.
NO_PLACES = ("description", "csv_separator", "name")


def about_run(checkpoint: Path, recipe: Recipe, state: RunState, ema: bool = False, recalls: str = "") -> str:
    """Markdown of a run's checkpoint: pretrained weights, data, steps, recipe, recalls at its step.

    `ema`: it is the moving average of its weights that is described. `recalls`: what to say in place of the run's own.
    """
    row = evaluation_of(checkpoint.parent.parent / EVALUATIONS, state.step)
    if ema:
        average = (row or {}).get("ema")
        row = average if isinstance(average, dict) else None
    precision = next((name for name, known in PRECISIONS.items() if str(known) == state.precision), state.precision)
    per_epoch = _count(state, "steps per epoch")
    epochs = f", {state.step / per_epoch:.4g} of its recipe's {recipe.epochs} epochs" if per_epoch else ""
    counts = [f"{_count(state, what):,} {what}" for what in _COUNTS if _count(state, what)]
    trained = [
        f"- data: {_code(base_name(recipe.data.train or 'not said'))}{''.join(f'; {count}' for count in counts)}",
        f"- {state.step:,} optimizer steps{epochs}, global batch {recipe.batch.global_:,}",
        f"- computed in {precision}; the weights here are float32",
    ]
    if ema:
        trained.append(f"- they are the moving average of the weights (optim.ema_decay {recipe.optim.ema_decay})")
    return "\n\n".join(
        [
            _trained_from(recipe.model),
            "## What it was trained on\n\n" + "\n".join(trained),
            f"## Recipe\n\nWhat differs from convclip's defaults:\n\n```yaml\n{_short(recipe)}```",
            "## Recalls\n\n" + (recalls or _recalls(recipe, row, state.step)),
        ]
    )


def about_file(weights: str, recipe: Recipe) -> str:
    """Markdown of a weight file, of which no more is known than the recipe of its model."""
    model = recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True).get("model", {})
    return (
        f"## Where its weights come from\n\nFrom the file {_code(base_name(weights))}; what it was trained on is not "
        f"known.\n\n```yaml\n{_bounded(dump_yaml({'model': _without_places(model)}))}```"
    )


def evaluation_of(path: Path, step: int) -> dict[str, Any] | None:
    """The figures that a run's eval.jsonl has last of `step`; None where it has none that can be read."""
    found = None
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - MAX_READ))
            lines = file.read(MAX_READ).splitlines()
    except OSError:
        return None
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # torn by a kill
            continue
        if isinstance(row, dict) and row.get("step") == step and "standard" in row:
            found = row
    return found


def base_name(place: str) -> str:
    """The last part of a path or address; a hub name is whole, a command is not said."""
    if place.startswith("pipe:"):
        return "a pipe: command"
    if re.fullmatch(r"hf-hub:[\w.-]+/[\w.-]+", place):
        return place
    # Behind ? stand the keys and signatures of an address.
    address = re.split(r"[?#]", place)[0] if "://" in place else place
    return re.split(r"[/\\]", address.rstrip("/\\"))[-1][:MAX_WORDS]


_COUNTS = ("images or videos", "captions", "rows per epoch")


def _trained_from(model: schema.Model) -> str:
    """The pretrained weights that the recipe names."""
    encoder = model.text.model if model.text.kind == "hf" else None
    named = {
        "both towers": model.pretrained,
        "image tower": model.image.pretrained,
        "text tower": model.text.pretrained or encoder,
    }
    lines = [f"- {what}: {_code(base_name(place))}" for what, place in named.items() if place]
    return "## What it was trained from\n\n" + ("\n".join(lines) or "Random weights: its recipe names no others.")


def _recalls(recipe: Recipe, row: dict[str, Any] | None, step: int) -> str:
    """The table of both protocols beside chance, as after an evaluation."""
    if row is not None:
        try:
            table = format_table(row)
        except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError):  # damaged by hand
            row = None
    if row is None:
        return f"The run's {EVALUATIONS} has no evaluation at step {step:,}: launch/evaluate.py gives one."
    return f"At step {step:,}, on {_code(base_name(recipe.data.val or 'not said'))}, in percent:\n\n```\n{table}\n```"


def _short(recipe: Recipe) -> str:
    """What of a recipe differs from the defaults, as YAML; without an encoder's config.json."""
    values = recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return _bounded(dump_yaml(_without_places(values)))


def _bounded(text: str) -> str:
    # A fence inside would end the block.
    text = text.replace("```", "'''")
    return text if len(text) <= MAX_RECIPE else text[:MAX_RECIPE].rpartition("\n")[0] + "\n# … and more\n"


def _without_places(values: Any, key: str = "") -> Any:
    if isinstance(values, dict):
        kept = {name: value for name, value in values.items() if not (key == "text" and name == "config")}
        return {name: _without_places(value, name) for name, value in kept.items()}
    if isinstance(values, list):
        return [_without_places(value, key) for value in values]
    if isinstance(values, str) and key not in NO_PLACES and re.search(r"[/\\]|^pipe:", values):
        return base_name(values)
    return values


def _code(text: str) -> str:
    """In Markdown as it stands, in one line."""
    plain = "".join(c for c in text if c.isprintable()).replace("`", "'")
    return f"`{plain}`"


def _count(state: RunState, what: str) -> int:
    """A number of the training data, 0 where the checkpoint does not say it."""
    value = state.data.get(what)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
