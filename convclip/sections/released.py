"""What `model.open_clip: NAME` stands for: open_clip's convolutional models and their released weights.

Imports no torch, so open_clip is not imported: sizes are read from the files of the installed package. Tags, pixel
statistics and parameter counts, which those files do not have, stand here (tests/models/test_released_models.py
compares them with open_clip's). A recipe is stored with everything filled in, so nothing changes under a run.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PREFIX = "hf-hub:"
# timm's convolutional families that open_clip has names with.
FAMILIES = ("convnext", "fastvit")
# Fields of open_clip's text_cfg that a text tower has here.
TEXT_SIZES = ("context_length", "vocab_size", "width", "heads", "layers")
TEXT_FIELDS = {*TEXT_SIZES, "no_causal_mask", "hf_tokenizer_name"}
# open_clip's (timm_pool, timm_proj) -> schema.ImageTowerConfig.head
HEADS = {
    ("abs_attn", ""): "attention_pool",
    ("abs_attn", "linear"): "attention_pool_linear",
    ("", "linear"): "average_linear",
    ("avg", "linear"): "average_linear",
    ("", "mlp"): "mlp",
    ("avg", "mlp"): "mlp",
    ("avg", ""): "none",
}
MOBILE = {"interpolation": "bilinear"}
PLAIN_MOBILE: dict[str, Any] = {**MOBILE, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


@dataclass(frozen=True)
class ReleasedModel:
    """A name of open_clip's. `tags`: the Hub repository of each release; `quick_gelu`: they were trained with it.

    `pixels`: fields of the image tower where they differ from the defaults.
    """

    parameters: int
    tags: dict[str, str]
    quick_gelu: bool = False
    pixels: dict[str, Any] = field(default_factory=dict)


def _laion(name: str, **tags: str) -> dict[str, str]:
    return {tag: f"laion/CLIP-{name}{rest}" for tag, rest in tags.items()}


def _resnets() -> dict[str, ReleasedModel]:
    """All releases are of QuickGELU; a name without -quickgelu takes it from the tag."""
    found: dict[str, ReleasedModel] = {}
    for name, parameters, tags in (
        ("RN50", 102_007_137, ("openai", "yfcc15m", "cc12m")),
        ("RN101", 119_688_033, ("openai", "yfcc15m")),
        ("RN50x4", 178_300_601, ("openai",)),
        ("RN50x16", 290_979_217, ("openai",)),
        ("RN50x64", 623_258_305, ("openai",)),
    ):
        repository = f"timm/resnet{name.removeprefix('RN')}_clip"
        model = ReleasedModel(parameters, {tag: f"{repository}.{tag}" for tag in tags}, quick_gelu=True)
        found |= {name: model, f"{name}-quickgelu": model}
    return found


RELEASED: dict[str, ReleasedModel] = {
    **_resnets(),
    "convnext_base": ReleasedModel(151_518_849, _laion("convnext_base", laion400m_s13b_b51k="-laion400M-s13B-b51K")),
    "convnext_base_w": ReleasedModel(
        179_385_345,
        _laion(
            "convnext_base_w",
            laion2b_s13b_b82k="-laion2B-s13B-b82K",
            laion2b_s13b_b82k_augreg="-laion2B-s13B-b82K-augreg",
            laion_aesthetic_s13b_b82k="-laion_aesthetic-s13B-b82K",
        ),
    ),
    "convnext_base_w_320": ReleasedModel(
        179_385_345,
        _laion(
            "convnext_base_w_320",
            laion_aesthetic_s13b_b82k="-laion_aesthetic-s13B-b82K",
            laion_aesthetic_s13b_b82k_augreg="-laion_aesthetic-s13B-b82K-augreg",
        ),
    ),
    "convnext_large_d": ReleasedModel(
        351_772_609, _laion("convnext_large_d", laion2b_s26b_b102k_augreg=".laion2B-s26B-b102K-augreg")
    ),
    "convnext_large_d_320": ReleasedModel(
        351_772_609,
        _laion(
            "convnext_large_d_320",
            laion2b_s29b_b131k_ft=".laion2B-s29B-b131K-ft",
            laion2b_s29b_b131k_ft_soup=".laion2B-s29B-b131K-ft-soup",
        ),
    ),
    "convnext_xxlarge": ReleasedModel(
        1_200_576_385,
        _laion(
            "convnext_xxlarge",
            laion2b_s34b_b82k_augreg="-laion2B-s34B-b82K-augreg",
            laion2b_s34b_b82k_augreg_rewind="-laion2B-s34B-b82K-augreg-rewind",
            laion2b_s34b_b82k_augreg_soup="-laion2B-s34B-b82K-augreg-soup",
        ),
    ),
    "MobileCLIP-S1": ReleasedModel(84_969_729, {"datacompdr": "apple/MobileCLIP-S1-OpenCLIP"}, pixels=PLAIN_MOBILE),
    "MobileCLIP-S2": ReleasedModel(99_243_329, {"datacompdr": "apple/MobileCLIP-S2-OpenCLIP"}, pixels=PLAIN_MOBILE),
    "MobileCLIP2-S0": ReleasedModel(74_835_073, {"dfndr2b": "timm/MobileCLIP2-S0-OpenCLIP"}, pixels=PLAIN_MOBILE),
    "MobileCLIP2-S2": ReleasedModel(99_243_329, {"dfndr2b": "timm/MobileCLIP2-S2-OpenCLIP"}, pixels=PLAIN_MOBILE),
    "MobileCLIP2-S3": ReleasedModel(248_885_953, {"dfndr2b": "timm/MobileCLIP2-S3-OpenCLIP"}, pixels=MOBILE),
    "MobileCLIP2-S4": ReleasedModel(445_435_137, {"dfndr2b": "timm/MobileCLIP2-S4-OpenCLIP"}, pixels=MOBILE),
}


def stands_for(name: Any) -> dict[str, Any]:
    """The fields of `model` that open_clip's model `name` has: embed_dim, and the sections image and text.

    Errors: ValueError of one line for a name that open_clip does not know, or a model that is not convolutional.
    """
    if not isinstance(name, str):
        raise ValueError("open_clip: give the name of one of open_clip's models, as in RN50")
    config = _configs().get(name)
    if config is None:
        near = difflib.get_close_matches(name[:100], [n for n in _configs() if _is_convolutional(n)], n=1, cutoff=0.5)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"open_clip: open_clip has no model {name[:60]!r}{hint} (train.py --list_models shows them)")
    if not _is_convolutional(name):
        raise ValueError(
            f"open_clip: {name} is no convolutional model with CLIP's text tower, the only ones that convclip takes "
            "(train.py --list_models shows them)"
        )
    return {
        "embed_dim": config["embed_dim"],
        "image": _image(name, config["vision_cfg"]),
        "text": _text(config["text_cfg"], bool(config.get("quick_gelu"))),
    }


def filled_in(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a `model` section with all that its `open_clip` stands for below what they say; without the name.

    A tag as `pretrained` becomes its Hub address, and sets the activation. Errors: ValueError of one line.
    """
    name = values["open_clip"]
    found, own = stands_for(name), {key: value for key, value in values.items() if key != "open_clip"}
    image, text = own.get("image", {}), own.get("text", {})
    if isinstance(own.get("pretrained"), str):
        own["pretrained"], quick_gelu = _place(name, own["pretrained"])
        if quick_gelu is not None:
            found["text"] |= _activation(f"{name} {values['pretrained']}", quick_gelu, text)
    if isinstance(image, dict):
        own["image"] = {**found["image"], **image}
    # Another kind of text tower has sizes of its own.
    if isinstance(text, dict) and text.get("kind", "clip") == "clip":
        own["text"] = {**found["text"], **text}
    return {"embed_dim": found["embed_dim"], **own}


