"""Reading pictures for shards: which bytes stay as they are, which are written anew, which are refused and why."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from convclip.data.jpeg import MAX_PIXELS, SkippedImage, read_jpeg


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth random picture, so that it survives JPEG and resizing recognisably."""
    rough = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def read(folder: Path, data: bytes, shorter_side: int | None = None):
    path = folder / "picture"
    path.write_bytes(data)
    return read_jpeg(path, shorter_side)


@pytest.mark.parametrize(
    "data",
    [
        encoded(picture(64, 48)),
        encoded(picture(1, 1)),
        encoded(picture(1, 300)),
        encoded(picture(301, 77), quality=100, subsampling=0),
        encoded(picture(64, 48), progressive=True),
        encoded(picture(64, 48), restart_marker_blocks=1),
        encoded(picture(64, 48).convert("L")),
        encoded(picture(64, 48)) + b"trailing bytes of some camera",
    ],
)
def test_sound_jpegs_keep_their_bytes(tmp_path, data):
    jpeg = read(tmp_path, data)
    assert jpeg.data == data
    with Image.open(io.BytesIO(data)) as image:
        assert (jpeg.width, jpeg.height) == image.size


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "GIF"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1"])
def test_other_formats_become_jpeg(tmp_path, kind, mode):
    data = encoded(picture(40, 30).convert(mode), kind)
    jpeg = read(tmp_path, data)
    with Image.open(io.BytesIO(jpeg.data)) as image, Image.open(io.BytesIO(data)) as original:
        assert image.format == "JPEG" and image.mode == "RGB" and image.size == (40, 30) == (jpeg.width, jpeg.height)
        difference = np.asarray(image, dtype=float) - np.asarray(original.convert("RGB"), dtype=float)
    # A palette makes dots of the picture, which are the worst that JPEG can be given.
    dotted = mode in ("1", "P") or kind == "GIF"
    assert np.abs(difference).mean() < (20 if dotted else 4)


def test_cmyk_jpegs_become_rgb(tmp_path):
    data = encoded(picture(40, 30).convert("CMYK"))
    jpeg = read(tmp_path, data)
    with Image.open(io.BytesIO(jpeg.data)) as image, Image.open(io.BytesIO(data)) as original:
        assert image.mode == "RGB" and original.mode == "CMYK"
        difference = np.asarray(image, dtype=float) - np.asarray(original.convert("RGB"), dtype=float)
    assert np.abs(difference).mean() < 4


@pytest.mark.parametrize(
    ("size", "expected"), [((640, 427), (96, 64)), ((427, 640), (64, 96)), ((65, 1000), (64, 985))]
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_resize_scales_the_shorter_side_down(tmp_path, size, expected, kind):
    original = picture(*size)
    jpeg = read(tmp_path, encoded(original, kind), 64)
    assert (jpeg.width, jpeg.height) == expected
    with Image.open(io.BytesIO(jpeg.data)) as image:
        assert image.size == expected
        difference = np.asarray(image, dtype=float) - np.asarray(original.resize(expected, Image.Resampling.BICUBIC))
    assert np.abs(difference).mean() < 3


def test_resize_never_scales_up(tmp_path):
    data = encoded(picture(64, 200))
    assert read(tmp_path, data, 64).data == data
    assert read(tmp_path, data, 500).data == data


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    written = (struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


def with_claimed_size(data: bytes, width: int, height: int) -> bytes:
    """A baseline JPEG whose frame header claims another size."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"hello, this is text", "not an image"),
        (b"<html>404</html>" * 100, "not an image"),
        (png_header(60000, 60000), f"more than {MAX_PIXELS} pixels"),
        (png_header(9000, 9000), f"more than {MAX_PIXELS} pixels"),
        (png_header(12000, 12000), f"more than {MAX_PIXELS} pixels"),
        (with_claimed_size(encoded(picture(64, 48)), 65000, 65000), f"more than {MAX_PIXELS} pixels"),
        (png_header(100, 100), "broken image"),
        (encoded(picture(64, 48))[:-200], "broken image: image file is truncated"),
        (encoded(picture(64, 48), progressive=True)[:300], "broken image"),
        (encoded(picture(64, 48), "PNG")[:-200], "broken image"),
    ],
)
def test_refused_pictures_and_their_reasons(tmp_path, data, reason):
    with pytest.raises(SkippedImage, match=f"^{reason}"):
        read(tmp_path, data)


def test_unreadable_files_are_refused(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    with pytest.raises(SkippedImage, match="cannot be read"):
        read_jpeg(tmp_path / "folder.jpg")
    with pytest.raises(SkippedImage, match="cannot be read: No such file"):
        read_jpeg(tmp_path / "none.jpg")
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.truncate(300 * 1024 * 1024)
    with pytest.raises(SkippedImage, match="more than 268435456 bytes"):
        read_jpeg(tmp_path / "huge.jpg")


SOUND = encoded(picture(120, 90, seed=3), quality=90)


def decodes(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except Exception:
        return False
    return True


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, len(SOUND) - 1))
def test_a_jpeg_cut_off_anywhere_is_refused(tmp_path, end):
    assert not decodes(SOUND[:end])
    with pytest.raises(SkippedImage):
        read(tmp_path, SOUND[:end])


@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, len(SOUND) - 1), st.binary(min_size=1, max_size=400))
def test_damage_raises_nothing_but_skipped_and_never_costs_a_decodable_picture(tmp_path, start, noise):
    damaged = SOUND[:start] + noise + SOUND[start + len(noise) :]
    try:
        read(tmp_path, damaged)
    except SkippedImage:
        assert not decodes(damaged)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(SOUND.index(b"\xff\xda") + 14, len(SOUND) - 600), st.randoms(use_true_random=False))
def test_overwritten_pixels_are_judged_as_a_full_decode_judges_them(tmp_path, start, rng):
    damaged = SOUND[:start] + rng.randbytes(512) + SOUND[start + 512 :]
    try:
        accepted = bool(read(tmp_path, damaged))
    except SkippedImage:
        accepted = False
    assert accepted == decodes(damaged)
