"""Names of released models, folders of Hugging Face text encoders, and the flags of tools/export.py."""

from __future__ import annotations

import functools
import json
import random
import shutil
import string
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import ValidationError
from safetensors.torch import load_file

import convclip
from convclip import schema
from convclip.config import Recipe, first_problem, load_recipe
from convclip.data.tokenizers import build_tokenizer
from convclip.documents import dump_yaml
from convclip.models import build_model
from convclip.models.hf_folder import with_encoder
from convclip.models.weights import load_pretrained
from convclip.schema import RELEASED, UserError
from tests.campaign.command_kinds import CONTENTS, KINDS_OF_FILE, call, wrong_file
from tests.campaign.damage import BAD_VALUES, broken_file
from tests.campaign.judge import RIGHT, Wrong
from tests.conftest import REPOSITORY
from tests.models.hf_folders import KINDS, text_section, write_encoder

FIXTURE = REPOSITORY / "tests" / "fixtures" / "0.1.0"
IMAGE = schema.ImageTowerConfig(backbone="test_convnext", image_size=32)
CAPTIONS = ["w5 w6 w7", "w11", "", "unknown words <s> </s> w20"]
TAGS = tuple(tag for model in RELEASED.values() for tag in model.tags)
# Those that build on the meta device in a tenth of a second.
SMALL = ("RN50", "RN50-quickgelu", "MobileCLIP2-S0", "convnext_base_w")
BESIDE = (
    *("embed_dim", "image.backbone", "image.head", "image.image_size", "image.drop_path", "image.mean", "image.std"),
    *("image.interpolation", "text.kind", "text.width", "text.heads", "text.layers", "text.context_length"),
    *("text.vocab_size", "text.activation", "text.causal", "text.tokenizer", "text.pool", "init_logit_bias"),
)


def model_names(folder: Path, rng: random.Random) -> str:
    """`model.open_clip` mistyped, with another's tag, or with a field beside it that does not go with it: one line, or
    the model that the name stands for, which can be built.
    """
    name = rng.choice((*SMALL, *RELEASED))
    model: dict[str, Any] = {"open_clip": name}
    way = rng.choice(("name", "name", "value", "tag", "beside", "beside"))
    if way == "name":
        model["open_clip"] = _mistyped(name, rng)
    elif way == "value":
        model["open_clip"] = rng.choice(BAD_VALUES)
    elif way == "tag":
        model["pretrained"] = rng.choice((*TAGS, _mistyped(rng.choice(TAGS), rng), rng.choice(BAD_VALUES)))
    else:
        _set(model, rng.choice(BESIDE), rng.choice(BAD_VALUES))
    given = model["open_clip"]
    if rng.random() < 0.5:
        path = folder / "mine.yaml"
        path.write_text(dump_yaml({"epochs": 1, "model": model}))
        recipe = load_recipe(path)
    else:
        # As an override, over a recipe that says another model.
        told = [f"model.open_clip={json.dumps(given)}"]
        told += [f"model.{key}={json.dumps(value)}" for key, value in _flat(model).items() if key != "open_clip"]
        recipe = load_recipe("demo", told)
    if given is None:
        return RIGHT
    wanted = schema.stands_for(given)
    if way in ("name", "tag") and recipe.model.embed_dim != wanted["embed_dim"]:
        raise Wrong(f"{given} has embed_dim {recipe.model.embed_dim}")
    if given in SMALL:
        with torch.device("meta"):
            built = build_model(with_encoder(recipe.model))
        if built.text.embed_dim != recipe.model.embed_dim:
            raise Wrong(f"{given} was built with embed_dim {built.text.embed_dim}")
    return RIGHT


def text_folders(folder: Path, rng: random.Random) -> str:
    """A folder of a Hugging Face text encoder with one file, or two, damaged, missing or of another kind: one line; or
    the encoder whose weights and tokens the files say, which embeds captions.
    """
    kind = rng.choice(list(KINDS))
    own = folder / "encoder"
    shutil.copytree(_encoder(kind), own)
    for path in rng.sample(sorted(own.iterdir()), rng.choice((1, 1, 1, 2))):
        if rng.random() < 0.7:
            broken_file(path, rng)
        else:
            path.write_bytes(CONTENTS[rng.choice(list(CONTENTS))]())
    try:
        text = text_section(own, pool=rng.choice(("mean", "last", "max", "cls")))
    except ValidationError as error:
        raise UserError(first_problem(error, Recipe)) from None
    config = with_encoder(schema.Model(embed_dim=16, image=IMAGE, text=text))
    model = build_model(config).eval()
    load_pretrained(model, config)
    tokens = build_tokenizer(config.text)(CAPTIONS)
    if tokens.shape != (len(CAPTIONS), 30) or not bool(((tokens >= 0) & (tokens < config.text.vocab_size)).all()):
        raise Wrong(f"{kind}: tokens {tokens.tolist()}")
    with torch.no_grad():
        found = model(texts=tokens).text
    if found.shape != (len(CAPTIONS), 16):
        raise Wrong(f"{kind}: embeddings {tuple(found.shape)}")
    _same_weights(kind, own, model)
    return RIGHT


