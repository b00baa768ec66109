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
# Fields of an image recipe's model that no stored feature comes from.
NEVER_STORED = ("init_logit_scale", "init_logit_bias")
# An image recipe's head always trains, above what is stored, which is all the same for heads that begin alike: these
# take the trunk's map, or what its own pool makes of that, as those they stand for.
HEAD_LIKE = {"attention_pool_linear": "attention_pool", "mlp": "average_linear"}


def check_identity(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise UserError that says how the store at `path` differs in the first key of `wanted` whose value is another."""
    difference = identity_difference(found, wanted)
    if difference is not None:
        raise UserError(f"{path}: {difference}; extract again, or use another file")


def identity_difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """How a store of identity `found` differs, in words, in the first key of `wanted` that is another; None: nowhere.

    Of an image recipe's model counts only what the stored features come from.
    """
    for key, value in wanted.items():
        if key not in found:
            return _missing(key, found, value)
        if found[key] != value and not (key == "model" and _stores_alike(found, wanted)):
            return _difference(key, found, wanted)
    return None


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


def _stores_alike(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether two models differ only in what no stored feature of theirs comes from."""
    # A video's locked head is stored, too.
    if "kind" in found or "text" not in wanted or found.get("text") != wanted["text"]:
        return False
    sides = []
    for identity in (found, wanted):
        try:
            fields = flat(json.loads(identity["model"]))
        except (ValueError, AttributeError):
            return False
        kept = {name: value for name, value in fields.items() if name not in NEVER_STORED}
        head = str(fields.get("image.head"))
        kept["image.head"] = HEAD_LIKE.get(head, head)
        if not wanted["text"]:
            kept = {name: value for name, value in kept.items() if name.startswith("image.")}
        sides.append(kept)
    return sides[0] == sides[1]


def _model(theirs: str, ours: str) -> str:
    """The first field in which two models, each as JSON, differ; one that matters to a store where there is any."""
    try:
        fields = [flat(json.loads(text)) for text in (theirs, ours)]
    except (ValueError, AttributeError):
        return f"its model is {theirs!r}, wanted is {ours!r}"
    for name in sorted(fields[0].keys() | fields[1].keys(), key=lambda name: (name in NEVER_STORED, name)):
        found, wanted = (side.get(name, "not set") for side in fields)
        if found != wanted:
            return f"made with another model: model.{name} {found}, the recipe has {wanted}"
    return "made with another model"


def flat(values: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """Nested fields by their dotted names."""
    fields: dict[str, Any] = {}
    for key, value in values.items():
        fields |= flat(value, f"{place}{key}.") if isinstance(value, dict) else {f"{place}{key}": value}
    return fields
