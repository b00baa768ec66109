"""Pictures of every mode against a formula for it, and pictures of extreme shapes."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
from PIL import Image

from convclip.data.jpeg import read_jpeg
from convclip.data.samples import decode_image
from convclip.data.transforms import EvalTransform, TrainTransform
from tests.campaign.judge import RIGHT, Wrong

LIMIT = 64_000_000
# (mode, a format without loss that holds it).
MODES = (
    *(("1", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("RGB", "PNG"), ("RGBA", "PNG"), ("I;16", "PNG")),
    *(("L", "TIFF"), ("LA", "TIFF"), ("RGB", "TIFF"), ("RGBA", "TIFF"), ("CMYK", "TIFF"), ("I;16", "TIFF")),
    *(("I", "TIFF"), ("F", "TIFF"), ("RGB", "BMP"), ("L", "BMP"), ("P", "GIF"), ("RGB", "WEBP"), ("RGBA", "WEBP")),
)
SHAPES = ((1, 1), (1, 2), (2, 1), (1, 60_000), (60_000, 1), (3, 5_000), (5_000, 3), (17, 16), (255, 1), (8_000, 7_000))


def _draw(mode: str, rng: np.random.Generator, size: tuple[int, int]) -> tuple[Image.Image, np.ndarray]:
    """A picture, and what it shows: float RGB [H, W, 3] of 0..255."""
    width, height = size
    if mode in ("I;16", "I", "F"):
        scale = {"I;16": 65535, "I": 2**31 - 1, "F": 1}[mode]
        values = {
            "I;16": rng.integers(0, 2**16, (height, width), dtype=np.uint16),
            "I": rng.integers(2**24, 2**31, (height, width)).astype(np.int32),
            "F": rng.random((height, width), dtype=np.float32),
        }[mode]
        return Image.fromarray(values), np.repeat(values[..., None] / scale * 255, 3, 2)
    if mode in ("1", "P"):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)
        return image, np.asarray(image.convert("RGB"), dtype=float)
    bands = len(Image.new(mode, (1, 1)).getbands())
    values = rng.integers(0, 256, (height, width, bands), dtype=np.uint8)
    image = Image.frombytes(mode, size, values.tobytes())
    colour = values.astype(float)
    if mode in ("LA", "RGBA"):
        alpha = colour[..., -1:] / 255
        colour = colour[..., :-1] * alpha + 255 * (1 - alpha)
    if mode == "CMYK":
        colour = (255 - colour[..., :3]) * (255 - colour[..., 3:]) / 255
    return image, np.repeat(colour, 3, 2) if colour.shape[-1] == 1 else colour


def _bytes(image: Image.Image, form: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **({"lossless": True, "exact": True} if form == "WEBP" else {}))
    return stream.getvalue()


def picture_modes(folder: Path, rng: random.Random) -> str:
    """A mode and a format: the pixels are those of the formula; packed by make_shards, about those."""
    (mode, form), draw = rng.choice(MODES), np.random.default_rng(rng.randrange(2**32))
    size = (rng.randint(1, 40), rng.randint(1, 40))
    image, expected = _draw(mode, draw, size)
    data = _bytes(image, form)
    shown = np.asarray(decode_image("x", data, LIMIT).convert("RGB"), dtype=float)
    # Rounded once, or twice where a format keeps bytes.
    if shown.shape != expected.shape or np.abs(shown - expected).max() > 1.01:
        raise Wrong(f"{mode} in {form} of {size} differs from its formula")
    (folder / "a").write_bytes(data)
    packed = np.asarray(Image.open(io.BytesIO(read_jpeg(folder / "a").data)).convert("RGB"), dtype=float)
    # JPEG makes noise coarse, and clips it: not another picture.
    if abs(packed.mean() - expected.mean()) > 12:
        raise Wrong(f"make_shards shows {mode} in {form} at {packed.mean():.0f}, not {expected.mean():.0f}")
    return RIGHT


def picture_shapes(folder: Path, rng: random.Random) -> str:
    """An even picture of an extreme shape through both transforms: of their size and its grey, in bounded memory."""
    del folder
    size, grey = rng.choice(SHAPES), rng.randrange(256)
    form = rng.choice(("PNG", "BMP", "WEBP")) if max(size) < 16_000 else "PNG"
    image = decode_image("x", _bytes(Image.new("RGB", size, (grey,) * 3), form), LIMIT)
    for transform in (EvalTransform(32), TrainTransform(32, (0.01, 1.0))):
        pixels = transform(image, np.random.default_rng(rng.randrange(2**32)))
        if pixels.shape != (3, 32, 32) or int((pixels.int() - grey).abs().max()) > 1:
            raise Wrong(f"{size} in {form} gives {tuple(pixels.shape)}")
    return RIGHT
