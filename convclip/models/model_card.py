"""The model card of an export: README.md, whose head Hugging Face reads, and in words what the model is."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path

from convclip import schema
from convclip.models.dual_tower import DualTower

CARD = "README.md"
MAX_CHARACTERS = 2**16
# Packages that decide on what a model gives.
_VERSIONS = ("convclip", "torch", "timm", "open_clip_torch", "transformers")


def model_card(
    model: DualTower, config: schema.Model, library: str, loading: Sequence[str], about: str = "", use: str = ""
) -> str:
    """README.md of an export: `about` says where the weights come from, the Python lines `loading` load it with
    `library`, and `use` says what these need to know. At most MAX_CHARACTERS.
    """
    versions = ", ".join(f"{name} {_version(name)}" for name in _VERSIONS)
    parts = (
        f"---\nlibrary_name: {library}\npipeline_tag: zero-shot-image-classification\ntags:\n- clip\n- convclip\n"
        "# license: not chosen; say here under which one you give the model away.\n---",
        f"# {config.image.backbone} with {config.text.kind} text",
        _sizes(model, config),
        "## How to load it\n\nFrom the folder that holds this one:",
        "```python\n" + "\n".join(loading) + "\n```",
        use,
        about or "Where its weights come from was not said when it was exported.",
        f"## Versions\n\nExported with {versions}.",
    )
    text = "\n\n".join(part for part in parts if part)
    return text[:MAX_CHARACTERS].rstrip() + "\n"


def quoted(folder: Path, name: str = "") -> str:
    """`folder`, or a file in it, as a Python string: its own name alone, as the card may travel."""
    return json.dumps(f"{folder.absolute().name}{'/' if name else ''}{name}")


def how_images_enter(config: schema.Model) -> str:
    """How images are prepared, in a sentence."""
    image = config.image
    side = image.image_size
    return (
        f"Images: RGB, the shorter side resized to {side} pixels ({config.image.interpolation}), the middle "
        f"{side} x {side} cut out, values from 0 to 1, minus {list(image.mean)}, divided by {list(image.std)}."
    )


def _sizes(model: DualTower, config: schema.Model) -> str:
    """Both towers in a paragraph."""
    image, text = config.image, config.text
    counts = [sum(p.numel() for p in tower.parameters()) for tower in (model.visual, model.text)]
    kind = text.kind if text.config is None else f"{text.config['model_type']} ({text.pool} pooling)"
    return (
        f"A CLIP model: images and captions become vectors of {config.embed_dim} numbers whose cosine says how well "
        f"they match. Image tower: {image.backbone}, head {image.head}, {image.image_size} pixels, {counts[0]:,} "
        f"parameters. Text tower: {kind}, {text.layers} layers of width {text.width}, {text.context_length} tokens at "
        f"most, {counts[1]:,} parameters."
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
