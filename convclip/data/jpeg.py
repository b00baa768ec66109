"""One image on its way into a shard: sound JPEG bytes as they are, everything else decoded and written as JPEG.

An image is skipped (`SkippedImage`, with the reason) when it is empty or larger than MAX_BYTES, has more than
MAX_PIXELS by its header (so before anything is decoded), is in no known format, or does not decode.

What "sound" means. A full decode costs ten times a copy (1.5 ms against 0.15 ms for a COCO image), and decoding at an
eighth of the size saves only a fifth of that. So a plain JPEG is accepted undecoded when its header parses, its last
bytes are the end-of-image marker, and the compressed data holds no marker that may not be there. A file that fails this
test, or is progressive (the test says less about those), is decoded in full, and Pillow decides. On COCO images damaged
at random, the test finds every truncation, zeroed tail, and overwritten or removed block that a full decode finds. It
misses most damage to the Huffman and quantisation tables in the header; the reader skips those images.
"""

from __future__ import annotations

import io
import re
import warnings
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from convclip.data.local_files import read_regular, reason_of
from convclip.data.pixels import FORMATS, plain_picture
from convclip.schema import MAX_PIXELS

MAX_BYTES = 256 * 1024 * 1024
QUALITY = 95
END_OF_IMAGE = b"\xff\xd9"
# In compressed data a 0xff byte is followed by 0 (stuffing), 0xd0-0xd7 (restart) or 0xff (fill).
FOREIGN_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")


class SkippedImage(Exception):
    """An image that cannot go into a shard; the message is the reason."""


class Jpeg(NamedTuple):
    """An image's JPEG bytes, and its size in pixels."""

    data: bytes
    width: int
    height: int


def read_jpeg(path: Path, shorter_side: int | None = None) -> Jpeg:
    """Read the image at `path` as JPEG.

    With `shorter_side` an image whose shorter side is longer is scaled down to it (never up). JPEGs in grey or RGB
    that need no scaling keep their bytes. EXIF rotation is not applied, as open_clip does not. SkippedImage: see above.
    """
    try:
        data = read_regular(path, MAX_BYTES)
    except (OSError, ValueError) as error:
        raise SkippedImage(f"cannot be read: {reason_of(error)}") from None
    if not data:
        raise SkippedImage("empty file")
    try:
        return _as_jpeg(data, shorter_side)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise SkippedImage(f"more than {MAX_PIXELS} pixels") from None
    except Image.UnidentifiedImageError:
        raise SkippedImage("not an image") from None
    # Pillow's decoders raise nearly anything on damaged files.
    except (OSError, ValueError, SyntaxError, IndexError, TypeError, KeyError, OverflowError, MemoryError) as error:
        raise SkippedImage(f"broken image: {str(error).split(' (')[0]}") from None


def _as_jpeg(data: bytes, shorter_side: int | None) -> Jpeg:
    stream = io.BytesIO(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(stream, formats=FORMATS)
    with image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise SkippedImage(f"more than {MAX_PIXELS} pixels")
        if shorter_side is not None and min(width, height) > shorter_side:
            return _scaled_down(image, shorter_side)
        if image.format != "JPEG" or image.mode not in ("L", "RGB"):
            return _encoded(_as_rgb(image))
        # Pillow has read up to the compressed data; a wrong place here would only mean a full decode.
        if "progressive" in image.info or not _looks_sound(data, stream.tell()):
            image.load()
        return Jpeg(data, width, height)


def _looks_sound(data: bytes, start: int) -> bool:
    end = len(data) - len(END_OF_IMAGE)
    return data.endswith(END_OF_IMAGE) and FOREIGN_MARKER.search(data, start, end) is None


def _scaled_down(image: Image.Image, shorter_side: int) -> Jpeg:
    width, height = image.size
    scale = shorter_side / min(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    # JPEGs decode at 1/2, 1/4 or 1/8 of their size for less; twice the target leaves the bicubic filter enough to do.
    image.draft("RGB", (2 * size[0], 2 * size[1]))
    return _encoded(_as_rgb(image).resize(size, Image.Resampling.BICUBIC))


def _as_rgb(image: Image.Image) -> Image.Image:
    """The image as every way shows it (`plain_picture`), in RGB."""
    image.load()
    image = plain_picture(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _encoded(image: Image.Image) -> Jpeg:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=QUALITY)
    return Jpeg(stream.getvalue(), image.width, image.height)
