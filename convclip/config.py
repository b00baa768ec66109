"""Loading a recipe: YAML by name or path, overrides, and error messages that name the key.

This module imports no torch: `--list_recipes` stays quick.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from convclip.schema import Recipe, Section, UserError

__all__ = ["Recipe", "UserError", "list_recipes", "load_recipe"]

RECIPE_FOLDER = Path(__file__).parent / "recipes"


def list_recipes() -> list[str]:
    """Names of the recipes that come with the package, sorted."""
    return sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml"))


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe by name (of `list_recipes()`) or path and apply `a.b=value` overrides.

    Override values are YAML (`optim.lr=5e-4`, `data.train=null`, `freezing.unfreeze.0.epoch=1`). Errors: UserError
    with one line that names the file or key and, for an unknown one, the nearest known.
    """
    text, source, name = _read(str(name_or_path))
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{source}: a recipe is a mapping of keys to values")
    values.setdefault("name", name)
    values = _parse_numbers(values)
    for override in overrides:
        _apply_override(values, override)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: {_first_problem(error)}") from None


def _read(name_or_path: str) -> tuple[str, str, str]:
    """(text, source for messages, recipe name)."""
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        try:
            return path.read_text(encoding="utf-8"), str(path), path.stem
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"recipe file {path} cannot be read: {error}") from None
    if name_or_path not in list_recipes():
        known = list_recipes()
        raise UserError(f"unknown recipe {name_or_path!r}{_nearest(name_or_path, known)}; known: {', '.join(known)}")
    return (RECIPE_FOLDER / f"{name_or_path}.yaml").read_text(encoding="utf-8"), f"recipe {name_or_path}", name_or_path


def _parse_numbers(value: Any) -> Any:
    """YAML 1.1 reads `5e-4` as a string; people write it as a number."""
    if isinstance(value, dict):
        return {key: _parse_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_parse_numbers(item) for item in value]
    if isinstance(value, str) and value[:1] in "0123456789.-+":
        try:
            return float(value) if "e" in value.lower() else value
        except ValueError:
            return value
    return value


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise UserError(f"--set {override}: write it as key=value, as in --set optim.lr=5e-4")
    try:
        value = _parse_numbers(yaml.safe_load(text))
    except yaml.YAMLError:
        raise UserError(f"--set {override}: the value is not valid YAML") from None
    *parents, last = key.split(".")
    node: Any = values
    for part in parents:
        if isinstance(node, list):
            node = _list_item(node, part, override)
            continue
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict | list):
            raise UserError(f"--set {override}: {part} is a single value, it has no parts")
    if isinstance(node, list):
        _list_item(node, last, override)
        node[int(last)] = value
    else:
        node[last] = value


def _list_item(items: list[Any], index: str, override: str) -> Any:
    if not index.isdecimal() or int(index) >= len(items):
        raise UserError(f"--set {override}: {index} is not an index of a list of {len(items)}")
    return items[int(index)]


def _first_problem(error: ValidationError) -> str:
    """The first validation problem as one line, with the nearest known key for an unknown one."""
    problem = error.errors()[0]
    place = [str(part) for part in problem["loc"] if part != "[key]"]
    key = ".".join(place) or "recipe"
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key}{_nearest(place[-1], _known_keys(problem['loc'][:-1]))}"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{key}: {problem['msg'].removeprefix('Value error, ')}{more}"


def _known_keys(place: Sequence[int | str]) -> list[str]:
    """Field names of the section at `place` in a recipe."""
    section: Any = Recipe
    for part in place:
        if isinstance(part, str):
            section = _section_of(section.model_fields[part].annotation)
    return [field.alias or name for name, field in section.model_fields.items()]


def _section_of(annotation: Any) -> Any:
    """The Section class inside an annotation such as `TeacherConfig | None` or `tuple[Unfreeze, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _section_of(inner)
        if found is not None:
            return found
    return None


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""
