"""Tiny shards, pictures and a tokenizer whose output says which caption it read."""

import io
import json
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image

GREY_STEP = 4


def picture(number: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A grey picture whose brightness is 4 x number, so that pixels tell which image they come from (number < 64)."""
    return Image.new("RGB", size, (GREY_STEP * number,) * 3)


def jpeg(image: Image.Image, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", **options)
    return stream.getvalue()


def noise_jpeg(seed: int = 0, size: tuple[int, int] = (64, 48), **options) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return jpeg(Image.fromarray(pixels), **options)


def caption(image: int, number: int) -> str:
    return f"{image} {number}"


def sample(image: int, captions: int = 5) -> dict[str, bytes]:
    """One of our samples: caption k of image i has id 100 i + k."""
    content = {
        "image_id": image,
        "captions": [caption(image, number) for number in range(captions)],
        "caption_ids": [100 * image + number for number in range(captions)],
    }
    return {"jpg": jpeg(picture(image)), "json": json.dumps(content).encode()}


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    """A shard of `{key: {suffix: bytes}}`, by webdataset's writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # encoder=False: the bytes as they are, broken ones too.
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for key, members in samples.items():
            writer.write({"__key__": key, **members})
    return path


def write_shards(folder: Path, sizes: list[int], captions=lambda image: 5, split: str = "train") -> str:
    """Shards of our own layout holding images 0..; returns their brace pattern."""
    image = 0
    for number, size in enumerate(sizes):
        samples = {f"{i:012d}": sample(i, captions(i)) for i in range(image, image + size)}
        write_tar(folder / f"{split}-{number:06d}.tar", samples)
        image += size
    return str(folder / f"{split}-{{000000..{len(sizes) - 1:06d}}}.tar")


def write_index(folder: Path, entries: list[dict], split: str = "train") -> Path:
    path = folder / f"{split}.index.json"
    path.write_text(json.dumps({"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": entries}))
    return path


def read_back(texts: list[str]) -> torch.Tensor:
    """A tokenizer: "12 3" -> [12, 3]."""
    return torch.tensor([[int(word) for word in text.split()] for text in texts]).view(-1, 2)
