"""Shards, CSV tables, annotations and pictures. What no damage touched must be there as it was, or be counted."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from convclip.data.coco import read_coco
from convclip.data.evaluation_set import load_evaluation_set
from convclip.data.jpeg import SkippedImage, read_jpeg
from convclip.data.loader import TrainLoader
from convclip.data.samples import BrokenSample, check_image, decode_image
from convclip.data.transforms import EvalTransform, TrainTransform
from convclip.schema import BatchConfig, Data
from tests.campaign.damage import broken_bytes, broken_json, broken_text
from tests.campaign.judge import COUNTED, RIGHT, Wrong
from tests.data.broken_inputs import ANNOTATIONS, TRAIN_DATA
from tests.data.broken_inputs import annotations as listed_annotations
from tests.data.makers import GREY_STEP, caption, jpeg, picture, read_back, sample, write_index, write_tar

SAMPLES, PER_IMAGE = 12, 2
Seen = dict[int, tuple[list[str], float]]
"""By image id: its captions and the mean of its pixels."""


def tokens(texts: list[str]) -> Any:
    """As `read_back`, of any text."""
    return read_back([" ".join(str(len(word)) for word in [*text.split(), "", ""][:2]) for text in texts])


def look(address: str, folder: Path) -> tuple[Seen, list[str]]:
    """Read an epoch, then make an evaluation set and read it: what is there, and what was said to be lost."""
    data = Data(train=address, workers=0, cache_folder=str(folder / "cache"), max_broken_share=1.0)
    loader = TrainLoader(data, BatchConfig.model_validate({"global": 1}), TrainTransform(8), tokens, 0, 1, 0)
    said = [line for batch in loader.epoch(0) for line in batch["broken"]]
    found = load_evaluation_set(address, data, EvalTransform(8), tokens)
    means = {
        int(number): float(pixels[row].float().mean())
        for numbers, pixels in found.image_batches(0, 1, 4)
        for row, number in enumerate(numbers)
    }
    texts: dict[int, list[str]] = {}
    for text, image in zip(found.captions, found.image_of_text.tolist(), strict=True):
        texts.setdefault(image, []).append(text)
    seen = {int(image_id): (texts[image], means[image]) for image, image_id in enumerate(found.image_ids)}
    return seen, [*loader.source.damage, *said, *found.broken]


def compare(seen: Seen, said: list[str], untouched: set[int], everything: set[int]) -> str:
    """Whether untouched images are as they were, or told of; and no image went without a word."""
    for number in untouched & set(seen):
        captions, mean = seen[number]
        if captions != [caption(number, k) for k in range(PER_IMAGE)] or abs(mean - GREY_STEP * number) > 2:
            raise Wrong(f"image {number} was not touched, and has captions {captions}, grey {mean:.1f}")
    if (missing := everything - set(seen)) and not said:
        raise Wrong(f"images {sorted(missing)} are gone without a word")
    if len(said) != len([line for line in said if "\n" not in line]):
        raise Wrong(f"a line of several lines: {said}")
    return COUNTED if said else RIGHT


@functools.cache
def _tar(captions: int = PER_IMAGE) -> tuple[bytes, dict[int, tuple[int, int]]]:
    """A shard, and the range of each image's members in it, headers included."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = write_tar(Path(folder) / "0.tar", {f"{n:04d}": sample(n, captions) for n in range(SAMPLES)})
        data = path.read_bytes()
    ranges: dict[int, tuple[int, int]] = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            number = int(member.name[:4])
            start, _ = ranges.get(number, (member.offset, 0))
            ranges[number] = (start, member.offset_data + -(-member.size // 512) * 512)
    return data, ranges


def shards(folder: Path, rng: random.Random) -> str:
    """A small tar with damaged bytes and no index: pictures have no checksum, so touched samples may be anything."""
    data, ranges = _tar()
    broken, touched = broken_bytes(data, rng)
    (folder / "0.tar").write_bytes(broken)
    seen, said = look(str(folder / "0.tar"), folder)
    untouched = {n for n, (a, b) in ranges.items() if not any(start < b and stop > a for start, stop in touched)}
    # A changed image_id is another image: the touched ones may be missing under their own number.
    return compare(seen, said, untouched, untouched if len(seen) == SAMPLES else set(range(SAMPLES)))


def indexed_shards(folder: Path, rng: random.Random) -> str:
    """The same beside an index with checksums: whatever changed must be told. Or the index itself is damaged."""
    data, _ = _tar()
    entry = {"url": "0.tar", "nsamples": SAMPLES, "filesize": len(data), "md5sum": hashlib.md5(data).hexdigest()}
    entry["ncaptions"] = [PER_IMAGE] * SAMPLES
    index = write_index(folder, [entry])
    if rng.random() < 0.5:
        data, _ = broken_bytes(data, rng)
    else:
        index.write_bytes(broken_json(json.loads(index.read_text()), rng))
    (folder / "0.tar").write_bytes(data)
    seen, said = look(str(folder / "0.tar"), folder)
    return compare(seen, said, set(range(SAMPLES)), set(range(SAMPLES)))


def listed_data(folder: Path, rng: random.Random) -> str:
    """The broken data of tests/data/broken_inputs.py, with other seeds."""
    maker = rng.choice(list(TRAIN_DATA))
    broken = maker(folder, rng.randrange(10_000))
    _, said = look(broken.address, folder)
    return COUNTED if said else RIGHT


def csv_tables(folder: Path, rng: random.Random) -> str:
    """A CSV of which the text is broken; each line that stands whole must come out, or be counted."""
    for number in range(SAMPLES):
        (folder / f"{number}.jpg").write_bytes(jpeg(picture(number)))
    lines = [f"{n}.jpg,{caption(n, k)}" for n in range(SAMPLES) for k in range(PER_IMAGE)]
    text = "\n".join(["filepath,title", *lines, ""]).encode()
    cells = [place for place, byte in enumerate(text) if byte in b",\n"]
    # A quote that opens a cell and is never closed takes the rest of the file into it.
    opened = rng.choice(cells[:-1]) + 1
    broken = text[:opened] + b'"' + text[opened:] if rng.random() < 0.1 else broken_text(text, rng)
    path = folder / "train.csv"
    path.write_bytes(broken)
    seen, said = look(str(path), folder)
    found = {text for texts, _ in seen.values() for text in texts}
    whole = {line.decode() for line in broken.splitlines()[1:] if line.decode("utf-8", "replace") in lines}
    lost = [line for line in whole if line.split(",")[1] not in found]
    if lost and not said:
        raise Wrong(f"{len(lost)} whole lines are gone without a word, as {sorted(lost)[0]!r}")
    return COUNTED if said else RIGHT


def annotations(folder: Path, rng: random.Random) -> str:
    """COCO's, Karpathy's and flat annotations with a broken value or text, against a plain reading of the same."""
    way = rng.random()
    if way < 0.1:
        read_coco(Path(listed_annotations(folder, rng.randrange(ANNOTATIONS)).address), "train")
        raise Wrong("a listed broken file was read")
    images = [{"id": n, "file_name": f"{n}.jpg", "width": 4, "height": 3} for n in range(SAMPLES)]
    rows = [
        {"id": 10 * n + k, "image_id": n, "caption": caption(n, k)} for n in range(SAMPLES) for k in range(PER_IMAGE)
    ]
    karpathy = [
        {"filename": f"{n}.jpg", "filepath": "val2014", "split": "train", "imgid": n, "cocoid": n}
        | {"sentences": [{"raw": caption(n, k), "sentid": 10 * n + k} for k in range(PER_IMAGE)]}
        for n in range(SAMPLES)
    ]
    flat = [{"image": f"{n}.jpg", "caption": [caption(n, k) for k in range(PER_IMAGE)]} for n in range(SAMPLES)]
    content: Any = rng.choice(({"images": images, "annotations": rows}, {"images": karpathy, "dataset": "coco"}, flat))
    path = folder / "captions.json"
    path.write_bytes(broken_json(content, rng))
    found = read_coco(path, "train")
    captions = [text for image in found for text in image.captions]
    expected = _plain_captions(json.loads(path.read_text(encoding="utf-8-sig")))
    if sorted(captions) != sorted(expected):
        raise Wrong(f"{len(captions)} captions of {len(expected)}")
    return RIGHT


def _plain_captions(content: Any) -> list[str]:
    """Every caption of a file that has been accepted, whatever layout."""
    if isinstance(content, list):
        nested = [[row["caption"]] if isinstance(row["caption"], str) else row["caption"] for row in content]
        texts = [text for own in nested for text in own]
    elif "annotations" in content:
        texts = [row["caption"] for row in content["annotations"]]
    else:
        texts = [
            one["raw"]
            for image in content["images"]
            if image.get("split", "train") in ("train", "restval")
            for one in image["sentences"]
        ]
    return [text for text in texts if text.strip()]


# Not F: its values are refused where they are not in 0..1, as they are in no picture of noise.
MODES = ("RGB", "L", "P", "RGBA", "LA", "CMYK", "1", "I;16", "I", "YCbCr", "HSV", "PA")
SUFFIXES = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


def images(folder: Path, rng: random.Random) -> str:
    """A picture of any mode, format and shape, cut or damaged: three readers, one opinion, no other pixels if cut."""
    size = rng.choice(((40, 30), (1, 1), (1, 500), (500, 1), (7, 64), (3000, 2), (64, 64)))
    pixels = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    whole, mode, suffix = Image.fromarray(pixels), rng.choice(MODES), rng.choice(SUFFIXES)
    stream = io.BytesIO()
    try:
        options = {"progressive": rng.random() < 0.3, "quality": rng.choice((5, 75, 95))} if suffix == "JPEG" else {}
        (whole.convert("L").convert(mode) if mode in ("I;16", "PA", "LA", "I") else whole.convert(mode)).save(
            stream, suffix, **options
        )
    except (OSError, ValueError, KeyError):  # The format has no such mode.
        stream = io.BytesIO()
        whole.save(stream, suffix)
    data = stream.getvalue()
    way = rng.random()
    broken = data if way < 0.1 else data[: rng.randrange(len(data))] if way < 0.4 else broken_bytes(data, rng)[0]
    path = folder / "0.jpg"
    path.write_bytes(broken)
    verdicts = []
    for read in (check_image, decode_image):
        try:
            verdicts.append(read("0", broken, 10**6))
        except BrokenSample as error:
            _one_line(str(error))
            verdicts.append(error)
    checked, decoded = verdicts
    try:
        read_jpeg(path)
    except SkippedImage as error:
        _one_line(str(error))
    if isinstance(checked, BrokenSample) != isinstance(decoded, BrokenSample):
        raise Wrong(f"{suffix} {mode} {size}: the check says {checked}, the decoder {decoded}")
    if isinstance(decoded, BrokenSample):
        if broken == data:
            raise Wrong(f"a sound {suffix} in {mode} of {size} is refused: {decoded}")
        return COUNTED
    if decoded.mode not in ("RGB", "L"):
        raise Wrong(f"a picture in {decoded.mode}")
    if data.startswith(broken) and np.asarray(decoded).tolist() != np.asarray(decode_image("1", data, 10**6)).tolist():
        raise Wrong(f"{suffix} {mode} {size}, cut at {len(broken)} of {len(data)}, has other pixels")
    if not all(transform_ok(decoded)):
        raise Wrong("no 8 x 8 pixels")
    return RIGHT


def transform_ok(image: Image.Image) -> list[bool]:
    """Whether both transforms give uint8 [3, 8, 8]."""
    return [tuple(EvalTransform(8)(image).shape) == (3, 8, 8)]


def _one_line(message: str) -> None:
    if not message or "\n" in message:
        raise Wrong(f"no one line: {message!r}")
