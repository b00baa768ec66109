"""What every source of samples offers, and the bounded decoding of an image."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image
from tqdm import tqdm

from convclip.data.pixels import FORMATS, PLAIN, plain_picture
from convclip.distributed import is_main

# A caption beyond this is no caption; one word of a million letters takes the tokenizer hours.
MAX_CAPTION = 10_000


class BrokenSample(Exception):
    """A sample that cannot be used; the message names it and says why."""


@dataclass(frozen=True)
class Captions:
    """The captions of one image: `ids` are as long as `texts`."""

    image_id: int
    texts: list[str]
    ids: list[int]

    def usable(self, name: str, number: int) -> str:
        """Caption `number`; BrokenSample when there is none, only blanks, undecodable bytes, or too many characters."""
        if number >= len(self.texts):
            raise BrokenSample(f"{name}: has {len(self.texts)} captions, not the {number + 1} its table promises")
        text = self.texts[number]
        if not text.strip():
            raise BrokenSample(f"{name}: caption {number} is empty")
        if len(text) > MAX_CAPTION:
            raise BrokenSample(f"{name}: caption {number} has {len(text)} characters, more than {MAX_CAPTION}")
        # CSV files are decoded with surrogateescape, so that one bad byte costs one row and not the file.
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise BrokenSample(f"{name}: caption {number} is not UTF-8")
        return text


class SampleSource(Protocol):
    """N images with their captions, read in any order. `read_captions` and `read_image` raise BrokenSample."""

    counts: np.ndarray
    """int64 [N]: captions of each image, at least 1."""
    shard: np.ndarray
    """int32 [N], ascending: number of the shard an image lies in."""
    damage: list[str]
    """A line for each shard of which a part cannot be read."""
    lost: int
    """About how many samples that part held."""

    def describe(self) -> str:
        """One line for the log."""

    def name(self, image: int) -> str:
        """What the log calls this image."""

    def read_captions(self, image: int) -> Captions:
        """All captions of an image, as stored."""

    def read_image(self, image: int) -> bytes:
        """The image file's bytes."""


def captions_fingerprint(source: SampleSource) -> str:
    """SHA-256 of every image's id and captions, in order: changes when the captions do, not when images move."""
    digest = hashlib.sha256()
    for image in tqdm(range(len(source.counts)), "reading captions", delay=2, disable=not is_main()):
        try:
            found = source.read_captions(image)
        except BrokenSample:
            continue
        digest.update(json.dumps([found.image_id, found.texts, found.ids]).encode("ascii"))
    return digest.hexdigest()


def open_image(name: str, data: bytes, max_pixels: int) -> Image.Image:
    """The image in `data`, header read and pixels not yet decoded; BrokenSample above `max_pixels`."""
    if not data:
        raise BrokenSample(f"{name}: image has zero bytes")
    # Pillow's own guard would refuse what the recipe allows; ours below is the one that counts.
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else _one_line(error)
        raise BrokenSample(f"{name}: {reason}") from None
    width, height = image.size
    if width * height > max_pixels:
        raise BrokenSample(f"{name}: {width} x {height} pixels exceed data.max_image_pixels {max_pixels}")
    return image


def decode_image(name: str, data: bytes, max_pixels: int) -> Image.Image:
    """The image in RGB or L, by `plain_picture`; BrokenSample when it is truncated, not an image or too large."""
    image = open_image(name, data, max_pixels)
    try:
        image.load()
        return plain_picture(image)
    # Decoders meet bytes from anywhere and fail in as many ways (OSError, SyntaxError, struct.error, ...).
    except Exception as error:
        raise BrokenSample(f"{name}: {_one_line(error)}") from None


def check_image(name: str, data: bytes, max_pixels: int) -> None:
    """Raise BrokenSample as `decode_image` would, at a fraction of its cost for JPEG (an eighth of the size)."""
    image = open_image(name, data, max_pixels)
    try:
        image.draft("RGB", (1, 1))
        image.load()
        if image.mode not in PLAIN:
            plain_picture(image)
    except Exception as error:
        raise BrokenSample(f"{name}: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(f"{error}".split()) or type(error).__name__
