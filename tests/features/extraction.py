"""A small extraction for the tests of the feature store: rows are a known function of the item id."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from convclip.features.ids import decode_ids
from convclip.features.layout import ArraySpec, read_layout
from convclip.features.writer import FeatureWriter

# Rows below and above a memory page, a scalar, and bfloat16.
ARRAYS = {
    "map": ArraySpec((64, 7, 7), "float16", "trunk output", "image"),
    "embedding": ArraySpec((6,), "float32", "not normalised", "image"),
    "words": ArraySpec((4, 5), "bfloat16", "not normalised", "caption"),
    "eot": ArraySpec((), "uint8", "token position", "caption"),
}
IDENTITY = {"model": "tiny", "model_sha256": "ab" * 32, "views": 1, "normalised": False, "fps": 1.5, "note": ""}
ITEMS = {
    "image": np.random.default_rng(0).choice(10**6, 23, replace=False),
    "caption": [f"caption {number} é" for number in range(41)],
}


def features(name: str, ids: np.ndarray | list[str]) -> torch.Tensor:
    """Rows of array `name`: noise seeded by the item id."""
    spec, rows = ARRAYS[name], []
    for item in ids:
        seed = [len(name), *str(item).encode()]
        rows.append(torch.from_numpy(np.random.default_rng(seed).random((*spec.row_shape, 1)) * 200).squeeze(-1))
    return torch.stack(rows).to(spec.torch_dtype)


def extract(
    path: Path,
    rank: int = 0,
    world: int = 1,
    computed: Callable[[str, list], None] = lambda kind, ids: None,
    batch: int = 3,
    batches: int | None = None,
) -> bool:
    """One rank's run, at most `batches` batches per kind; `computed` hears of every batch before it is written."""
    writer = FeatureWriter(path, ARRAYS, IDENTITY, ITEMS, rank, world, commit_bytes=20_000)
    for kind in ITEMS:
        missing = writer.missing(kind)
        for first in list(range(0, len(missing), batch))[:batches]:
            ids = missing[first : first + batch]
            computed(kind, list(ids))
            writer.write(ids, {name: features(name, ids) for name, spec in ARRAYS.items() if spec.item_kind == kind})
    return writer.finish()


def committed(folder: Path) -> set[tuple[str, str]]:
    """(kind, id as text) of every row that some file in `folder` says is done."""
    done = set()
    for file in folder.glob("*.h5*"):
        if file.suffix not in (".new", ".lock"):
            layout = read_layout(file)
            for kind, flags in layout.done.items():
                done |= {(kind, str(item)) for item in decode_ids(layout.ids[kind][flags])}
    return done


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked process; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at_call(number: int) -> None:
    """From now on, the `number`-th write, sync, or rename of this process is its last: a write is cut off half way."""
    calls = 0

    def dying(real: Callable) -> Callable:
        def call(*arguments: object) -> object:
            nonlocal calls
            calls += 1
            if calls == number:
                if real is write:
                    file, data, offset = arguments
                    write(file, data[: len(data) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        return call

    write = os.pwrite
    os.pwrite, os.fsync, os.replace = dying(os.pwrite), dying(os.fsync), dying(os.replace)
