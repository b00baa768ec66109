"""Export: a folder that unmodified open_clip loads with `create_model_and_transforms("local-dir:FOLDER")`.

A tower that has no counterpart there (`Tower.open_clip_config` is None) is exported as safetensors under our own names.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIP, CustomTextCLIP
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from convclip import schema
from convclip.files import whole_folder, writing
from convclip.models.checkpoint_files import checksum
from convclip.models.dual_tower import DualTower, build_model
from convclip.models.hf_folder import CONFIG, tokenizer_files, with_encoder
from convclip.models.model_card import CARD, model_card, quoted
from convclip.models.weights import CHECKSUMS, CONFIG_FILE, load_exact, metadata_of
from convclip.schema import UserError

OUR_CONFIG = "convclip_model.json"
# Key of open_clip's model_cfg that makes a CustomTextCLIP.
CUSTOM_TEXT = "custom_text"
# Key of the weights' metadata: what of the configuration decides on the output.
MODEL = "model"
# Fields that name files, which may lie elsewhere later.
PLACES = ("pretrained", "tokenizer", "model")


@dataclass(frozen=True)
class Export:
    """The folder written, whether open_clip loads it, and what its user must know (may be empty)."""

    folder: Path
    for_open_clip: bool
    note: str


def refuse_in_use(folder: Path) -> None:
    """UserError where something is in `folder`, it is a file, or no place for one."""
    with writing(folder):
        in_use = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if in_use:
        raise UserError(f"{folder}: already holds files, name a new folder")


def export_open_clip(model: DualTower, config: schema.Model, folder: str | Path, about: str = "") -> Export:
    """Write `model`, built from `config` and holding all its weights, to a new `folder`; whole or not at all.

    Always holds convclip_model.json for `load_export`, and the weights; for open_clip also open_clip_config.json. With
    a Hugging Face text encoder, its config.json and its tokenizer's files come along. Its README.md is a model card
    that says `about`, where the weights come from.
    Errors: UserError when the folder holds files, cannot be written, or open_clip would build another model.
    """
    folder = Path(folder)
    refuse_in_use(folder)
    config = with_encoder(config)
    theirs = open_clip_config(model, config)
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    built = _as_built(config)
    files: dict[str, Any] = {OUR_CONFIG: config.model_dump(mode="json")}
    note, copied = "", []
    if config.text.config is not None:
        files[CONFIG], copied = config.text.config, tokenizer_files(config.text)
        note = "" if copied else "the text encoder's tokenizer is gone from its place: copy its files into the folder"
    if theirs is not None:
        files[CONFIG_FILE] = theirs
        tensors = _open_clip_tensors(model, tensors, theirs["model_cfg"], config.text.config)
        if config.text.config is not None:
            place = str(folder.absolute())
            theirs["model_cfg"]["text_cfg"] |= {"hf_model_name": place, "hf_tokenizer_name": place}
            moved = f"{CONFIG_FILE} names this folder as hf_model_name: change it there when the folder moves"
            note = f"{note}; {moved}" if note else moved
        elif config.text.tokenizer != "open_clip":
            note = f"open_clip will look for the tokenizer {config.text.tokenizer} in the folder: copy its files there"
    else:
        text = config.text
        kind = text.kind if text.config is None else f"{text.pool}-pooled {text.config['model_type']}"
        towers = f"{config.image.backbone} with {kind} text"
        if model.visual.open_clip_config(config) is None:
            towers = f"{config.image.head} for {config.image.backbone}, whose width 64 does not divide"
        only = f"open_clip has no {towers}: exported as safetensors, for convclip only"
        note = f"{note}; {only}" if note else only
    weights = "model.safetensors" if theirs is None else "open_clip_model.safetensors"
    card = _card(model, config, folder, theirs is not None, about)
    _write(folder, files, tensors, built, weights, copied, card)
    return Export(folder, theirs is not None, note)


def load_export(folder: str | Path) -> tuple[DualTower, schema.Model]:
    """The model of an exported folder, in eval mode, and its configuration. Errors: UserError when it is no export."""
    path = Path(folder) / OUR_CONFIG
    try:
        config = schema.Model.model_validate_json(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise UserError(f"{path}: no model configuration of an export: {str(error).splitlines()[0]}") from None
    model = build_model(config)
    load_exact(model, folder)
    # Exports of 0.1.0 do not say it.
    built = metadata_of(folder).get(MODEL)
    if built not in (None, _as_built(config)):
        raise UserError(f"{path} was changed, its weights were exported with {built}: put it back, or export again")
    return model.eval(), config


def _as_built(config: schema.Model) -> str:
    """What of a configuration decides on a model's output, as JSON: all but the places of files."""
    values = config.model_dump(mode="json", context=schema.AS_BEFORE)
    without_places = {
        key: {k: v for k, v in value.items() if k not in PLACES} if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in PLACES
    }
    return json.dumps(without_places, sort_keys=True)


