"""The one rule from any picture to RGB, against numpy arithmetic, and that every way gives the same pixels."""

import io

import numpy as np
import pytest
from PIL import Image

from convclip.data.jpeg import read_jpeg
from convclip.data.pixels import plain_picture
from convclip.data.samples import BrokenSample, check_image, decode_image

RNG = np.random.default_rng(0)
SIDE = (6, 5)
GREY, ALPHA = (RNG.integers(0, 256, SIDE, dtype=np.uint8) for _ in range(2))
COLOUR = RNG.integers(0, 256, (*SIDE, 3), dtype=np.uint8)
WIDE = RNG.integers(0, 65536, SIDE, dtype=np.uint16)
LARGE = RNG.integers(0, 2**31 - 1, SIDE, dtype=np.int32)
SHARE = RNG.random(SIDE, dtype=np.float32)


def white_behind(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """float64 [..., 3]: not rounded."""
    a = alpha.astype(float)[..., None] / 255
    return colour.astype(float) * a + 255 * (1 - a)


def thrice(grey: np.ndarray) -> np.ndarray:
    return np.repeat(np.asarray(grey, dtype=float)[..., None], 3, axis=-1)


def palette(alpha: bool = False) -> Image.Image:
    image = Image.fromarray(COLOUR).quantize(16)
    if alpha:
        image.info["transparency"] = bytes(range(0, 256, 16))
    return image


def palette_colours(image: Image.Image) -> np.ndarray:
    return np.array(image.getpalette()).reshape(-1, 3)[np.asarray(image)]


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def premultiplied(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return np.minimum(colour, alpha[..., None])


RGBA = np.dstack([COLOUR, ALPHA])
LA = np.dstack([GREY, ALPHA])
SMALL = premultiplied(COLOUR, ALPHA)
# mode: the picture in memory, and its RGB before rounding.
IN_MEMORY = {
    "1": (Image.fromarray(GREY > 127), thrice((GREY > 127) * 255)),
    "L": (Image.fromarray(GREY), thrice(GREY)),
    "RGB": (Image.fromarray(COLOUR), COLOUR),
    "LA": (Image.fromarray(LA, "LA"), white_behind(np.dstack([GREY] * 3), ALPHA)),
    "RGBA": (Image.fromarray(RGBA), white_behind(COLOUR, ALPHA)),
    "RGBa": (Image.frombytes("RGBa", (5, 6), np.dstack([SMALL, ALPHA]).tobytes()), SMALL + 255.0 - ALPHA[..., None]),
    "P": (palette(), palette_colours(palette())),
    "P, transparent": (
        palette(alpha=True),
        white_behind(palette_colours(palette()), np.arange(0, 256, 16)[np.asarray(palette())]),
    ),
    "CMYK": (
        Image.fromarray(np.dstack([COLOUR, GREY]), "CMYK"),
        (255.0 - COLOUR) * (255.0 - GREY[..., None]) / 255,
    ),
    "YCbCr": (Image.fromarray(COLOUR).convert("YCbCr"), Image.fromarray(COLOUR).convert("YCbCr").convert("RGB")),
    "HSV": (Image.fromarray(COLOUR).convert("HSV"), Image.fromarray(COLOUR).convert("HSV").convert("RGB")),
    "LAB": (Image.new("LAB", (5, 6), (255, 128, 128)), np.full((6, 5, 3), 255.0)),
    "I;16": (Image.fromarray(WIDE), thrice(WIDE / 257)),
    "I;16B": (Image.frombytes("I;16B", (5, 6), WIDE.astype(">u2").tobytes()), thrice(WIDE / 257)),
    "I": (Image.fromarray(LARGE), thrice(LARGE / (2**31 - 1) * 255)),
    "F": (Image.fromarray(SHARE), thrice(SHARE * 255.0)),
}


@pytest.mark.parametrize("mode", IN_MEMORY)
def test_every_mode_against_arithmetic(mode):
    image, expected = IN_MEMORY[mode]
    assert image.mode == mode.split(",")[0]
    got = plain_picture(image)
    assert got.mode in ("RGB", "L")
    exact = mode not in ("CMYK", "YCbCr", "HSV", "LAB")
    # Half a level is rounding; Pillow's own colour arithmetic may be off by one.
    assert np.abs(np.asarray(got.convert("RGB"), float) - np.asarray(expected, float)).max() <= (0.5001 if exact else 1)


def test_ordinary_pictures_are_the_very_same():
    for mode in ("RGB", "L"):
        assert plain_picture(IN_MEMORY[mode][0]) is IN_MEMORY[mode][0]


def test_la_premultiplied_and_palette_with_alpha():
    la = Image.frombytes("La", (5, 6), np.dstack([np.minimum(GREY, ALPHA), ALPHA]).tobytes())
    assert np.array_equal(np.asarray(plain_picture(la)), np.minimum(GREY, ALPHA) + (255 - ALPHA))
    pa = palette().convert("PA")
    assert np.array_equal(np.asarray(plain_picture(pa)), palette_colours(palette()))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.full(SIDE, np.nan, np.float32), "not 0..1"),
        (np.full(SIDE, 200, np.float32), "not 0..1"),
        (np.full(SIDE, -0.1, np.float32), "not 0..1"),
        (np.full(SIDE, 60_000, np.int32), "not 0..2147483647"),
        (np.full(SIDE, -1, np.int32), "not 0..2147483647"),
    ],
)
def test_an_unknown_range_breaks_the_picture(values, reason):
    data = encoded(Image.fromarray(values), "TIFF")
    for judge in (decode_image, check_image):
        with pytest.raises(BrokenSample, match=f"^x: .*{reason}.*: save it with 8 or 16 bits$"):
            judge("x", data, 10**6)


