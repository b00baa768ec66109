"""Feature store against a bare sequential h5py read of the same bytes: speed, checksum cost, memory over an epoch.

python benchmarks/feature_store.py [--megabytes 1000] [--rounds 7] [--folder /tmp] [--cold]

Each round reads every array once in order with h5py (slices of one batch, into a tensor) and once shuffled through
FeatureStore, both in batches, one after the other on one thread; the ratio is the median of the rounds' ratios. A first
epoch (a store just opened) verifies every row's checksum, later ones do not. --cold drops the file from the page cache
before each pass (best effort: a virtual disk's host may still hold it).
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import torch

from convclip.features.layout import ArraySpec, estimate
from convclip.features.reader import FeatureStore
from convclip.features.writer import FeatureWriter

BATCH = 256
CASES = {
    "trunk map f16 1024x7x7": {"map": ArraySpec((1024, 7, 7), "float16")},
    "word features f16 32x512": {"words": ArraySpec((32, 512), "float16")},
    "text embedding f32 640": {"text": ArraySpec((640,), "float32")},
    "map + text + two teacher embeddings": {
        "map": ArraySpec((1024, 7, 7), "float16"),
        **{name: ArraySpec((640,), "float32") for name in ("text", "teacher_image", "teacher_text")},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000, help="size of each store")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=None, help="where the stores are made, and removed again")
    parser.add_argument("--cold", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for label, arrays in CASES.items():
            for world in (1, 2) if label.startswith("trunk") else (1,):
                path = Path(folder) / f"{world}.h5"
                measure(f"{label}, {world} part(s)", path, arrays, world, arguments)
                for file in Path(folder).iterdir():
                    file.unlink()


def measure(label: str, path: Path, arrays: dict[str, ArraySpec], world: int, arguments: argparse.Namespace) -> None:
    items = max(4 * BATCH, arguments.megabytes * 10**6 // sum(spec.row_bytes for spec in arrays.values()))
    items -= items % BATCH
    wrote = write(path, arrays, items, world)
    size = sum(file.stat().st_size for file in path.parent.iterdir())
    total = items * sum(spec.row_bytes for spec in arrays.values())
    print(f"\n{label}: {items} rows, {total / 1e9:.2f} GB, written at {total / wrote / 1e9:.2f} GB/s, "
          f"file / estimate {size / estimate(arrays, {'item': items}):.4f}")  # fmt: skip
    store = FeatureStore(path)
    store_epoch(store)  # The first epoch, which verifies.
    passes: dict[str, Callable[[], None]] = {
        "h5py sequential": lambda: sequential_epoch(path, arrays, items),
        "store shuffled": lambda: store_epoch(store),
        "store shuffled, first epoch": lambda: store_epoch(FeatureStore(path)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    memory = []
    for _ in range(arguments.rounds):
        for name, run in passes.items():
            if arguments.cold:
                evict(path.parent)
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
            if name == "store shuffled":
                memory.append(resident())
    for name, times in seconds.items():
        ratios = [plain / own for plain, own in zip(seconds["h5py sequential"], times, strict=True)]
        speed = total / statistics.median(times) / 1e9
        print(f"  {name:28s} {speed:6.2f} GB/s  ratio {statistics.median(ratios):5.2f}")
    extra = statistics.median(seconds["store shuffled, first epoch"]) - statistics.median(seconds["store shuffled"])
    print(f"  checksums and mapping, once: {extra / total * 1e9:.2f} s/GB")
    print("  memory after each epoch, MiB (own + mapped): ", "  ".join(f"{own}+{file}" for own, file in memory))


def write(path: Path, arrays: dict[str, ArraySpec], items: int, world: int) -> float:
    """Seconds that writing random rows took."""
    ids = np.random.default_rng(0).choice(10 * items, items, replace=False)
    block = {
        name: torch.randn(BATCH, *spec.row_shape, generator=torch.Generator().manual_seed(1)).to(spec.torch_dtype)
        for name, spec in arrays.items()
    }
    start = time.perf_counter()
    for rank in range(world):
        writer = FeatureWriter(path, arrays, {"model": "random"}, {"item": ids}, rank, world)
        missing = writer.missing()
        for first in range(0, len(missing), BATCH):
            chosen = missing[first : first + BATCH]
            writer.write(chosen, {name: rows[: len(chosen)] for name, rows in block.items()})
        done = writer.finish()
    assert done
    return time.perf_counter() - start


def sequential_epoch(path: Path, arrays: dict[str, ArraySpec], items: int) -> None:
    with h5py.File(path, "r") as file:
        datasets = [file["arrays"][name] for name in arrays]
        for first in range(0, items, BATCH):
            for dataset in datasets:
                torch.from_numpy(dataset[first : first + BATCH])


def store_epoch(store: FeatureStore) -> None:
    names = list(store.arrays)
    ids = np.random.default_rng().permutation(store.ids(names[0]))
    for first in range(0, len(ids), BATCH):
        for name in names:
            store.read(name, ids[first : first + BATCH])


def evict(folder: Path) -> None:
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident() -> tuple[int, int]:
    """This process's own memory and its mapped files, MiB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) // 1024, int(lines["RssFile"].split()[0]) // 1024


if __name__ == "__main__":
    main()
