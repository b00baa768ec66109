"""Compares what a feature store was made from with what a run needs, and says in words how they differ."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convclip.schema import UserError

# How a store differs in a key of its identity; {found} is the store's value, {wanted} the one it has to have.
WORDS = {
    "kind": "it holds features of {found}, wanted are those of {wanted}",
    "weights_sha256": "made with other weights: the locked towers' weight files, or the seed of new ones",
    "teacher": "made with the teacher {found}, wanted is {wanted}",
    "teacher_sha256": "made with other weights of the teacher",
    "precision": "made in {found}, this run computes in {wanted}",
    "boundary": "it holds what enters layer group {found} of the image tower, wanted is {wanted} (0: nothing)",
    "tokenizer": "made with the tokenizer {found}, the recipe has {wanted}",
    "frames": "made with {found} frames of each video, the recipe has video.frames {wanted}",
    "words": "made with {found} words of each caption, the recipe has video.words {wanted}",
    "mask_padding": "made with mask_padding {found}, the recipe has video.mask_padding {wanted}",
    "fps": "made of a frame store with {found} frames per second, this one has {wanted}",
    "jpeg_quality": "made of a frame store with JPEG quality {found}, this one has {wanted}",
}
# Keys that say whether a locked tower's output is there, and what that output is.
HOLDS = {"text": "text embeddings", "frames_stored": "frame embeddings", "text_stored": "text embeddings"}
DATA = ("captions_sha256", "view_ids", "image_ids", "caption_ids", "video_ids")
ONE_OF_IMAGES = "an image recipe"


def check_identity(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise UserError that says how the store at `path` differs in the first key of `wanted` whose value is another."""
    for key, value in wanted.items():
        if key not in found:
            raise UserError(f"{path}: {_missing(key, found, value)}; extract again, or use another file")
        if found[key] != value:
            raise UserError(f"{path}: {_difference(key, found, wanted)}; extract again, or use another file")


def _missing(key: str, found: Mapping[str, Any], value: Any) -> str:
    if key == "kind":
        return WORDS[key].format(found=ONE_OF_IMAGES, wanted=value)
    if key == "boundary" and "kind" in found:
        return WORDS["kind"].format(found=found["kind"], wanted=ONE_OF_IMAGES)
    return f"does not say its {key}, which has to be {value!r}"


def _difference(key: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    ours, theirs = wanted[key], found[key]
    if key in DATA:
        here = f", the data now have {_counts(wanted)}" if _counts(wanted) else ", other than the data have now"
        return f"made from other training data: {_counts(found) or 'its images and captions'}{here}"
    if key in HOLDS and isinstance(theirs, bool):
        use = "needs" if ours else "has no use for"
        return f"it holds {'' if theirs else 'no '}{HOLDS[key]}, the recipe {use} them"
    if key == "transform":
        return _views(theirs, ours)
    if key == "model":
        return _model(theirs, ours)
    if key in WORDS:
        return WORDS[key].format(found=theirs, wanted=ours)
    return f"its {key} is {theirs!r}, wanted is {ours!r}"


def _counts(identity: Mapping[str, Any]) -> str:
    """`240 views and 1200 captions`: what the lists of item ids of an identity hold, by their counts."""
    lists = {key.removesuffix("_ids"): value for key, value in identity.items() if key.endswith("_ids")}
    found = [
        f"{str(value).partition(',')[0]} {kind}s"
        for kind, value in sorted(lists.items(), reverse=True)
        if kind != "score"
    ]
    return " and ".join(found)


def _views(theirs: str, ours: str) -> str:
    """The difference of two `convclip.data.transforms.Views.describe`."""
    counts = [found[1] if (found := re.search(r", (\d+) views, seed ", text)) else "1" for text in (theirs, ours)]
    if counts[0] != counts[1]:
        word = "view" if counts[0] == "1" else "views"
        return f"made with {counts[0]} {word} of each image, the recipe has {counts[1]} (features.views)"
    return f"made from other crops: {theirs}, the recipe has {ours}"


def _model(theirs: str, ours: str) -> str:
    """The first field in which two models, each as JSON, differ."""
    try:
        fields = [_flat(json.loads(text)) for text in (theirs, ours)]
    except (ValueError, AttributeError):
        return f"its model is {theirs!r}, wanted is {ours!r}"
    for name in sorted(fields[0].keys() | fields[1].keys()):
        found, wanted = (side.get(name, "not set") for side in fields)
        if found != wanted:
            return f"made with another model: model.{name} {found}, the recipe has {wanted}"
    return "made with another model"


def _flat(values: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """Nested fields by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{place}{key}.") if isinstance(value, dict) else {f"{place}{key}": value}
    return flat
