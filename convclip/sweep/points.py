"""The points of a sweep, from the `--set` of its command line: fixed settings, lists of choices, ranges. No torch.

optim.lr=1e-4,3e-4,1e-3               three choices, each of them YAML
optim.betas=[0.9,0.98],[0.9,0.95]     two choices, which are lists
loss.kind,model.init_logit_bias=[softmax,null],[sigmoid,-10]    settings that go together
optim.lr=log:1e-5..1e-2               a range, even in the logarithm
optim.weight_decay=0..0.3             a range; whole numbers for a field that takes only these
epochs=5                              fixed, for every point
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from convclip.config import Recipe, UserError, load_recipe, takes_whole_numbers, with_flags
from convclip.documents import parse_yaml

MOST_POINTS = 1000
# Draws for each point that is wanted, before a sweep says that there are no more.
TRIES = 100
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"(log:)?({_NUMBER})\.\.({_NUMBER})")


@dataclass(frozen=True)
class Choices:
    """Values that the fields `keys` take together: each of `values` has one for each key."""

    keys: tuple[str, ...]
    values: tuple[tuple[Any, ...], ...]

    def draw(self, chance: random.Random) -> tuple[Any, ...]:
        """One of the values."""
        return chance.choice(self.values)


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high` of one field, even in the logarithm with `log`; `whole`: integers."""

    keys: tuple[str, ...]
    low: float
    high: float
    log: bool
    whole: bool

    def draw(self, chance: random.Random) -> tuple[Any, ...]:
        """A number of the range, with four digits."""
        if self.whole and not self.log:
            return (chance.randint(math.ceil(self.low), math.floor(self.high)),)
        value = chance.uniform(self.low, self.high)
        if self.log:
            value = math.exp(chance.uniform(math.log(self.low), math.log(self.high)))
        if self.whole:
            return (min(max(round(value), math.ceil(self.low)), math.floor(self.high)),)
        return (min(max(float(f"{value:.4g}"), self.low), self.high),)


@dataclass(frozen=True)
class Point:
    """The settings of one run beside what all have: (key, value)."""

    settings: tuple[tuple[str, Any], ...]

    @property
    def overrides(self) -> list[str]:
        """As `--set` of launch/train.py."""
        return [f"{key}={json.dumps(value)}" for key, value in self.settings]

    @property
    def label(self) -> str:
        """The settings for people, in one line."""
        return " ".join(f"{key}={shown(value)}" for key, value in self.settings)

    @property
    def name(self) -> str:
        """A folder name, the same for the same settings: their first characters, then a checksum."""
        words = "_".join(f"{key.rpartition('.')[2]}-{shown(value)}" for key, value in self.settings)
        checksum = hashlib.sha256(json.dumps(sorted(self.overrides)).encode()).hexdigest()[:8]
        return f"{re.sub(r'[^A-Za-z0-9.+_-]+', '-', words)[:60].strip('-.')}_{checksum}"


def shown(value: Any) -> str:
    """A value as a person would type it."""
    return value if isinstance(value, str) else json.dumps(value)


def split_settings(overrides: Sequence[str]) -> tuple[list[str], list[Choices | Range]]:
    """(what is fixed, as it was given; what is swept). Errors: UserError names the setting."""
    fixed: list[str] = []
    swept: list[Choices | Range] = []
    for override in overrides:
        name, sign, text = override.partition("=")
        keys = tuple(key.strip() for key in name.split(","))
        found = _range(keys, text, override) or _choices(keys, text, override)
        if not sign or not all(keys) or (len(keys) == 1 and isinstance(found, Choices) and len(found.values) < 2):
            fixed.append(override)
        else:
            swept.append(found)
    taken = [key for setting in swept for key in setting.keys] + [text.partition("=")[0] for text in fixed]
    for key in taken:
        if taken.count(key) > 1 and any(key in setting.keys for setting in swept):
            raise UserError(f"--set {key} is given twice: give all its values in one")
    return fixed, swept