def open_clip_config(model: DualTower, config: schema.Model) -> dict[str, Any] | None:
    """What open_clip_config.json says of `model`: {"model_cfg", "preprocess_cfg"}; None where open_clip has none."""
    vision, text_cfg = model.visual.open_clip_config(config), model.text.open_clip_config(config)
    if vision is None or text_cfg is None:
        return None
    image = config.image
    preprocess: dict[str, Any] = {"mean": list(image.mean), "std": list(image.std)}
    preprocess |= {"interpolation": image.interpolation, "resize_mode": "shortest"}
    model_cfg: dict[str, Any] = {"embed_dim": config.embed_dim, "vision_cfg": vision, "text_cfg": text_cfg}
    if config.text.activation == "quick_gelu":
        model_cfg["quick_gelu"] = True
    # As open_clip's own configurations: without a causal mask the text tower is one module.
    if not config.text.causal:
        model_cfg[CUSTOM_TEXT] = True
    if config.init_logit_bias is not None:
        model_cfg["init_logit_bias"] = config.init_logit_bias
    return {"model_cfg": model_cfg, "preprocess_cfg": preprocess}


def _open_clip_tensors(
    model: DualTower, tensors: dict[str, Tensor], model_cfg: dict[str, Any], encoder: dict[str, Any] | None
) -> dict[str, Tensor]:
    """Tensors under the names of open_clip's CLIP or CustomTextCLIP, checked against the model it will build.

    `encoder`: the configuration of a Hugging Face text encoder.
    """
    custom = model_cfg.get(CUSTOM_TEXT, False) or encoder is not None
    text = "text." if custom else ""
    renamed = {}
    for name, value in tensors.items():
        part, _, own = name.partition(".")
        name = f"visual.{model.visual.exported_name(own)}" if part == "visual" else name
        renamed[f"{text}{model.text.exported_name(own)}" if part == "text" else name] = value
    renamed |= {name: renamed[name].reshape(()) for name in ("logit_scale", "logit_bias") if name in renamed}
    refusal = "open_clip builds this backbone differently, so it cannot be exported to it:"
    sizes = {key: value for key, value in model_cfg.items() if key != CUSTOM_TEXT}
    try:
        with torch.device("meta"), tempfile.TemporaryDirectory() as place:
            if encoder is not None:
                (Path(place) / CONFIG).write_text(json.dumps(encoder), encoding="utf-8")
                sizes["text_cfg"] = {**sizes["text_cfg"], "hf_model_name": place}
            theirs = (CustomTextCLIP if custom else CLIP)(**sizes).state_dict()
    except (AssertionError, RuntimeError, TypeError) as error:
        raise UserError(f"{refusal} {type(error).__name__} {error}".strip()) from None
    wrong = sorted(theirs.keys() ^ renamed.keys())
    for name in sorted(theirs.keys() & renamed.keys()):
        here, there = tuple(renamed[name].shape), tuple(theirs[name].shape)
        wrong += [f"{name} is {here} here and {there} there"] if here != there else []
    if wrong:
        raise UserError(f"{refusal} {wrong[0]}; --format onnx of tools/export.py takes it")
    return renamed


def _card(model: DualTower, config: schema.Model, folder: Path, for_open_clip: bool, about: str) -> str:
    if for_open_clip:
        place = quoted(folder).replace('"', '"local-dir:', 1)
        loading = (
            "import open_clip",
            f"model, _, transform = open_clip.create_model_and_transforms({place})",
            f"tokenizer = open_clip.get_tokenizer({place})",
        )
        return model_card(model, config, "open_clip", loading, about)
    loading = ("import convclip", f"clip = convclip.load({quoted(folder)})", 'texts = clip.embed_texts(["a dog"])')
    return model_card(model, config, "convclip", loading, about)


def _write(
    folder: Path,
    files: dict[str, dict[str, Any]],
    tensors: dict[str, Tensor],
    built: str,
    weights: str,
    copied: list[Path],
    card: str,
) -> None:
    try:
        with whole_folder(folder) as part:
            for name, content in files.items():
                (part / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            (part / CARD).write_text(card, encoding="utf-8")
            for path in copied:
                shutil.copyfile(path, part / path.name)
            metadata = {"format": "pt", CHECKSUMS: json.dumps({name: checksum(t) for name, t in tensors.items()})}
            save_file(tensors, part / weights, metadata={**metadata, MODEL: built})
    except SafetensorError as error:
        raise UserError(f"{folder} cannot be written: {str(error).splitlines()[0]}") from None
