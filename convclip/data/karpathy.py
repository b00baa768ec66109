"""Annotations as Karpathy's splits come, turned into COCO's layout. Imports no torch.

dataset_coco.json, dataset_flickr8k.json, dataset_flickr30k.json:
    {"images": [{"filename", "filepath"?, "split", "imgid", "cocoid"?, "sentences": [{"raw", "sentid"}, …]}, …]}
the flat list that retrieval code passes on, with one caption or several, and an image on one row or several:
    [{"image": "val2014/COCO_val2014_000000391895.jpg", "caption": "…" or ["…", …]}, …]
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from convclip.schema import UserError

# Karpathy's COCO files keep the images of the old validation set apart; all who report on his split train on both.
TRAIN = ("train", "restval")


def as_coco(annotations: Path, content: Any, split: str | None) -> dict[str, list[Any]] | None:
    """`content` in COCO's layout: keys images and annotations; None where it is neither of the two above.

    Args:
        split: images of this split only, where the file names splits; `train` takes `restval` too.

    Image ids are cocoid where every image has one, else imgid, else places in the file; caption ids are sentid, else
    running numbers. `filepath` is the sub-folder of the images' folder that an image lies in.

    Raises:
        UserError: the file has splits and `split` is none of them, or an entry is malformed.
    """
    if isinstance(content, list):
        return _from_flat(annotations, content)
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list) or "annotations" in content:
        return None
    if not any(isinstance(image, dict) and "sentences" in image for image in images):
        return None
    for number, image in enumerate(images):
        if not _is_karpathy(image):
            raise UserError(f"{annotations}: image {number} has no filename and sentences with a raw caption each")
    return _from_karpathy(_chosen(annotations, images, split))


def _chosen(annotations: Path, images: list[dict[str, Any]], split: str | None) -> list[dict[str, Any]]:
    counts = Counter(str(image["split"]) for image in images if "split" in image)
    if not counts:
        return images
    wanted = TRAIN if split == "train" else (split,)
    if not any(counts[name] for name in wanted if name is not None):
        held = ", ".join(f"{name} ({count:,} images)" for name, count in sorted(counts.items()))
        told = "no --split was given" if split is None else f"--split {split} is none of them"
        raise UserError(f"{annotations} has the splits {held}: {told}")
    return [image for image in images if str(image.get("split")) in wanted]


def _from_karpathy(images: list[dict[str, Any]]) -> dict[str, list[Any]]:
    key = next((key for key in ("cocoid", "imgid") if all(key in image for image in images)), None)
    numbered = all("sentid" in sentence for image in images for sentence in image["sentences"])
    listed: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for number, image in enumerate(images):
        image_id = number if key is None else image[key]
        folder = f"{image['filepath']}/" if image.get("filepath") else ""
        listed.append({"id": image_id, "file_name": folder + image["filename"]})
        for sentence in image["sentences"]:
            row_id = sentence["sentid"] if numbered else len(rows)
            rows.append({"id": row_id, "image_id": image_id, "caption": sentence["raw"]})
    return {"images": listed, "annotations": rows}


def _from_flat(annotations: Path, entries: list[Any]) -> dict[str, list[Any]]:
    ids: dict[str, int] = {}
    rows: list[dict[str, Any]] = []
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
            raise UserError(f"{annotations}: entry {number} is no object with an image and its caption")
        captions = entry.get("caption")
        captions = captions if isinstance(captions, list) else [captions]
        image_id = ids.setdefault(entry["image"], len(ids))
        rows += [
            {"id": len(rows) + place, "image_id": image_id, "caption": text} for place, text in enumerate(captions)
        ]
    return {"images": [{"id": number, "file_name": name} for name, number in ids.items()], "annotations": rows}


def _is_karpathy(image: Any) -> bool:
    return (
        isinstance(image, dict)
        and isinstance(image.get("filename"), str)
        and isinstance(image.get("filepath", ""), str)
        and isinstance(image.get("sentences"), list)
        and all(isinstance(s, dict) and isinstance(s.get("raw"), str) for s in image["sentences"])
    )
