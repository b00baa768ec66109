"""Loading a recipe: YAML by name or path, overrides, and error messages that name the key.

This module imports no torch: `--list_recipes` stays quick.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from convclip.documents import parse_yaml, read_text
from convclip.schema import Recipe, Section, UserError, stands_for

__all__ = [
    "Recipe",
    "UserError",
    "first_problem",
    "list_recipes",
    "load_recipe",
    "nearest",
    "one_line",
    "takes_whole_numbers",
    "with_flags",
]

# The override that stands for many fields.
NAMED_MODEL = "model.open_clip"
RECIPE_FOLDER = Path(__file__).parent / "recipes"
# Characters of a message: what a user gave is shown up to here.
LONGEST_LINE = 400


def list_recipes() -> list[str]:
    """Names of the recipes that come with the package, sorted."""
    return sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml"))


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe by name (of `list_recipes()`) or path and apply `a.b=value` overrides.

    Override values are YAML (`optim.lr=5e-4`, `data.train=null`, `freezing.unfreeze.0.epoch=1`). A part is set after
    the section that holds it, in whatever order the two are given; of two for one key the last counts. Errors:
    UserError with one line that names the file or key and, for an unknown one, the nearest known.

    `model.open_clip=NAME` as an override replaces what the file says of all that NAME stands for; other overrides
    count beside it.
    """
    text, source, name = _read(str(name_or_path))
    values = parse_yaml(text, source)
    if not isinstance(values, dict):
        raise UserError(f"{source}: a recipe is a mapping of keys to values")
    values.setdefault("name", name)
    for override in sorted(overrides, key=_turn):
        _apply_override(values, override)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: {first_problem(error, Recipe)}") from None


def with_flags(overrides: Sequence[str], flags: Mapping[str, tuple[str, str | None]]) -> list[str]:
    """The overrides and, behind them, the flags that stand for a key: {"data.train": ("--train_data", value or None)}.

    Errors: UserError where a flag is empty, or an override sets the same key.
    """
    given = []
    for key, (flag, value) in flags.items():
        if value is None:
            continue
        if not value:
            raise UserError(f"{flag} is empty: name the data, or leave it out")
        for override in overrides:
            if _sets(override, key):
                raise UserError(f"{flag} {value} and {_named(override)} both set {key}: give one of them")
        given.append(f"{key}={json.dumps(value)}")
    return [*overrides, *given]


def first_problem(error: ValidationError, section: type[Section]) -> str:
    """The first problem of a `section` as one line, with the nearest known key for an unknown one."""
    problem = error.errors()[0]
    place = [str(part) for part in problem["loc"] if part != "[key]"]
    key = ".".join(place) if place else "recipe"
    if problem["type"] == "extra_forbidden":
        return one_line(
            f"unknown key {key or repr(key)}{nearest(place[-1], _known_keys(section, problem['loc'][:-1]))}"
        )
    message, given = problem["msg"].removeprefix("Value error, "), problem["input"]
    if problem["type"] == "model_type":
        message = "it is a section, which has keys of its own"
    if problem["type"] == "tuple_type":
        message = "it is a list, as in [a, b]"
    if problem["type"] != "value_error" and isinstance(given, str | int | float | None):
        message += f", not {_shown(given)}"
    if problem["type"] == "string_type" and isinstance(given, int | float):
        message += ": write it in quotes"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return one_line(f"{key}: {message}{more}")


