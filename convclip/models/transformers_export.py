"""Export to transformers: a folder that `VisionTextDualEncoderModel` loads without code of its own.

What that model can hold exactly: an image tower of timm (its `TimmWrapperModel`) whose pooled output goes through one
linear map, so head average_linear; and a text tower whose pooled output goes through another. Of our text towers that
is open_clip's causal one, as `CLIPTextModel`. BERT's relatives pool there by a linear map and tanh, which none of our
towers has; MPNet, DistilBERT, ModernBERT, T5 and GPT-2 have no pooled output there, or that same one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from convclip import schema
from convclip.files import whole_folder
from convclip.models.dual_tower import DualTower
from convclip.models.export import refuse_in_use
from convclip.models.hf_folder import with_encoder
from convclip.models.model_card import CARD, model_card, quoted
from convclip.models.timm_image import TimmImage
from convclip.schema import UserError

WEIGHTS = "model.safetensors"
# open_clip's name of a module of a block -> CLIPTextModel's.
_BLOCK = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "attn.out_proj.": "self_attn.out_proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
_RESAMPLE = {"bilinear": 2, "bicubic": 3}
# What open_clip's byte-pair tokenizer calls its special tokens, and CLIPTokenizer.
_SPECIAL = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}


def export_transformers(model: DualTower, config: schema.Model, folder: str | Path, about: str = "") -> list[str]:
    """Write `model` to a new `folder` for transformers, whole or not at all; notes for its user, in lines.

    With config.json, weights, preprocessor, open_clip's tokenizer as CLIPTokenizer, and a model card with `about`.
    Errors: UserError where transformers has no equal model, or the folder cannot be written.
    """
    refuse_other_towers(config)
    folder, config = Path(folder), with_encoder(config)
    refuse_in_use(folder)
    with torch.device("meta"):
        theirs = _their_model(model, config)
    tensors = _their_tensors(model)
    expected = {name: value.shape for name, value in theirs.state_dict().items()}
    wrong = sorted(expected.items() ^ {name: value.shape for name, value in tensors.items()}.items())
    if wrong:
        # Names of 5.0's CLIPTextModel were others.
        raise UserError(
            f"this transformers builds the model differently ({wrong[0][0]}): pip install -U transformers, or use "
            "--format open_clip"
        )
    own_tokenizer = config.text.tokenizer == "open_clip"
    theirs.config.architectures = [type(theirs).__name__]
    card = _card(model, config, folder, about, own_tokenizer)
    try:
        with whole_folder(folder) as part:
            theirs.config.save_pretrained(part)
            save_file(tensors, part / WEIGHTS, metadata={"format": "pt"})
            (part / "preprocessor_config.json").write_text(json.dumps(_preprocessor(config), indent=2) + "\n")
            if own_tokenizer:
                _write_tokenizer(part, config.text.context_length)
            (part / CARD).write_text(card, encoding="utf-8")
    except SafetensorError as error:
        raise UserError(f"{folder} cannot be written: {str(error).splitlines()[0]}") from None
    if own_tokenizer:
        return []
    return [f"the tokenizer is not exported: its ids are those of {config.text.tokenizer}, then one end token"]


def refuse_other_towers(config: schema.Model) -> None:
    """UserError for a model that transformers has no equal of, in one line that names the tower."""
    image, text = config.image, config.text
    why = ""
    if text.kind != "clip":
        kind = text.kind if text.config is None else text.config["model_type"]
        why = f"text of kind {kind} (no text model there gives such an encoder's {text.pool} pooling as its output)"
    elif not text.causal:
        why = "a text tower without a causal mask"
    elif image.head != "average_linear":
        why = f"head {image.head} (what follows its trunk is an average pool and a linear map, average_linear here)"
    elif config.init_logit_bias is not None:
        why = "a logit bias"
    if why:
        raise UserError(
            f"transformers' VisionTextDualEncoderModel cannot hold {why}; use --format open_clip or --format onnx"
        )


def _their_model(model: DualTower, config: schema.Model) -> Any:
    """VisionTextDualEncoderModel of the same sizes, on the present device."""
    import transformers  # slow to import, and only needed here

    image, text = config.image, config.text
    assert isinstance(model.visual, TimmImage)  # or its head had been refused
    # hidden_size is what the dual encoder reads of every vision model; timm's have none of their own.
    sizes: dict[str, Any] = {
        "architecture": image.backbone,
        "model_args": {"drop_path_rate": image.drop_path} if image.drop_path else {},
        "hidden_size": model.visual.head.get_parameter("proj.weight").shape[1],
        "num_labels": 0,
    }
    words = transformers.CLIPTextConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.width,
        intermediate_size=4 * text.width,
        projection_dim=config.embed_dim,
        num_hidden_layers=text.layers,
        num_attention_heads=text.heads,
        max_position_embeddings=text.context_length,
        hidden_act=text.activation,
        layer_norm_eps=1e-5,
        bos_token_id=text.vocab_size - 2,
        # Its word for pooling at the first highest id, as open_clip does.
        eos_token_id=2,
        pad_token_id=text.vocab_size - 1,
    )
    both = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        transformers.TimmWrapperConfig(**sizes), words, projection_dim=config.embed_dim, dtype="float32"
    )
    return transformers.VisionTextDualEncoderModel(both)


def _their_tensors(model: DualTower) -> dict[str, Tensor]:
    """The weights under transformers' names."""
    found: dict[str, Tensor] = {"logit_scale": model.logit_scale.reshape(())}
    for name, value in model.visual.state_dict().items():
        trunk = name.removeprefix("trunk.")
        found["visual_projection.weight" if name == "head.proj.weight" else f"vision_model.timm_model.{trunk}"] = value
    for name, value in model.text.state_dict().items():
        if name == "text_projection":
            found["text_projection.weight"] = value.T
        elif name.startswith("transformer.resblocks."):
            number, _, rest = name.removeprefix("transformer.resblocks.").partition(".")
            found |= {f"text_model.encoder.layers.{number}.{own}": part for own, part in _of_block(rest, value).items()}
        else:
            found[_OUTSIDE[name]] = value
    return {name: value.detach().cpu().float().clone().contiguous() for name, value in found.items()}