def make_points(swept: Sequence[Choices | Range], count: int | None, seed: int) -> list[Point]:
    """Every combination of the choices, the last one fastest; or `count` different points drawn by `seed`.

    The points of a smaller count are the first of a larger one. Errors: UserError.
    """
    if not swept:
        raise UserError("nothing is swept: give --set KEY=A,B,… with more than one value, or a range and --random N")
    ranges = [setting for setting in swept if isinstance(setting, Range)]
    if count is None and ranges:
        raise UserError(f"--set {ranges[0].keys[0]} is a range, which has no grid: add --random N, or give a list")
    combinations = math.prod(len(setting.values) for setting in swept if isinstance(setting, Choices))
    if (combinations if count is None else count) > MOST_POINTS:
        raise UserError(f"{combinations if count is None else count:,} points: a sweep has at most {MOST_POINTS:,}")
    if count is None:
        grid = itertools.product(*[setting.values for setting in swept if isinstance(setting, Choices)])
        return [_point(swept, values) for values in grid]
    if count < 1:
        raise UserError(f"--random {count}: draw one point at least")
    chance, points = random.Random(seed), dict[str, Point]()
    for _ in range(TRIES * count):
        point = _point(swept, [setting.draw(chance) for setting in swept])
        points.setdefault(point.name, point)
        if len(points) == count:
            return list(points.values())
    raise UserError(f"--random {count}: there are only {len(points)} different points, ask for so many or widen them")


def load_points(
    recipe: str, fixed: Sequence[str], points: Sequence[Point], flags: Mapping[str, tuple[str, str | None]]
) -> tuple[Recipe, list[Recipe]]:
    """The recipe without what is swept, and that of each point; `flags` as of `with_flags`. Errors: UserError."""
    base, recipes = load_recipe(recipe, with_flags(fixed, flags)), []
    for point in points:
        given = with_flags([*fixed, *point.overrides], flags)
        try:
            recipes.append(load_recipe(recipe, given))
        except UserError as error:
            raise UserError(
                f"{point.label}: {error}; settings that go together are given together: --set KEY,KEY=[1,2],[3,4]"
            ) from None
    return base, recipes


def _point(swept: Sequence[Choices | Range], values: Sequence[tuple[Any, ...]]) -> Point:
    pairs = (zip(setting.keys, given, strict=True) for setting, given in zip(swept, values, strict=True))
    return Point(tuple(itertools.chain.from_iterable(pairs)))


def _range(keys: tuple[str, ...], text: str, override: str) -> Range | None:
    """A range, where the text is one."""
    found = _RANGE.fullmatch(text.strip())
    if found is None:
        return None
    low, high, log = float(found[2]), float(found[3]), bool(found[1])
    if len(keys) > 1:
        raise UserError(f"--set {override}: a range is of one field, settings that go together are lists")
    if not low < high or not math.isfinite(low) or not math.isfinite(high):
        raise UserError(f"--set {override}: a range goes from a smaller number to a larger one")
    if log and low <= 0:
        raise UserError(f"--set {override}: a range in the logarithm begins above 0")
    whole = takes_whole_numbers(keys[0])
    if whole and math.ceil(low) > math.floor(high):
        raise UserError(f"--set {override}: {keys[0]} takes whole numbers, and none lies between")
    return Range(keys, low, high, log, whole)


def _choices(keys: tuple[str, ...], text: str, override: str) -> Choices:
    """The values of a list; a text with no comma is one value, whatever YAML makes of it in brackets."""
    if len(keys) == 1 and "," not in text:
        return Choices(keys, ((text,),))
    values = parse_yaml(f"[{text}]", f"--set {override}")
    if not isinstance(values, list) or not values or (text.strip() + ",").endswith(",,"):
        raise UserError(f"--set {override}: write the values as A,B,C; one with a comma or bracket in it in quotes")
    if len(keys) > 1:
        for value in values:
            if not isinstance(value, list) or len(value) != len(keys):
                raise UserError(f"--set {override}: each value is a list of {len(keys)}, one for each key")
    rows = tuple(tuple(value) if len(keys) > 1 else (value,) for value in values)
    for row in _repeated(rows):
        raise UserError(f"--set {override}: {', '.join(map(shown, row))} is given twice")
    return Choices(keys, rows)


def _repeated(rows: Sequence[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    written = [json.dumps(row) for row in rows]
    return (row for row, text in zip(rows, written, strict=True) if written.count(text) > 1)
