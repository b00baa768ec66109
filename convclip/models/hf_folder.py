"""A Hugging Face text encoder's files, in a folder or on the hub: config.json, the weights, and their index.

A recipe names the place alone (`model.text.model`). `with_encoder` writes what config.json says into the recipe, once,
so that a run, its checkpoints and its exports need the place no more. Imports no torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

from convclip import schema
from convclip.config import nearest
from convclip.models.hf_families import FAMILIES
from convclip.models.weight_files import named_parts
from convclip.schema import UserError

CONFIG = "config.json"
MAX_JSON_BYTES = 2**24
# Weights in a folder, best first; an index says in which files they are.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
INDEX = ".index.json"
# What a tokenizer may consist of.
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt"),
    *("vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model"),
)
# What a config.json says that changes nothing of an encoder; `auto_map` names code, which never runs.
LEFT_OUT = (
    *("_name_or_path", "architectures", "auto_map", "transformers_version", "torch_dtype", "dtype"),
    *("id2label", "label2id", "task_specific_params", "_attn_implementation", "_attn_implementation_autoset"),
)
# Fields of the recipe -> what every configuration of transformers calls them.
SIZES = {
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "layers": "num_hidden_layers",
    "vocab_size": "vocab_size",
}


def with_encoder(config: schema.Model) -> schema.Model:
    """`config` with what the config.json of a Hugging Face text encoder says; unchanged where it is there already, and
    for other kinds of text. Errors: UserError where it cannot be had, is of no text encoder, or contradicts the recipe.
    """
    text = config.text
    if text.kind != "hf":
        return config
    values = text.config
    if values is None:
        assert text.model is not None  # or the schema had refused it
        values = read_config(text.model)
    place = encoder_place(text)
    known = encoder_config(values, place)
    sizes = {name: getattr(known, theirs) for name, theirs in SIZES.items()}
    for name, size in sizes.items():
        # 1 is the schema's word for what config.json says.
        if getattr(text, name) not in (1, size):
            raise UserError(f"model.text.{name} is {getattr(text, name)}, but {place} has {size}: leave it out")
    values = {**values, "pad_token_id": known.pad_token_id, "eos_token_id": getattr(known, "eos_token_id", None)}
    return config.model_copy(update={"text": text.model_copy(update={**sizes, "config": values})})


def encoder_place(text: schema.TextTowerConfig) -> str:
    """How messages name the encoder's configuration."""
    return "model.text.config" if text.model is None else f"{CONFIG} of {text.model}"


def read_config(place: str) -> dict[str, Any]:
    """The config.json of a folder or hub name, without what changes nothing. Errors: UserError."""
    values = _read_json(_file(place, CONFIG) or _refuse_without(place, (CONFIG,)))
    return {name: value for name, value in values.items() if name not in LEFT_OUT}


def encoder_config(values: dict[str, Any], place: str) -> Any:
    """transformers' configuration of the encoder that `values` describe; `pad_token_id` is the end token's id where it
    has none, as with GPT-2. Errors: UserError where it is of no text encoder that can be built here.
    """
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(f"{place}: {_why_not(kind)}")
    from transformers import AutoConfig  # slow to import, and only needed here

    others = {name: value for name, value in values.items() if name not in ("model_type", "attn_implementation")}
    try:
        # Masks of true and false are made for this one; position biases are numbers, which all kinds of attention add.
        attention = None if FAMILIES[kind].attention in ("t5", "mpnet") else "sdpa"
        known = AutoConfig.for_model(kind, attn_implementation=attention, **others)
        sizes = {name: getattr(known, theirs) for name, theirs in SIZES.items()}
    except Exception as error:  # its checks raise whatever a wrong value leads them to
        raise UserError(f"{place}: no configuration of {kind} ({' '.join(str(error).split())})") from None
    for name, size in sizes.items():
        if not isinstance(size, int) or not 1 <= size <= 2**24:
            raise UserError(f"{place}: {SIZES[name]} is {size!r}, which no encoder has: copy the file again")
    if values.get("is_decoder") or values.get("add_cross_attention"):
        raise UserError(f"{place}: is a decoder (is_decoder, add_cross_attention): name a text encoder")
    if values.get("position_embedding_type", "absolute") != "absolute":
        asked = values["position_embedding_type"]
        raise UserError(
            f"{place}: position_embedding_type {asked} is not known here: name an encoder with absolute ones"
        )
    known.pad_token_id = _padding(known, place)
    return known