def model_rows() -> list[tuple[str, ...]]:
    """The table of --list_models: name, tags, parameters, image size, head and text of every released model."""
    rows: list[tuple[str, ...]] = [("name", "tags", "parameters", "image", "head", "text")]
    for name, model in RELEASED.items():
        fields = stands_for(name)
        image, text = fields["image"], fields["text"]
        kind = "" if text["causal"] else ", no causal mask"
        kind += ", QuickGELU" if text["activation"] == "quick_gelu" else ""
        shape = f"{text['layers']} x {text['width']}{kind}"
        size = f"{model.parameters / 1e6:,.1f} M"
        rows.append((name, " ".join(model.tags), size, f"{image['image_size']} px", image["head"], shape))
    return rows


def _place(name: str, pretrained: str) -> tuple[str, bool | None]:
    """Where the weights are, and of a tag whether they are of QuickGELU. ValueError for a tag that `name` has not."""
    released = RELEASED.get(name)
    tags = released.tags if released else {}
    tag = pretrained.lower().replace("-", "_")
    if released and tag in tags:
        return f"{PREFIX}{tags[tag]}", released.quick_gelu
    # A tag has neither a dot nor a slash; a file or folder of the same name may lie here.
    if "." in pretrained or "/" in pretrained or pretrained.startswith(PREFIX) or Path(pretrained[:200]).exists():
        return pretrained, None
    known = f"its tags are {', '.join(tags)}" if tags else "it has none"
    raise ValueError(
        f"pretrained: {pretrained[:60]!r} is no tag of {name} ({known}); or name a file, a folder or {PREFIX}owner/name"
    )


