"""Annotations in COCO's layout: `images[]{id, file_name}` and `annotations[]{id, image_id, caption}`.

COCO's own captions_*.json and any data set written the same way (make_demo_data.py); Karpathy's files are turned into
this layout first (karpathy.py). Imports no torch.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from convclip.data.karpathy import as_coco
from convclip.data.local_files import read_json
from convclip.schema import UserError

# Image and caption ids travel as int64 in a batch.
MAX_ID = 2**63 - 1
# JSON can spell half a character (\\ud83d), which no UTF-8 file can hold.
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class CocoImage:
    """One image with its captions, in the order in which the annotations name them. Captions are verbatim."""

    image_id: int
    file_name: str
    captions: tuple[str, ...]
    caption_ids: tuple[int, ...]


def read_coco(annotations: Path, split: str | None = None) -> list[CocoImage]:
    """Read an annotations file (.json or .json.gz) into one entry per image, in the file's order.

    COCO's layout or Karpathy's; `split` chooses the images where a file has several splits (karpathy.py says how).

    Captions of white space only are left out, so an image may have none. UserError names the file and, where it
    concerns many entries, their count and the first three: not JSON, a missing key, a value of the wrong type, an id
    that stands twice, a file name that leaves the images' folder, an annotation of an image that is not listed, text
    that no UTF-8 file can hold.
    """
    table = _load(annotations, split)
    images, rows = table["images"], table["annotations"]
    _check(annotations, "images entries without an integer id and a file_name", images, _is_image)
    _check(annotations, "images entries with a file_name outside the images' folder", images, _stays_inside)
    _check(annotations, "annotations without an integer id, image_id and a caption", rows, _is_annotation)
    _check(annotations, "annotations with half a character (a lone surrogate) in the caption", rows, _is_text)
    captions: dict[int, list[tuple[str, int]]] = {image["id"]: [] for image in images}
    if len(captions) != len(images):
        raise UserError(f"{annotations}: {len(images) - len(captions)} of {len(images)} image ids stand more than once")
    if len({row["id"] for row in rows}) != len(rows):
        raise UserError(f"{annotations}: some annotation ids stand more than once")
    _check(annotations, "annotations of images that it does not list", rows, lambda row: row["image_id"] in captions)
    for row in rows:
        if row["caption"].strip():
            captions[row["image_id"]].append((row["caption"], row["id"]))
    return [
        CocoImage(
            image["id"],
            image["file_name"],
            tuple(caption for caption, _ in captions[image["id"]]),
            tuple(caption_id for _, caption_id in captions[image["id"]]),
        )
        for image in images
    ]


def missing_files(images: Sequence[CocoImage], folder: Path, remedy: str | None = None) -> list[str]:
    """File names of `images` that `folder` does not hold, in the images' order.

    With `remedy` a missing file is a UserError: their count, the first three names and the remedy. So is no folder.
    """
    try:
        present = set(os.listdir(folder))
    except OSError as error:
        raise UserError(f"images folder {folder} cannot be read: {error.strerror}") from None
    # One listing serves 100,000 plain names; only names with a sub-folder are looked up one by one.
    missing = [
        image.file_name
        for image in images
        if image.file_name not in present and not ("/" in image.file_name and os.path.isfile(folder / image.file_name))
    ]
    if missing and remedy:
        shown = _first_three([repr(name) for name in missing])
        raise UserError(f"{folder} lacks {len(missing)} of {len(images)} image files{shown}: {remedy}")
    return missing


def _load(annotations: Path, split: str | None) -> dict[str, list[Any]]:
    content = read_json(annotations, "annotations")
    table = as_coco(annotations, content, split) or content
    for key in ("images", "annotations"):
        if not isinstance(table, dict) or not isinstance(table.get(key), list):
            raise UserError(
                f"annotations {annotations}: no list under the key {key!r}, so neither COCO's caption layout nor "
                "Karpathy's (images with sentences, or a list of image and caption)"
            )
    return table


def _check(annotations: Path, problem: str, entries: list[Any], is_right: Callable[[Any], bool]) -> None:
    wrong = [entry for entry in entries if not is_right(entry)]
    if wrong:
        shown = _first_three([json.dumps(entry)[:80] for entry in wrong])
        raise UserError(f"{annotations}: {len(wrong)} {problem}{shown}")


def _first_three(names: Sequence[str]) -> str:
    return f" ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_ID


def _is_image(entry: Any) -> bool:
    return isinstance(entry, dict) and _is_id(entry.get("id")) and isinstance(entry.get("file_name"), str)


def _stays_inside(image: dict[str, Any]) -> bool:
    path = PurePosixPath(image["file_name"])
    outside = path.is_absolute() or ".." in path.parts or "\0" in image["file_name"]
    return bool(path.name) and not outside and not SURROGATE.search(image["file_name"])


def _is_text(annotation: dict[str, Any]) -> bool:
    return not SURROGATE.search(annotation["caption"])


def _is_annotation(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and _is_id(entry.get("id"))
        and _is_id(entry.get("image_id"))
        and isinstance(entry.get("caption"), str)
    )
