"""Recipes, overrides and ds_configs. What is accepted must say what was given: nothing dropped, nothing turned."""

from __future__ import annotations

import json
import random
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from convclip.config import list_recipes, load_recipe
from convclip.engine.zero.ds_config import load_ds_config, resolve_ds_config
from convclip.engine.zero.ds_sections import Bf16, Fp16, Offload, Zero
from convclip.schema import Recipe, stands_for
from tests.broken_recipes import DS_CONFIGS, FILES, OVERRIDES
from tests.campaign.damage import BAD_VALUES, broken_json, broken_text
from tests.campaign.judge import RIGHT, Wrong
from tests.conftest import REPOSITORY


def recipes(folder: Path, rng: random.Random) -> str:
    """A recipe file: a field with a bad value, or a text broken once or twice more."""
    path = folder / "mine.yaml"
    if rng.random() < 0.4:
        values = {"epochs": 2}
        _set(values, rng.choice(FIELDS), rng.choice(BAD_VALUES))
        path.write_text(yaml.safe_dump(values, allow_unicode=rng.random() < 0.5))
    else:
        own = [(REPOSITORY / "convclip" / "recipes" / f"{name}.yaml").read_bytes() for name in list_recipes()]
        text = rng.choice([*own, *own, *(content for content, _ in FILES.values() if len(content) < 2000)])
        for _ in range(rng.randint(1, 2)):
            text = broken_text(text, rng)
        path.write_bytes(text)
    recipe = load_recipe(path)
    _says(recipe, yaml.safe_load(path.read_bytes()))
    again = folder / "again.yaml"
    again.write_text(recipe.to_yaml())
    if load_recipe(again) != recipe:
        raise Wrong("the recipe written and read again is another")
    return RIGHT


def overrides(folder: Path, rng: random.Random) -> str:
    """--set of a bad value, of broken text, or of two things at once."""
    del folder
    given = []
    for _ in range(rng.choice((1, 1, 2))):
        if rng.random() < 0.6:
            given.append(f"{rng.choice(FIELDS)}={json.dumps(rng.choice(BAD_VALUES))}")
        else:
            text = rng.choice([*(one for ones, _ in OVERRIDES.values() for one in ones), "optim.lr=1e-3", "epochs=3"])
            given.append(broken_text(text.encode(errors="surrogateescape"), rng).decode(errors="surrogateescape"))
    recipe = load_recipe(rng.choice(("demo", "teachclip_msrvtt7k")), given)
    for override in given if len({one.partition("=")[0] for one in given}) == len(given) == 1 else ():
        key, _, value = override.partition("=")
        wanted: dict[str, Any] = {}
        _set(wanted, key, yaml.safe_load(value))
        _says(recipe, wanted)
    return RIGHT


def ds_configs(folder: Path, rng: random.Random) -> str:
    """A ds_config: a key with a bad value, a new key, or a broken text."""
    path = folder / "ds.json"
    ours = [json.loads(file.read_text()) for file in sorted((REPOSITORY / "ds_configs").glob("*.json"))]
    way, config = rng.random(), rng.choice(ours)
    if way < 0.5:
        _set(config, rng.choice(DS_KEYS), rng.choice(BAD_VALUES))
        path.write_text(json.dumps(config))
    elif way < 0.75:
        path.write_bytes(broken_json(config, rng))
    else:
        text = rng.choice([text for text, _ in DS_CONFIGS.values() if len(text) < 2000])
        path.write_bytes(broken_text(text.encode(), rng))
    values = load_ds_config(path)
    resolved = resolve_ds_config(values, load_recipe("demo"), rng.choice((1, 2)))
    given = json.loads(path.read_text(encoding="utf-8-sig"))
    for section, key in (("zero_optimization", "stage"), ("bf16", "enabled"), ("fp16", "enabled")):
        wanted = given.get(section, {}).get(key, 0)
        if resolved.get(section, {}).get(key, 0) != wanted:
            raise Wrong(f"{section}.{key} was given as {wanted}, and is {resolved.get(section)}")
    return RIGHT


def _leaves(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of every field, sections included."""
    for name, field in section.model_fields.items():
        place = f"{prefix}{field.alias or name}"
        yield place
        for kind in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _leaves(kind, f"{place}.")


FIELDS = (*_leaves(Recipe), *(f"freezing.unfreeze.0.{key}" for key in ("epoch", "tower", "layers", "groups", "all")))
DS_SECTIONS = (("zero_optimization", Zero), ("bf16", Bf16), ("fp16", Fp16))
DS_KEYS = (
    *(f"{name}.{key}" for name, section in DS_SECTIONS for key in section.model_fields),
    *(f"zero_optimization.offload_optimizer.{key}" for key in Offload.model_fields),
    *(f"zero_optimization.offload_param.{key}" for key in Offload.model_fields),
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("zero_optimization", "bf16", "fp16", "optimizer", "scheduler", "amp", "steps_per_print"),
    *("dump_state", "x", "seed"),
)


def _set(values: dict[str, Any], place: str, value: Any) -> None:
    node, (*parents, last) = values, place.split(".")
    for part in parents:
        if not isinstance(node.get(part), dict):
            node[part] = {}
        node = node[part]
    node[last] = value


def _says(recipe: Recipe, given: Any) -> None:
    """Wrong where a leaf of `given` stands otherwise in the recipe."""
    _same(recipe.model_dump(by_alias=True), given, "")


def _same(found: Any, given: Any, place: str) -> None:
    if isinstance(given, Mapping) and isinstance(found, Mapping):
        for key, value in given.items():
            key = str(key)
            if f"{place}{key}" == "model.open_clip":
                # A name is not stored: what it stands for is, but for what is said beside it.
                named = {} if value is None else stands_for(value)
                if "embed_dim" in named and found["embed_dim"] != given.get("embed_dim", named["embed_dim"]):
                    raise Wrong(f"{place}{key} {value} has another embed_dim")
                continue
            if key not in found:
                raise Wrong(f"{place}{key} is lost")
            _same(found[key], value, f"{place}{key}.")
    elif isinstance(given, list | tuple) and isinstance(found, list | tuple):
        if len(given) != len(found):
            raise Wrong(f"{place} has {len(found)} values of {len(given)}")
        for number, pair in enumerate(zip(found, given, strict=True)):
            _same(*pair, f"{place}{number}.")
    elif isinstance(found, Mapping) and isinstance(given, str):
        return  # A section in short.
    elif isinstance(found, int | float) and not isinstance(found, bool) and isinstance(given, str):
        if float(given) != found:  # PyYAML takes 1e-3 for text.
            raise Wrong(f"{place} is {found!r}, given was {given!r}")
    elif isinstance(found, float) and isinstance(given, int) and not isinstance(given, bool):
        if found != float(given):
            raise Wrong(f"{place} is {found!r}, given was {given!r}")
    elif found != given or isinstance(found, bool) != isinstance(given, bool):
        raise Wrong(f"{place} is {found!r}, given was {given!r}")
