"""Writes a feature store: resumable after a kill at any moment, by several ranks at once (see `layout.py`).

Rank r of W owns the items at positions r, r + W, r + 2W, … and writes them to `<file>.rank-<r>-of-<W>.part`. A row
is done when its `done` byte is set, and that byte is written only after the row and its checksum are safe on the disk.
So after a kill a row is either done and right, or not done and will be written again. Done rows count whichever rank
wrote them, so a run may go on with another number of ranks.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from convclip.features.identity import check_identity
from convclip.features.ids import Ids, ItemIds, decode_id, decode_ids, encode_ids
from convclip.features.layout import (
    ArraySpec,
    Layout,
    Piece,
    create_joined,
    create_part,
    estimate,
    read_layout,
    row_checksums,
    runs,
)
from convclip.files import publish
from convclip.locks import Lock
from convclip.schema import UserError


class FeatureWriter:
    """Writes one rank's rows of the feature store `path`.

    `arrays` gives the row of every array, `item_ids` the ids of every item kind, the same lists on every rank;
    `identity` (str, int, float or bool values) says what makes the features, and a list's fingerprint is added to it.
    Rows become done every `commit_bytes`, and at `flush`. Raises UserError when `path` or its parts were made by
    something else, when another process writes this rank's part, or when the disk has too little room.
    """

    def __init__(
        self,
        path: str | Path,
        arrays: Mapping[str, ArraySpec],
        identity: Mapping[str, str | int | float | bool],
        item_ids: Mapping[str, Ids],
        rank: int = 0,
        world: int = 1,
        commit_bytes: int = 64 * 2**20,
    ) -> None:
        self.path, self.arrays, self.identity = Path(path), dict(arrays), dict(identity)
        self.rank, self.world, self.commit_bytes = rank, world, commit_bytes
        self._items = {kind: ItemIds(ids) for kind, ids in item_ids.items()}
        for kind, items in self._items.items():
            self.identity[f"{kind}_ids"] = f"{len(items)}, sha256 {hashlib.sha256(items.values.data).hexdigest()}"
        self._refuse_wrong_arguments()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._done = self._done_in(self._existing())
        self._refuse_full_disk()
        self._lock = Lock(self.path.with_name(f"{self._own_name}.lock"), self.path.with_name(f"{self._own_name}.part"))
        if any(len(self._own_rows(kind)) for kind in self._items):
            self._lock.acquire()
        # Read again: another process may have written rows until we got the lock.
        parts = self._existing()
        self._done = self._done_in(parts)
        self._part = self._own_part(parts)
        self._file = os.open(self._part.path, os.O_RDWR) if self._part.ids else None
        self._own_ids = {kind: ItemIds(ids) for kind, ids in self._part.ids.items()}
        self._uncommitted: dict[str, list[np.ndarray]] = {kind: [] for kind in self._items}
        self._uncommitted_bytes = 0

    def missing(self, kind: str | None = None) -> np.ndarray | list[str]:
        """Ids of this rank's items not written yet, in the order of `item_ids`; give `kind` where there are more."""
        if kind is None:
            (kind,) = self._items
        return decode_ids(self._items[kind].values[self._own_rows(kind)])

    def write(self, ids: Ids, rows: Mapping[str, torch.Tensor | np.ndarray]) -> None:
        """Write `rows` [n, *row_shape] of every array of one item kind, for n items of this rank not written yet.

        Raises UserError on a full disk and on values that are not finite, ValueError on ids or rows that do not fit.
        """
        kind = self._kind_of(rows)
        wanted = encode_ids(ids)
        if not len(wanted):
            return
        positions = self._items[kind].find(wanted)
        local = self._own_ids[kind].find(wanted) if kind in self._own_ids else np.full(len(wanted), -1)
        wrong = (positions < 0) | (local < 0) | self._done[kind][positions]
        if wrong.any() or len(np.unique(local)) != len(local):
            culprit = decode_id(wanted[np.argmax(wrong)])
            raise ValueError(f"{self.path}: rank {self.rank} is not to write {kind} {culprit!r}, or not again")
        blocks = {name: self._row_bytes(name, wanted, values) for name, values in rows.items()}
        order = np.argsort(local, kind="stable")
        with self._disk_errors():
            for name, block in blocks.items():
                self._part.crc32[name][local] = row_checksums(block)
                self._write_runs(f"arrays/{name}", local[order], block[order])
        self._done[kind][positions] = True
        self._uncommitted[kind].append(local)
        self._uncommitted_bytes += sum(block.nbytes for block in blocks.values())
        if self._uncommitted_bytes >= self.commit_bytes:
            self.flush()

    def flush(self) -> None:
        """Make every row written so far done: rows and checksums reach the disk first, then their `done` bytes."""
        pending = {kind: np.unique(np.concatenate(rows)) for kind, rows in self._uncommitted.items() if rows}
        if not pending or self._file is None:
            return
        with self._disk_errors():
            for name, spec in self.arrays.items():
                if spec.item_kind in pending:
                    rows = pending[spec.item_kind]
                    self._write_runs(f"crc32/{name}", rows, self._part.crc32[name][rows])
            os.fsync(self._file)
            for kind, rows in pending.items():
                self._write_runs(f"done/{kind}", rows, np.ones(len(rows), dtype=np.uint8))
                self._uncommitted[kind].clear()
        self._uncommitted_bytes = 0

    def finish(self) -> bool:
        """Commit this rank's rows and close its part; when no rank's row is missing, make `path` of the parts.

        Returns whether `path` is there: True on the last rank at least, so call it on every rank and, where ranks
        share a network disk, once more on rank 0 after a barrier.
        """
        if self._file is not None:
            self.flush()
            with self._disk_errors():
                os.fsync(self._file)
            os.close(self._file)
            self._file = None
        self._lock.release()
        parts = self._existing()
        if parts and parts[0].path == self.path:
            return True
        if not all(done.all() for done in self._done_in(parts).values()):
            return False
        with self._disk_errors():
            try:
                self._join(parts)
            except FileNotFoundError:  # Another rank finished at the same time, joined the parts and cleaned up.
                if not self.path.exists():
                    raise
            for ending in ("new", "lock"):  # Of killed runs, maybe with other ranks; every row is there.
                for leftover in self.path.parent.glob(f"{glob.escape(self.path.name)}.rank-*.{ending}"):
                    leftover.unlink(missing_ok=True)
        return True

    def _refuse_wrong_arguments(self) -> None:
        kinds = {spec.item_kind for spec in self.arrays.values()}
        if kinds != set(self._items) or not all(len(items) for items in self._items.values()):
            raise ValueError(
                f"arrays are of kinds {sorted(kinds)}, and item_ids has to list items of each of them alone"
            )
        if any("/" in name for name in [*self.arrays, *kinds]):
            raise ValueError("names of arrays and item kinds must not hold a slash")
        for key, value in self.identity.items():
            if not isinstance(value, str | int | float | bool):
                raise ValueError(f"identity {key} is a {type(value).__name__}: give a str, int, float or bool")

    def _existing(self) -> list[Layout]:
        """The finished store alone if it is there, else the parts of all ranks, of this and of earlier runs."""
        pattern = re.compile(re.escape(self.path.name) + r"\.rank-\d+-of-\d+(\.part)?")
        files = sorted(file for file in self.path.parent.iterdir() if pattern.fullmatch(file.name) and file.exists())
        layouts = []
        for file in [self.path] if self.path.exists() else files:
            try:
                layout = read_layout(file)
            except FileNotFoundError:  # The last rank has just finished: look at what it made of the parts.
                return self._existing()
            for found, wanted in ((layout.identity, self.identity), (layout.arrays, self.arrays)):
                check_identity(layout.path, found, wanted)
                for key in found.keys() - wanted.keys():
                    raise UserError(f"{layout.path}: its {key} is {found[key]!r}, wanted is none; use another file")
            layouts.append(layout)
        return layouts

    def _done_in(self, layouts: list[Layout]) -> dict[str, np.ndarray]:
        done = {kind: np.zeros(len(items), dtype=bool) for kind, items in self._items.items()}
        for layout in layouts:
            for kind, flags in layout.done.items():
                done[kind][self._items[kind].find(layout.ids[kind][flags])] = True
        return done

    def _own_rows(self, kind: str) -> np.ndarray:
        rows = np.arange(self.rank, len(self._items[kind]), self.world)
        return rows[~self._done[kind][rows]]

    def _refuse_full_disk(self) -> None:
        missing = {kind: int((~done).sum()) for kind, done in self._done.items()}
        needed = estimate(self.arrays, missing) if any(missing.values()) else 0
        free = shutil.disk_usage(self.path.parent).free
        if needed > free:
            raise UserError(f"{self.path}: needs {needed / 1e9:.2f} GB more, its disk has {free / 1e9:.2f} GB free")

    @property
    def _own_name(self) -> str:
        return f"{self.path.name}.rank-{self.rank:05d}-of-{self.world:05d}"

    def _own_part(self, parts: list[Layout]) -> Layout:
        """This rank's part, made if it is not there; without ids when this rank has nothing to write."""
        ids = {kind: items.values[self._own_rows(kind)] for kind, items in self._items.items()}
        if not any(len(values) for values in ids.values()):
            return Layout(self.path)
        for part in parts:
            if part.path.name in (self._own_name, self._own_name + ".part"):
                return part
        path = self.path.with_name(self._own_name + ".part")
        with self._disk_errors():
            create_part(path, self.arrays, self.identity, ids)
        return read_layout(path)

    def _kind_of(self, rows: Mapping[str, Any]) -> str:
        kinds = {self.arrays[name].item_kind for name in rows if name in self.arrays}
        kind = kinds.pop() if len(kinds) == 1 else None
        if kind is None or {name for name, spec in self.arrays.items() if spec.item_kind == kind} != set(rows):
            raise ValueError(f"{self.path}: write all arrays of one item kind together, not {sorted(rows)}")
        return kind

    def _row_bytes(self, name: str, ids: np.ndarray, values: torch.Tensor | np.ndarray) -> np.ndarray:
        """`values` as [n, row_bytes] uint8, after checking shape, dtype and finiteness."""
        spec = self.arrays[name]
        tensor = torch.as_tensor(values).detach().cpu().contiguous()
        if tensor.dtype != spec.torch_dtype or tensor.shape != (len(ids), *spec.row_shape):
            wanted = (len(ids), *spec.row_shape)
            raise ValueError(
                f"{name}: rows are {tuple(tensor.shape)} {tensor.dtype}, wanted {wanted} {spec.torch_dtype}"
            )
        if tensor.is_floating_point():
            flat = tensor.view(len(ids), -1)  # NaN and infinities reach the extremes, which cost a tenth of isfinite.
            finite = torch.isfinite(flat.amax(dim=1)) & torch.isfinite(flat.amin(dim=1))
            if not finite.all():
                culprit = decode_id(ids[int(torch.argmin(finite.int()))])
                raise UserError(
                    f"{self.path}: array {name} of {spec.item_kind} {culprit!r} is not finite in {spec.dtype}; "
                    "store it in a wider precision"
                )
        return tensor.view(len(ids), -1).view(torch.uint8).numpy()

    def _write_runs(self, dataset: str, rows: np.ndarray, values: np.ndarray) -> None:
        """Write `values` [n, …] at the ascending `rows` of `dataset`, one call per run of neighbours."""
        assert self._file is not None  # `write` refuses every row where no part is open
        width = values[0].nbytes
        for start, stop in runs(rows):
            offset = self._part.offsets[dataset] + int(rows[start]) * width
            data = np.ascontiguousarray(values[start:stop]).reshape(-1).view(np.uint8).data
            while len(data):
                written = os.pwrite(self._file, data, offset)
                data, offset = data[written:], offset + written

    def _join(self, parts: list[Layout]) -> None:
        """Make `path`: rename the only part, or write a file that joins several."""
        used = [part for part in parts if any(flags.any() for flags in part.done.values())]
        if len(used) == 1 and self.world == 1:
            publish(used[0].path, self.path)
        else:
            pieces = self._pieces(used)
            for part in used:
                final = part.path.with_name(part.path.name.removesuffix(".part"))
                with contextlib.suppress(FileNotFoundError):  # Another rank that finished at the same time did it.
                    publish(part.path, final)
                part.path = final
            temporary = self.path.with_name(f"{self.path.name}.rank-{self.rank:05d}.new")
            create_joined(self.path, temporary, used, pieces)
        for part in parts:
            if part not in used:
                part.path.unlink(missing_ok=True)

    def _pieces(self, parts: list[Layout]) -> dict[str, list[Piece]]:
        """The done rows of `parts`, each item once."""
        pieces: dict[str, list[Piece]] = {kind: [] for kind in self._items}
        for kind, items in self._items.items():
            seen = np.zeros(len(items), dtype=bool)
            for number, part in enumerate(parts):
                positions = items.find(part.ids[kind])
                rows = np.flatnonzero(part.done[kind] & ~seen[positions])
                seen[positions[rows]] = True
                for start, stop in runs(rows):
                    pieces[kind].append((number, int(rows[start]), int(rows[stop - 1]) + 1))
        return pieces

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot write ({error.strerror or error}); what is done is kept: "
                "make room or repair the disk, then run the same command again"
            ) from error
