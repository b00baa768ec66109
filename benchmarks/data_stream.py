"""What the training stream and the shard writer cost beside the bare work they are made of.

    python benchmarks/data_stream.py [--images FOLDER] [--count 1024] [--workers 2] [--repeats 5]

Stream: images/s of TrainLoader (shards, tokens, batches) against as many processes that only decode with Pillow and
apply torchvision's crop. Shards: images/s of write_shards with one worker against a loop that copies the same files
into a tar. Each pair is measured in turns in one run; the medians' ratio is printed beside its target. Without
--images the pictures are made here (640 x 480 JPEG); with it, the folder's first --count .jpg files are used again
and again.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import multiprocessing
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as F

from convclip.data.coco import CocoImage
from convclip.data.loader import TrainLoader
from convclip.data.shard_writer import image_members, write_shards
from convclip.data.tokenizers import build_tokenizer
from convclip.data.transforms import TrainTransform
from convclip.schema import BatchConfig, Data, TextTowerConfig

MICRO_BATCH = 32
IMAGE_SIZE = 224
STREAM_TARGET = 0.9
SHARDS_TARGET = 0.8


def make_pictures(folder: Path, count: int = 64) -> None:
    """`count` JPEGs of 640 x 480 with about as many bytes as COCO's (160 kB): smooth shapes under noise."""
    generator = np.random.default_rng(0)
    for number in range(count):
        shapes = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(shapes.resize((640, 480), Image.Resampling.BICUBIC), dtype=np.float32)
        noisy = (smooth + generator.normal(0, 9, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number:04d}.jpg", quality=90)


def as_data_set(files: list[Path], count: int) -> list[CocoImage]:
    """`count` samples with five captions each over `files`, which repeat when there are fewer."""
    captions = tuple(f"a picture of a man riding a wave on a board, version {number}" for number in range(5))
    chosen = itertools.islice(itertools.cycle(files), count)
    return [
        CocoImage(number, path.name, captions, tuple(range(5 * number, 5 * number + 5)))
        for number, path in enumerate(chosen)
    ]


def copy_loop(images: list[CocoImage], folder: Path, output: Path) -> None:
    """Bare shard building: the files and their json, copied into one tar."""
    with tarfile.open(output, "w", format=tarfile.USTAR_FORMAT) as archive:
        for image in images:
            about = {"image_id": image.image_id, "captions": image.captions, "caption_ids": image.caption_ids}
            members = {"jpg": (folder / image.file_name).read_bytes(), "json": json.dumps(about).encode()}
            for suffix, data in members.items():
                member = tarfile.TarInfo(f"{image.image_id:012d}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def decode_loop(paths: list[Path]) -> int:
    """Bare reading: decode with Pillow, random resized crop, RGB, tensor. Returns the pixels made."""
    crop = RandomResizedCrop(IMAGE_SIZE, scale=(0.9, 1.0), interpolation=InterpolationMode.BICUBIC)
    return sum(F.pil_to_tensor(crop(Image.open(path)).convert("RGB")).numel() for path in paths)


def rates(count: int, repeats: int, *actions: Callable[[], object]) -> list[float]:
    """Median images/s of each action, measured in turns after one warm-up turn."""
    seconds: list[list[float]] = [[] for _ in actions]
    for _ in range(repeats + 1):
        for action, measured in zip(actions, seconds, strict=True):
            start = time.perf_counter()
            action()
            measured.append(time.perf_counter() - start)
    return [count / statistics.median(measured[1:]) for measured in seconds]


def report(name: str, ours: float, bare: float, target: float) -> None:
    """One line: both rates, their ratio and its target."""
    print(f"{name}: {ours:.0f} images/s, bare {bare:.0f} images/s, ratio {ours / bare:.2f} (target >= {target})")


def measure_shards(images: list[CocoImage], folder: Path, scratch: Path, repeats: int) -> str:
    """Shard building; returns the pattern of the last shards for `measure_stream`."""
    numbers = itertools.count()
    members = partial(image_members, folder=folder)

    def build() -> None:
        # A folder of its own each time: shards that are there are not written again.
        write_shards(images, members, scratch / f"shards{next(numbers)}", "train", {}, samples_per_shard=256)

    ours, bare = rates(len(images), repeats, build, lambda: copy_loop(images, folder, scratch / "copy.tar"))
    report("shards", ours, bare, SHARDS_TARGET)
    return str(scratch / f"shards{next(numbers) - 1}" / "*.tar")


def measure_stream(
    pattern: str, images: list[CocoImage], folder: Path, scratch: Path, workers: int, repeats: int
) -> None:
    """One epoch of one caption per image, against the bare loop over the same images and as many processes."""
    data = Data(train=pattern, captions="one", workers=workers, cache_folder=str(scratch / "cache"))
    batch = BatchConfig.model_validate({"global": MICRO_BATCH})
    transform, tokenizer = TrainTransform(IMAGE_SIZE), build_tokenizer(TextTowerConfig())
    loader = TrainLoader(data, batch, transform, tokenizer, rank=0, world=1, seed=0)
    epochs = itertools.count()

    def stream() -> None:
        for _ in loader.epoch(next(epochs)):
            pass

    paths = [folder / image.file_name for image in images]
    shares = [paths[first::workers] for first in range(workers)]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        count = loader.steps_per_epoch * MICRO_BATCH
        ours, bare = rates(count, repeats, stream, lambda: pool.map(decode_loop, shares, chunksize=1))
    report("stream", ours, bare * len(images) / count, STREAM_TARGET)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="folder of .jpg files; default: pictures made here")
    parser.add_argument("--count", type=int, default=1024, help="images per measurement")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        folder = args.images or scratch
        if args.images is None:
            make_pictures(folder)
        files = sorted(folder.glob("*.jpg"))[: args.count]
        if not files:
            parser.error(f"--images {folder} holds no .jpg file")
        images = as_data_set(files, args.count)
        pattern = measure_shards(images, folder, scratch, args.repeats)
        measure_stream(pattern, images, folder, scratch, args.workers, args.repeats)


if __name__ == "__main__":
    main()
