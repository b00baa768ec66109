"""One rule from any image to 8-bit RGB, whatever way it comes: make_shards, CSV, shards, zero-shot folders.

Imports no torch, so that packing shards starts quickly.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

# Formats that Pillow decodes in-process: others (EPS) would start a program on data nobody has looked at.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
# The modes that a JPEG of pixels has, which transforms take as they are.
PLAIN = ("RGB", "L")
WHITE = 255
SIXTEEN_BIT = 2**16 - 1
THIRTY_TWO_BIT = 2**31 - 1


def plain_picture(image: Image.Image) -> Image.Image:
    """A decoded image as 8-bit RGB; L (grey) without transparency stays L, whose R, G and B are equal.

    - 8-bit colours (1, P, CMYK, YCbCr, HSV, LAB, RGBX): Pillow's conversion to RGB.
    - Alpha (LA, La, PA, RGBA, RGBa, or a transparent colour in the file's header): over white,
      round((c a + 255 (255 - a)) / 255); premultiplied La and RGBa: c + 255 - a.
    - 16-bit grey (I;16 and its byte orders): round(255 v / 65535). 16-bit colours reach us as Pillow decodes them,
      by their high byte.
    - 32-bit integers (I): round(255 v / (2**31 - 1)).
    - Floats (F): round(255 v), of 0..1.

    EXIF orientation is not applied, as open_clip does not; of an animation the first frame counts.

    Raises:
        ValueError: a 32-bit or float image that this would make black or cut off: negative values or NaN, floats
            above 1, integers that do not reach one of the 255 levels. Its range is not known, so it must be rescaled.
    """
    mode, transparent = image.mode, image.info.get("transparency")
    if mode.startswith("I;16"):
        return _from_sixteen_bit(image, transparent)
    if mode == "I":
        return _grey(_scaled_integers(np.asarray(image)))
    if mode == "F":
        return _grey(_scaled_floats(np.asarray(image)))
    if mode in ("RGBa", "La"):
        return _over_white(image, premultiplied=True)
    if mode in ("RGBA", "LA", "PA") or transparent is not None:
        return _over_white(image.convert("RGBA"))
    return image if mode in PLAIN else image.convert("RGB")


def _from_sixteen_bit(image: Image.Image, transparent: object) -> Image.Image:
    # Pillow's arrays of the other byte orders are in that order; numpy reads them right.
    values = np.asarray(image).astype(np.int64)
    grey = (values * 255 + SIXTEEN_BIT // 2) // SIXTEEN_BIT
    if isinstance(transparent, int):
        grey[values == transparent] = WHITE
    return _grey(grey)


def _scaled_integers(values: np.ndarray) -> np.ndarray:
    low, high = int(values.min()), int(values.max())
    # One of 255 levels is 2**23: an image that stays below holds 8- or 16-bit values and would come out black.
    if low < 0 or 0 < high < THIRTY_TWO_BIT // 255:
        raise ValueError(f"32-bit image with values {low}..{high}, not 0..{THIRTY_TWO_BIT}: save it with 8 or 16 bits")
    return np.rint(values.astype(np.float64) * (255 / THIRTY_TWO_BIT))


def _scaled_floats(values: np.ndarray) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"float image with values {low:g}..{high:g}, not 0..1: save it with 8 or 16 bits")
    return np.rint(values.astype(np.float64) * 255)


def _over_white(image: Image.Image, premultiplied: bool = False) -> Image.Image:
    pixels = np.asarray(image).astype(np.uint16)
    colour, alpha = pixels[..., :-1], pixels[..., -1:]
    rest = WHITE - alpha
    # 255 * 255 fits 16 bits, and so do both products together, since their weights sum to 255.
    mixed = np.minimum(colour + rest, WHITE) if premultiplied else (colour * alpha + WHITE * rest + 127) // 255
    mixed = mixed.astype(np.uint8)
    return Image.fromarray(mixed[..., 0] if mixed.shape[-1] == 1 else mixed)


def _grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.astype(np.uint8))