def animation(kind: str) -> bytes:
    frames = [Image.fromarray(COLOUR), Image.fromarray(255 - COLOUR)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)


FILES = {
    "grey PNG": (encoded(Image.fromarray(GREY), "PNG"), thrice(GREY)),
    "16-bit grey PNG": (encoded(Image.fromarray(WIDE), "PNG"), thrice(WIDE / 257)),
    "16-bit grey PNG, one value transparent": (
        encoded(Image.fromarray(WIDE), "PNG", transparency=int(WIDE[0, 0])),
        thrice(np.where(WIDE[0, 0] == WIDE, 255, WIDE / 257)),
    ),
    "RGBA PNG": (encoded(Image.fromarray(RGBA), "PNG"), white_behind(COLOUR, ALPHA)),
    "LA PNG": (encoded(Image.fromarray(LA, "LA"), "PNG"), white_behind(np.dstack([GREY] * 3), ALPHA)),
    "RGB PNG, one colour transparent": (
        encoded(Image.fromarray(COLOUR), "PNG", transparency=tuple(COLOUR[0, 0].tolist())),
        np.where((COLOUR[0, 0] == COLOUR).all(-1, keepdims=True), 255, COLOUR),
    ),
    "32-bit TIFF": (encoded(Image.fromarray(LARGE), "TIFF"), thrice(LARGE / (2**31 - 1) * 255)),
    "float TIFF": (encoded(Image.fromarray(SHARE), "TIFF"), thrice(SHARE * 255.0)),
    "RGBA WebP": (encoded(Image.fromarray(RGBA), "WEBP", lossless=True, exact=True), white_behind(COLOUR, ALPHA)),
    "animated WebP": (animation("WEBP"), COLOUR),
    "animated GIF": (animation("GIF"), COLOUR),
}


def sixteen_bit_png(channels: int) -> tuple[bytes, np.ndarray]:
    """A 16-bit colour PNG, which Pillow cannot write, and its RGB."""
    import struct
    import zlib

    values = np.random.default_rng(1).integers(0, 65536, (*SIDE, channels), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", SIDE[1], SIDE[0], 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    data = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    eight = values / 257
    return b"\x89PNG\r\n\x1a\n" + data, eight if channels == 3 else white_behind(eight[..., :3], eight[..., 3])


def test_sixteen_bit_colours_by_their_high_byte():
    for channels in (3, 4):
        data, expected = sixteen_bit_png(channels)
        got = np.asarray(decode_image("x", data, 10**6), float)
        # A dropped low byte is one level at most, in colour and in alpha.
        assert np.abs(got - expected).max() <= channels - 1.5


@pytest.mark.parametrize("kind", FILES)
def test_files_by_every_way(tmp_path, kind):
    data, expected = FILES[kind]
    image = decode_image("x", data, 10**6)
    check_image("x", data, 10**6)
    pixels = np.asarray(image.convert("RGB"))
    # A GIF has a palette: its first frame is near, the second would be far.
    assert np.abs(pixels - np.asarray(expected, float)).max() <= (0.5001 if "GIF" not in kind else 60)
    path = tmp_path / "picture"
    path.write_bytes(data)
    stored = np.asarray(Image.open(io.BytesIO(read_jpeg(path).data)))
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=95)
    assert np.array_equal(stored, np.asarray(Image.open(stream)))
    shrunk = np.asarray(Image.open(io.BytesIO(read_jpeg(path, 4).data)))
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((4, 5), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=95)
    assert np.array_equal(shrunk, np.asarray(Image.open(stream)))


def test_make_shards_starts_no_program_on_a_picture(tmp_path):
    from convclip.data.jpeg import SkippedImage

    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(SkippedImage, match="not an image"):
        read_jpeg(tmp_path / "a.jpg")


def test_exif_orientation_is_not_applied(tmp_path):
    """As open_clip, which reads with Image.open and convert("RGB")."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(COLOUR), "JPEG", exif=exif, quality=95)
    (tmp_path / "a.jpg").write_bytes(data)
    assert decode_image("x", data, 10**6).size == (5, 6) and read_jpeg(tmp_path / "a.jpg").data == data
