"""Reads a feature store: arrays by name, rows by item id.

Batches are copied from memory maps of the files at the byte offsets HDF5 gives: a map is the page cache itself, shared
by all processes, and for shuffled rows up to 4 times faster than a system call per row (benchmarks/feature_store.py).
Each row's checksum is verified when it is first read; which rows were verified is shared with forked processes.
"""

from __future__ import annotations

import hashlib
import mmap
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from convclip.features.identity import check_identity
from convclip.features.ids import Ids, ItemIds, decode_id, decode_ids, encode_ids
from convclip.features.layout import ArraySpec, Extent, read_layout
from convclip.schema import UserError

# A map counts towards a process's memory until it is let go; the data stay in the page cache.
_UNMAP_AFTER_BYTES = 2**30


class FeatureStore:
    """A finished feature store, read-only; safe to fork, and opened anew where it is unpickled.

    `expect` names identity values the store must have. Raises UserError saying how it differs where one does,
    and for a file that is missing, not finished, truncated, damaged, or of another format version.
    """

    def __init__(self, path: str | Path, expect: Mapping[str, Any] | None = None) -> None:
        self.path, self.expect = Path(path), dict(expect or {})
        try:
            layout = read_layout(self.path)
        except FileNotFoundError:
            raise UserError(f"{self.path}: no such feature store; make it with tools/extract_features.py") from None
        check_identity(self.path, layout.identity, self.expect)
        for kind, done in layout.done.items():
            if not done.all():
                raise UserError(
                    f"{self.path}: only {done.sum()} of {len(done)} {kind} rows are done; finish extracting"
                )
        self.arrays, self.identity = dict(layout.arrays), layout.identity
        self._items = {kind: ItemIds(values) for kind, values in layout.ids.items()}
        self._crc32 = layout.crc32
        self._extents = layout.extents
        self._files: dict[Path, _DataFile] = {}
        self._verified: dict[str, np.ndarray] = {}
        for name, spec in self.arrays.items():
            for extent in self._extents[name]:
                if extent.file not in self._files:
                    self._files[extent.file] = _DataFile(extent.file)
                self._files[extent.file].require(name, extent, spec.row_bytes)
            # Anonymous shared memory: what one forked worker has verified, the others need not.
            self._verified[name] = np.frombuffer(mmap.mmap(-1, len(self._crc32[name]) or 1), dtype=np.uint8)

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def rows(self, name: str, ids: Ids) -> np.ndarray:
        """Row numbers int64 [n] of `ids` in array `name`. Raises UserError naming an id the store does not know."""
        rows = self._items_of(name).find(ids)
        if (rows < 0).any():
            unknown = encode_ids(ids)[rows < 0]
            first, more = decode_id(unknown[0]), len(unknown) - 1
            raise UserError(f"{self.path}: array {name} has no row for item {first!r} and {more} more asked for")
        return rows

    def __reduce__(self) -> tuple:
        return FeatureStore, (self.path, self.expect)

    def ids(self, name: str) -> np.ndarray | list[str]:
        """Ids of the items that array `name` has a row for, in row order."""
        return decode_ids(self._items_of(name).values)

    def checksum(self) -> str:
        """What identifies the store's rows: a hash of their checksums and ids."""
        digest = hashlib.sha256()
        for name in sorted(self.arrays):
            digest.update(name.encode() + self._crc32[name].tobytes() + self._items_of(name).values.tobytes())
        return digest.hexdigest()[:16]

    def read(self, name: str, ids: Ids) -> torch.Tensor:
        """Rows [n, *row_shape] of array `name`, in the order of `ids`, which may repeat.

        Raises UserError naming file, array and row where a row is unknown, cut off, or differs from its checksum.
        """
        spec, rows = self._spec(name), self.rows(name, ids)
        batch = torch.empty((len(rows), *spec.row_shape), dtype=spec.torch_dtype)
        if not batch.numel():
            return batch
        data = batch.view(len(rows), -1).view(torch.uint8).numpy()
        new = np.flatnonzero(self._verified[name][rows] == 0)
        for extent in self._extents[name]:
            places = np.flatnonzero((rows >= extent.first) & (rows < extent.first + extent.count))
            if len(places):
                self._files[extent.file].copy_rows(name, extent, rows[places] - extent.first, data, places)
        self._verify(name, rows, data, new)
        return batch

    def _spec(self, name: str) -> ArraySpec:
        if name not in self.arrays:
            raise UserError(f"{self.path}: no array {name}; it has {', '.join(sorted(self.arrays))}")
        return self.arrays[name]

    def _items_of(self, name: str) -> ItemIds:
        return self._items[self._spec(name).item_kind]

    def _verify(self, name: str, rows: np.ndarray, data: np.ndarray, places: np.ndarray) -> None:
        """Compare data[places] with the checksums of rows[places]."""
        for place in places:
            row = rows[place]
            if zlib.crc32(data[place]) != self._crc32[name][row]:
                kind = self.arrays[name].item_kind
                (file,) = {e.file for e in self._extents[name] if e.first <= row < e.first + e.count}
                item = decode_id(self._items[kind].values[row])
                raise UserError(f"{file}: array {name}, row {row} ({kind} {item!r}) is damaged: its checksum differs")
            self._verified[name][row] = 1


class _DataFile:
    """A file of rows, mapped for reading until no store uses it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._copied = 0

    def require(self, name: str, extent: Extent, width: int) -> None:
        """Raise UserError unless the file holds all of `extent`: touching a map beyond its end kills the process."""
        found, needed = self._map.size(), extent.offset + extent.count * width
        if found < needed:
            raise UserError(f"{self.path}: {found} bytes long, array {name} needs {needed}: truncated; extract again")

    def copy_rows(self, name: str, extent: Extent, rows: np.ndarray, data: np.ndarray, places: np.ndarray) -> None:
        """Copy `rows` of `extent` of array `name` to data[places]; data is [n, row_bytes] uint8."""
        width = data.shape[1]
        self.require(name, extent, width)
        table = np.frombuffer(self._map, np.uint8, extent.count * width, extent.offset).reshape(-1, width)
        if len(places) == len(data):
            np.take(table, rows, axis=0, out=data, mode="clip")
        else:
            for place, row in zip(places.tolist(), rows.tolist(), strict=True):
                data[place] = table[row]
        self._copied += len(rows) * width
        if self._copied >= _UNMAP_AFTER_BYTES:
            self._map.madvise(mmap.MADV_DONTNEED)
            self._copied = 0


def view_ids(image_ids: Ids, view: int, views: int) -> np.ndarray:
    """Item ids int64 [n] of view `view` (from 0) of integer image ids, in a store of `views` views per image."""
    if not 0 <= view < views:
        raise ValueError(f"view {view} of {views}")
    return np.asarray(image_ids, dtype=np.int64) * views + view


def state_dict_sha256(state_dict: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values of a state dict, whatever its order and device, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