def _activation(release: str, quick_gelu: bool, text: Any) -> dict[str, str]:
    """The activation that a release was trained with; ValueError where `text` says another."""
    trained = "quick_gelu" if quick_gelu else "gelu"
    said = text.get("activation", trained) if isinstance(text, dict) else getattr(text, "activation", trained)
    if said != trained:
        raise ValueError(
            f"pretrained: {release} was trained with text.activation {trained}, the recipe says {said}: leave it out"
        )
    return {"activation": trained}


def _image(name: str, config: dict[str, Any]) -> dict[str, Any]:
    pixels = RELEASED[name].pixels if name in RELEASED else {}
    image = {"backbone": name.removesuffix("-quickgelu"), "head": "attention_pool", "image_size": config["image_size"]}
    if "timm_model_name" in config:
        head = (config.get("timm_pool") or "", config.get("timm_proj") or "")
        image |= {"backbone": config["timm_model_name"], "head": HEADS[head]}
        image["drop_path"] = float(config.get("timm_drop_path") or 0.0)
    return {**image, **pixels}


def _text(config: dict[str, Any], quick_gelu: bool) -> dict[str, Any]:
    text: dict[str, Any] = {size: config[size] for size in TEXT_SIZES}
    text["causal"] = not config.get("no_causal_mask", False)
    text["activation"] = "quick_gelu" if quick_gelu else "gelu"
    return {**text, "tokenizer": config.get("hf_tokenizer_name") or "open_clip"}


def _is_convolutional(name: str) -> bool:
    """Whether a model has a convolutional image tower and a text tower of `kind: clip`."""
    config = _configs()[name]
    vision, text = config["vision_cfg"], config["text_cfg"]
    trunk = vision.get("timm_model_name")
    is_convolutional = trunk.startswith(FAMILIES) if trunk else isinstance(vision.get("layers"), list)
    return is_convolutional and text.keys() <= TEXT_FIELDS and "multimodal_cfg" not in config


@functools.cache
def _configs() -> dict[str, dict[str, Any]]:
    """open_clip's own configurations by name, from the files of the installed package."""
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise ValueError("open_clip: the package open_clip_torch is not installed: pip install open_clip_torch")
    folder = Path(package.submodule_search_locations[0]) / "model_configs"
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    return {name: config for name, config in found.items() if {"embed_dim", "vision_cfg", "text_cfg"} <= config.keys()}