def nearest(name: str, known: Sequence[str]) -> str:
    """`, did you mean …?` for a name that is close to a known one, else nothing."""
    close = difflib.get_close_matches(name[:100], known, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def takes_whole_numbers(key: str) -> bool:
    """Whether the field `key` of a recipe takes integers, and no other numbers."""
    *place, name = [part for part in key.split(".") if not part.isdecimal()]
    section = _section_at(Recipe, place)
    fields = {} if section is None else {field.alias or key: field for key, field in section.model_fields.items()}
    kinds = _plain_types(fields[name].annotation) if name in fields else set()
    return int in kinds and float not in kinds


def one_line(message: str) -> str:
    """The message on one line of a bearable length."""
    message = " ".join(message.split())
    return message if len(message) <= LONGEST_LINE else f"{message[:LONGEST_LINE]} …"


def _read(name_or_path: str) -> tuple[str, str, str]:
    """(text, source for messages, recipe name)."""
    path, known = Path(name_or_path), list_recipes()
    if path.suffix in (".yaml", ".yml"):
        return read_text(path, f"recipe file {path}"), str(path), path.stem
    if name_or_path not in known:
        # What to do comes first: the line is cut where it is too long.
        names = f"give a file that ends in .yaml, or a name; known: {', '.join(known)}"
        raise UserError(one_line(f"unknown recipe {name_or_path!r}{nearest(name_or_path, known)}; {names}"))
    path = RECIPE_FOLDER / f"{name_or_path}.yaml"
    return read_text(path, f"recipe file {path}"), f"recipe {name_or_path}", name_or_path


def _named(override: str) -> str:
    """An override as messages name it."""
    return f"--set {one_line(override[:100])}{' …' if len(override) > 100 else ''}"


def _sets(override: str, key: str) -> bool:
    """Whether an override gives `key` a value, by its name or within the section that holds it."""
    name, _, text = override.partition("=")
    section, _, field = key.rpartition(".")
    if name != section:
        return name == key
    value = _override_value(text, override)
    return isinstance(value, dict) and field in value


def _override_value(text: str, override: str) -> Any:
    """The YAML value of an override; what is no YAML is often a text that wants quotes: `{000..004}.tar`, `@x`."""
    try:
        return parse_yaml(text, _named(override))
    except UserError as error:
        key = override.partition("=")[0]
        hint = f"; a text with braces, brackets or other signs goes in quotes: --set '{key}=\"{one_line(text[:60])}\"'"
        raise UserError(one_line(f"{error}{hint}") if "'" not in text and '"' not in text else str(error)) from None


def _turn(override: str) -> tuple[int, bool]:
    """When an override is applied: a section before its parts, and the model's name before all that is beside it."""
    key = override.partition("=")[0]
    return key.count("."), key != NAMED_MODEL


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise UserError(f"{_named(override)}: write it as key=value, as in --set optim.lr=5e-4")
    value = _override_value(text, override)
    if value is None and text.strip().startswith("#"):
        raise UserError(f"{_named(override)}: YAML reads the value as a comment, put it in quotes")
    *parents, last = key.split(".")
    node: Any = values
    for depth, part in enumerate(parents):
        if isinstance(node, list):
            node = _list_item(node, part, override)
            continue
        if node.get(part) is None:
            node[part] = {}
        node[part] = _long_form(parents[: depth + 1], node[part])
        node = node[part]
        if not isinstance(node, dict | list):
            raise UserError(f"{_named(override)}: {part} is a single value, it has no parts")
    if isinstance(node, list):
        _list_item(node, last, override)
        node[int(last)] = value
        return
    if key == NAMED_MODEL and value is not None:
        _drop_what_is_named(node, value)
    # The one-word form of a section changes only the fields that it stands for.
    long, before = _long_form(key.split("."), value), _long_form(key.split("."), node.get(last))
    merges = long is not value and isinstance(before, dict)
    node[last] = {**before, **long} if merges else long


def _drop_what_is_named(model: dict[str, Any], name: Any) -> None:
    """Take out of a file's `model` section what the model `name` stands for. Errors: UserError for an unknown name."""
    try:
        fields = stands_for(name)
    except ValueError as error:
        raise UserError(one_line(f"--set {NAMED_MODEL}: {str(error).removeprefix('open_clip: ')}")) from None
    for key, value in fields.items():
        if isinstance(value, dict) and isinstance(model.get(key), dict):
            model[key] = {field: given for field, given in model[key].items() if field not in (*value, "kind")}
        else:
            model.pop(key, None)


def _long_form(place: Sequence[str], value: Any) -> Any:
    """`value` in the long form of the section at `place`; unchanged where no section is there."""
    section = _section_at(Recipe, place)
    return value if section is None else section.long_form(value)


def _list_item(items: list[Any], index: str, override: str) -> Any:
    if not (index.isascii() and index.isdecimal()) or len(index) > 9 or int(index) >= len(items):
        raise UserError(f"{_named(override)}: {index[:20]} is not an index of a list of {len(items)}")
    return items[int(index)]


def _shown(value: Any) -> str:
    """A value as a message shows it: as YAML has it, and not whole where it is long."""
    text = {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else ""
    if not text:
        text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "an integer of more than 30 digits"
    return text if len(text) <= 80 else f"{text[:80]} …"


def _known_keys(section: type[Section], place: Sequence[int | str]) -> list[str]:
    """Field names of the section at `place` in `section`."""
    found = _section_at(section, [part for part in place if isinstance(part, str)])
    return [] if found is None else [field.alias or name for name, field in found.model_fields.items()]


def _section_at(section: type[Section], place: Sequence[str]) -> type[Section] | None:
    """The class of the section at `place` (`model`, `image`) in `section`; None where there is none."""
    found: Any = section
    for part in place:
        field = found.model_fields.get(part)
        found = None if field is None else _section_of(field.annotation)
        if found is None:
            return None
    return found


def _plain_types(annotation: Any) -> set[Any]:
    """The classes in an annotation such as `Annotated[int, …] | None`."""
    inner = [part for part in getattr(annotation, "__args__", ()) if part is not annotation]
    return {annotation}.union(*(_plain_types(part) for part in inner))


def _section_of(annotation: Any) -> Any:
    """The Section class inside an annotation such as `TeacherConfig | None` or `tuple[Unfreeze, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _section_of(inner)
        if found is not None:
            return found
    return None