_OUTSIDE = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}


def _of_block(name: str, value: Tensor) -> dict[str, Tensor]:
    """A tensor of a block under CLIPTextModel's names; attention's first map is three there."""
    if name.startswith("attn.in_proj_"):
        kind = name.removeprefix("attn.in_proj_")
        return {f"self_attn.{part}_proj.{kind}": rows for part, rows in zip("qkv", value.chunk(3), strict=True)}
    module, _, kind = name.rpartition(".")
    return {f"{_BLOCK[f'{module}.']}{kind}": value}


def _preprocessor(config: schema.Model) -> dict[str, Any]:
    """preprocessor_config.json: the evaluation's resizing, crop and normalisation."""
    image = config.image
    side = image.image_size
    values: dict[str, Any] = {"image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True}
    values |= {"do_resize": True, "size": {"shortest_edge": side}, "resample": _RESAMPLE[image.interpolation]}
    values |= {"do_center_crop": True, "crop_size": {"height": side, "width": side}}
    values |= {"do_rescale": True, "rescale_factor": 1 / 255}
    return values | {"do_normalize": True, "image_mean": list(image.mean), "image_std": list(image.std)}


def _write_tokenizer(folder: Path, context_length: int) -> None:
    """open_clip's byte pairs as CLIPTokenizer reads them."""
    from open_clip.tokenizer import SimpleTokenizer

    own = SimpleTokenizer()
    vocabulary = {_SPECIAL.get(token, token): number for token, number in own.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    merges = "".join(f"{first} {second}\n" for first, second in own.bpe_ranks)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    both = {"processor_class": "VisionTextDualEncoderProcessor"}
    (folder / "processor_config.json").write_text(json.dumps(both) + "\n", encoding="utf-8")


def _card(model: DualTower, config: schema.Model, folder: Path, about: str, own_tokenizer: bool) -> str:
    processor = "VisionTextDualEncoderProcessor" if own_tokenizer else "AutoImageProcessor"
    loading = (
        f"from transformers import VisionTextDualEncoderModel, {processor}",
        f"model = VisionTextDualEncoderModel.from_pretrained({quoted(folder)}).eval()",
        f"processor = {processor}.from_pretrained({quoted(folder)})",
    )
    if own_tokenizer:
        given = "**processor(text=captions, images=images, padding=True, truncation=True, return_tensors='pt')"
    else:
        given = "input_ids=tokens, **processor(images, return_tensors='pt')"
    use = f"`model({given})` gives embeddings and logits."
    if not own_tokenizer:
        use += " `tokens` are the ids of a caption by its own tokenizer, then one end token, then anything."
    return model_card(model, config, "transformers", loading, about, use)
