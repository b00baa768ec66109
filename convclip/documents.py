"""Documents that people write, YAML and JSON, read strictly: small, whole, no key twice, nothing that builds objects.

Imports no torch.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import yaml

from convclip.sections.base import UserError

# A recipe has a kilobyte and a hundred values; an alias counts as often as it is used.
MAX_BYTES, MAX_VALUES, MAX_DEPTH = 2**18, 10_000, 32
TAG = "tag:yaml.org,2002:"
TAGS = {TAG + name for name in ("str", "int", "float", "bool", "null", "seq", "map", "merge")}
# YAML 1.1 reads 5e-4 as text, 010 as 8 and 1:30 as 90; here the first is a number and the others are text.
PLAIN = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", list("yYnNtTfFoO")),
    "float": (
        r"[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9]+([eE][-+]?[0-9]+)?"
        r"|\.(inf|Inf|INF))|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "int": (r"[-+]?(0|[1-9][0-9_]*)", list("-+0123456789")),
    "merge": (r"<<", ["<"]),
}


class _Loader(yaml.SafeLoader):
    """SafeLoader with our own idea of which plain words are numbers."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]  # the stubs say: an instance's

    def construct_number(self, node: yaml.ScalarNode) -> float:
        """A number with a point or an exponent; `6e5`, written for brevity, is as whole as 600000."""
        value: float = self.construct_yaml_float(node)
        return int(value) if "e" in node.value.lower() and value.is_integer() and abs(value) < 2**53 else value


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes the text which _Loader would take for a number."""


for _name, (_pattern, _first) in PLAIN.items():
    _Loader.add_implicit_resolver(TAG + _name, re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor(f"{TAG}float", _Loader.construct_number)
_Dumper.add_implicit_resolver(f"{TAG}float", re.compile(f"^(?:{PLAIN['float'][0]})$"), PLAIN["float"][1])


def read_text(path: str | Path, source: str) -> str:
    """The UTF-8 text of a file, without a byte order mark. Errors: UserError begins with `source`."""
    try:
        if Path(path).is_dir():
            raise UserError(f"{source} cannot be read: it is a folder, name a file")
        if Path(path).exists() and not Path(path).is_file():
            raise UserError(f"{source} cannot be read: it is no plain file")
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    # A path with a zero byte is a ValueError.
    except (OSError, ValueError) as error:
        raise UserError(f"{source} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > MAX_BYTES:
        raise UserError(f"{source} cannot be read: it has more than {MAX_BYTES // 1024} KiB, name another file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{source} cannot be read: byte {error.start} is not UTF-8 text, save it as UTF-8") from None


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML document, plain data only. Errors: UserError begins with `source`, and names the line."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        _check_nodes(node, source)
        return None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UserError(_one_line(f"{source}: not valid YAML: {line}{error.problem or error.context}")) from None
    except RecursionError:
        raise UserError(f"{source}: not valid YAML here: nested more than {MAX_DEPTH} levels deep") from None
    # Text that does not fit its tag: !!int x, !!bool x, !!int "", and integers of 5,000 digits.
    except (yaml.YAMLError, ValueError, LookupError) as error:
        raise UserError(_one_line(f"{source}: not valid YAML: {error}")) from None


def parse_json(text: str, source: str) -> Any:
    """The value of a JSON document. Errors: UserError begins with `source`; NaN and Infinity are refused."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for key, count in Counter(key for key, _ in pairs).items():
            if count > 1:
                raise UserError(f"{source}: the key {key} is given {count} times{_lines(text, key, count)}: keep one")
        return dict(pairs)

    def finite(number: str) -> float:
        value = float(number)
        if not math.isfinite(value):
            raise UserError(f"{source}: {number} is not a finite number")
        return value

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=finite, parse_float=finite)
        _check_depth(value, source)
        return value
    except RecursionError:
        raise UserError(f"{source}: cannot be read as JSON: nested more than {MAX_DEPTH} levels deep") from None
    except ValueError as error:
        raise UserError(_one_line(f"{source}: cannot be read as JSON: {error}")) from None


def dump_yaml(values: Any) -> str:
    """Plain data as YAML that `parse_yaml` reads back unchanged."""
    return str(yaml.dump(values, Dumper=_Dumper, sort_keys=False))


def _check_nodes(root: yaml.Node | None, source: str) -> None:
    """Refuse what a mapping would lose (a key twice), and what is too much or too deep once aliases are followed."""
    waiting = [(root, "", 0)] if root is not None else []
    seen = 0
    while waiting:
        node, place, depth = waiting.pop()
        seen += 1
        if node.tag not in TAGS:
            raise UserError(
                _one_line(f"{source}: not valid YAML: line {_line(node)}: the tag {node.tag} is not read here")
            )
        if depth > MAX_DEPTH:
            raise UserError(f"{source}: {place[:40]} … is nested more than {MAX_DEPTH} levels deep, or holds itself")
        if seen > MAX_VALUES:
            raise UserError(f"{source}: has more than {MAX_VALUES:,} values, aliases counted where they are used")
        if isinstance(node, yaml.SequenceNode):
            waiting += [(item, f"{place}.{number}", depth + 1) for number, item in enumerate(node.value)]
        elif isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                name = key.value if isinstance(key, yaml.ScalarNode) else f"of line {_line(key)}"
                where = f"{place}.{name}".lstrip(".")
                if name in lines:
                    both = f"in lines {lines[name]} and {_line(key)}"
                    raise UserError(_one_line(f"{source}: the key {where} is given twice, {both}: keep one"))
                lines[name] = _line(key)
                waiting += [(key, where, depth + 1), (value, where, depth + 1)]


def _check_depth(value: Any, source: str) -> None:
    waiting = [(value, 0)]
    while waiting:
        item, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise UserError(f"{source}: cannot be read as JSON: nested more than {MAX_DEPTH} levels deep")
        if isinstance(item, dict | list):
            waiting += [(inner, depth + 1) for inner in (item.values() if isinstance(item, dict) else item)]


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _lines(text: str, key: str, count: int) -> str:
    """The lines of a key in a JSON text, where it stands nowhere else."""
    found = [
        text.count("\n", 0, match.start()) + 1 for match in re.finditer(rf"{re.escape(json.dumps(key))}\s*:", text)
    ]
    return f", in lines {' and '.join(map(str, found))}" if len(found) == count else ""


def _one_line(message: str) -> str:
    return " ".join(message.split())