def export_flags(folder: Path, rng: random.Random) -> str:
    """tools/export.py with a flag that is wrong: one line, exit code 2 and nothing written; or an export that loads."""
    out = folder / "out"
    given = {"--checkpoint": str(FIXTURE / "run"), "--output_dir": str(out), "--format": "open_clip"}
    flag = rng.choice(("--checkpoint", "--output_dir", "--format", "--recipe", "--set", "file", "missing", "unknown"))
    more: list[str] = []
    if flag == "--format":
        given[flag] = rng.choice((_mistyped(rng.choice(("open_clip", "transformers", "onnx")), rng), "", "safetensors"))
    elif flag == "--output_dir":
        given[flag] = wrong_file(
            rng.choice([kind for kind in KINDS_OF_FILE if kind not in ("missing", "folder")]), folder
        )
    elif flag == "--recipe":
        given[flag] = rng.choice((wrong_file(rng.choice(KINDS_OF_FILE), folder), _mistyped("demo", rng), "demo"))
    elif flag == "--set":
        place = rng.choice((*(f"model.{name}" for name in BESIDE), "model.open_clip", "batch.global", "x"))
        more = [flag, f"{place}={json.dumps(rng.choice(BAD_VALUES))}"]
    elif flag == "file":
        # Weights of another model than the recipe's.
        given["--checkpoint"] = str(FIXTURE / "export" / "open_clip_model.safetensors")
        given["--recipe"] = rng.choice(("demo", str(FIXTURE / "small.yaml"), "teachclip_msrvtt9k"))
    elif flag == "--checkpoint":
        given[flag] = wrong_file(rng.choice(KINDS_OF_FILE), folder)
        given["--format"] = rng.choice(("open_clip", "transformers", "onnx"))
    elif flag == "missing":
        del given[rng.choice(list(given))]
    else:
        more = [rng.choice(("--checkpiont", "--form", "--resume", "-x", "extra")), "x"]
    before = sorted(folder.rglob("*"))
    code, error = call("tools/export.py", [*(part for pair in given.items() for part in pair), *more])
    if code == 2:
        if sorted(folder.rglob("*")) != before:
            raise Wrong(f"export was refused and wrote {sorted(set(folder.rglob('*')) - set(before))}")
        raise UserError(error.strip().split("\r")[-1].split("\n")[-1])
    if code or not (out / "README.md").is_file():
        raise Wrong(f"export ends with {code}: {error[-200:]!r}")
    convclip.load(out, tokenizer=FIXTURE / "tokenizer")
    return RIGHT


@functools.cache
def _encoder(kind: str) -> Path:
    """A tiny released encoder of that kind."""
    holder = tempfile.TemporaryDirectory(prefix=f"campaign-{kind}-")
    _HOLDERS.append(holder)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    write_encoder(Path(holder.name) / "encoder", kind)
    return Path(holder.name) / "encoder"


# Removed when Python ends.
_HOLDERS: list[Any] = []


def _same_weights(kind: str, own: Path, model: Any) -> None:
    """Wrong where a tensor of the encoder is not one that the folder's file holds."""
    sums = {float(tensor.double().sum()) for tensor in load_file(own / "model.safetensors").values()}
    for name, tensor in model.text.transformer.state_dict().items():
        value = float(tensor.double().sum())
        if value == value and value not in sums:
            raise Wrong(f"{kind}: {name} is of no tensor in the file")


def _mistyped(name: str, rng: random.Random) -> str:
    """A name with a letter dropped, doubled, swapped, in another case, or put in."""
    place = rng.randrange(len(name))
    before, letter, after = name[:place], name[place], name[place + 1 :]
    ways = (
        before + after,
        before + 2 * letter + after,
        before + letter.swapcase() + after,
        after[:1] + name,
        name + " ",
    )
    return rng.choice((*ways, before + rng.choice(string.printable) + name[place:]))


def _set(values: dict[str, Any], place: str, value: Any) -> None:
    section, _, key = place.rpartition(".")
    (values.setdefault(section, {}) if section else values)[key] = value


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Sections as dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        is_section = isinstance(value, dict) and key in ("image", "text")
        flat |= _flat(value, f"{key}.") if is_section else {f"{prefix}{key}": value}
    return flat