def weight_files(place: str) -> dict[Path, list[str]]:
    """The weight files of a folder or hub name, one, or all that its index names, with the tensors that it says are in
    each; [] where nothing says.

    Errors: UserError where there are none, or a file that the index names is missing.
    """
    for name in WEIGHTS:
        path = _file(place, name)
        if path is None:
            continue
        if not name.endswith(INDEX):
            return {path: []}
        named = named_parts(path, (".safetensors", ".bin"))
        parts = {part: _file(place, part) for part in named}
        missing = [part for part, found in parts.items() if found is None]
        if missing:
            raise UserError(
                f"{path} names {len(named)} files, but {missing[0]} is not there: copy it beside the others"
            )
        return {found: named[part] for part, found in parts.items() if found is not None}
    return {_refuse_without(place, WEIGHTS): []}


def tokenizer_files(text: schema.TextTowerConfig) -> list[Path]:
    """The files of an encoder's tokenizer; [] where its place is gone."""
    place = text.model if text.tokenizer == "model" else text.tokenizer
    try:
        found = [_file(place, name) for name in TOKENIZER] if place else []
    except UserError:
        return []
    return [path for path in found if path is not None]


def _file(place: str, name: str) -> Path | None:
    """The file `name` of a folder or hub name; None where there is none. UserError where the place cannot be had."""
    if Path(place).is_dir():
        path = Path(place) / name
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(place, name))
    except LocalEntryNotFoundError:
        # Offline, what the cache lacks may well be on the hub.
        return None
    except RemoteEntryNotFoundError:
        return None
    except Exception as error:  # network, permission and name errors of several libraries
        why = " ".join(str(error).split())
        raise UserError(f"model.text.model: {place} is no folder and cannot be downloaded ({why})") from None


def _refuse_without(place: str, names: tuple[str, ...]) -> Path:
    """UserError: none of the files is in this place."""
    wanted = " or ".join(name for name in names if not name.endswith(INDEX))
    if Path(place).is_dir():
        raise UserError(f"model.text.model: the folder {place} holds no {wanted}: copy it there")
    raise UserError(
        f"model.text.model: {place!r} is no folder, and no {wanted} of it is in the Hugging Face cache or can be "
        "downloaded: name a folder"
    )


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a bounded size; UserError for anything else."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise ValueError(f"more than {MAX_JSON_BYTES} bytes")
        values = json.loads(data.decode("utf-8-sig"), parse_constant=_no_number)
        if not isinstance(values, dict):
            raise ValueError("no object in braces")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, or no JSON ({error}): copy it again") from None
    return values


def _no_number(text: str) -> None:
    raise ValueError(f"it holds {text}")


def _padding(known: Any, place: str) -> int:
    """The id that fills rows: the padding token's, else the end token's."""
    ids = [getattr(known, name, None) for name in ("pad_token_id", "eos_token_id")]
    given = [found for found in ids if found is not None]
    if not given:
        raise UserError(f"{place}: has neither pad_token_id nor eos_token_id, so padding has no id: add one")
    if not isinstance(given[0], int) or not 0 <= given[0] < known.vocab_size:
        raise UserError(f"{place}: the padding token {given[0]} is not one of vocab_size {known.vocab_size}: mend it")
    return given[0]


def _why_not(kind: Any) -> str:
    """Why a model_type cannot be the text encoder, and which can."""
    from transformers.models.auto import modeling_auto as known

    choice = f"name one of {', '.join(FAMILIES)}"
    if not isinstance(kind, str):
        return f"says no model_type, so it is of no Hugging Face model: {choice}"
    if kind in known.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return f"{kind} is an encoder-decoder, of which only T5's encoder can be taken: {choice}"
    if (
        kind in known.MODEL_FOR_IMAGE_MAPPING_NAMES
        or kind in known.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES
    ):
        return f"{kind} is an image model, not a text encoder: {choice}"
    return f"model_type {kind[:60]!r} is not known here{nearest(kind, tuple(FAMILIES))}: {choice}"
