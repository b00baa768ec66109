"""How a feature store lies on disk. Read by `reader.py`, written by `writer.py`.

One HDF5 file (a "part") holds
    /identity        attributes: what made the features, one per key
    /arrays/<name>   [rows, *row_shape], contiguous; attributes dtype (torch's name), units, item_kind
    /crc32/<name>    [rows] uint32, the checksum of each row's bytes
    /ids/<kind>      [rows] int64 or UTF-8 of fixed length; attribute crc32
    /done/<kind>     [rows] uint8, 1 once the row is safe on the disk
A file that joins the parts of several ranks, and appears only when every row is there, holds
    /identity, /ids  as above
    /parts           names of the part files, which lie beside it; attribute crc32
    /pieces/<kind>   [pieces, 3] int64, (part, start row, stop row) in row order; attribute crc32
    /arrays/<name>   virtual datasets over the parts, for other programs

HDF5's own metadata is written once, before the first row, and carries HDF5's checksums. Rows are then written and read
at fixed byte offsets without the HDF5 library, so a kill cannot leave an HDF5 file half changed.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from convclip.features.identity import check_identity
from convclip.files import publish
from convclip.schema import UserError

FORMAT_VERSION = 1
# Superblock and object headers of these versions are checksummed by HDF5, and joined arrays need them.
_HDF5_VERSIONS = ("v110", "v110")


@dataclass(frozen=True)
class ArraySpec:
    """One array of a store: per item of `item_kind` a row of `row_shape` and `dtype` (torch's name: "bfloat16")."""

    row_shape: tuple[int, ...]
    dtype: str
    units: str = "1"
    item_kind: str = "item"

    def __post_init__(self) -> None:
        object.__setattr__(self, "row_shape", tuple(int(size) for size in self.row_shape))
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"{self.dtype!r} is not the name of a torch dtype")

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def disk_dtype(self) -> np.dtype:
        """HDF5 and numpy have no bfloat16: its bit pattern is stored as uint16."""
        return np.dtype("<u2") if self.dtype == "bfloat16" else np.dtype(self.dtype).newbyteorder("<")

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.row_shape, dtype=np.int64)) * self.torch_dtype.itemsize


def estimate(arrays: Mapping[str, ArraySpec], items: Mapping[str, int], id_bytes: int = 8) -> int:
    """Bytes on disk of a store of `items` rows per item kind; `id_bytes` is the length of string ids."""
    rows = sum(items[spec.item_kind] * (spec.row_bytes + 4) for spec in arrays.values())
    return rows + sum(items.values()) * (id_bytes + 1) + 2048 + 512 * len(arrays)


def runs(rows: np.ndarray) -> Iterator[tuple[int, int]]:
    """Slices (start, stop) of ascending `rows` within which each row follows the one before."""
    if len(rows):
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        yield from zip([0, *breaks.tolist()], [*breaks.tolist(), len(rows)], strict=True)


def row_checksums(rows: np.ndarray) -> np.ndarray:
    """CRC-32 of each row of `rows` [n, row_bytes] uint8 -> [n] uint32."""
    return np.fromiter((zlib.crc32(row) for row in rows), dtype=np.uint32, count=len(rows))


@dataclass
class Extent:
    """Rows `first` … `first + count - 1` of an array lie one after the other in `file`, from byte `offset` on."""

    file: Path
    offset: int
    first: int
    count: int


@dataclass(eq=False)
class Layout:
    """What a store's file says about itself; the rows themselves are not read."""

    path: Path
    identity: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, ArraySpec] = field(default_factory=dict)
    ids: dict[str, np.ndarray] = field(default_factory=dict)
    done: dict[str, np.ndarray] = field(default_factory=dict)
    crc32: dict[str, np.ndarray] = field(default_factory=dict)
    extents: dict[str, list[Extent]] = field(default_factory=dict)
    # Byte offset of every dataset the writer fills, e.g. "done/image"; empty for a joined file.
    offsets: dict[str, int] = field(default_factory=dict)


# Rows [start, stop) of the part of that number: (number, start, stop).
Piece = tuple[int, int, int]


def create_part(
    path: Path, arrays: Mapping[str, ArraySpec], identity: Mapping[str, Any], ids: Mapping[str, np.ndarray]
) -> None:
    """Lay out an empty part for `ids` at `path`. Its rows take no disk space until they are written."""
    temporary = path.with_name(path.name + ".new")
    with h5py.File(temporary, "w", libver=_HDF5_VERSIONS) as file:
        _write_header(file, identity, ids)
        for kind, values in ids.items():
            _reserve(file, f"done/{kind}", (len(values),), np.dtype("u1"))
        for name, spec in arrays.items():
            count = len(ids[spec.item_kind])
            _reserve(file, f"crc32/{name}", (count,), np.dtype("<u4"))
            _describe(_reserve(file, f"arrays/{name}", (count, *spec.row_shape), spec.disk_dtype), spec)
    publish(temporary, path)


def create_joined(path: Path, temporary: Path, parts: list[Layout], pieces: Mapping[str, list[Piece]]) -> None:
    """Write `path`, a store of the `pieces` of `parts`, per item kind in that order."""
    ids = {kind: _joined_ids(parts, pieces[kind], kind) for kind in pieces}
    with h5py.File(temporary, "w", libver=_HDF5_VERSIONS) as file:
        _write_header(file, parts[0].identity, ids)
        _write_table(file, "parts", np.array([part.path.name.encode("utf-8") for part in parts]))
        for kind, rows in pieces.items():
            _write_table(file, f"pieces/{kind}", np.array(rows, dtype=np.int64))
        for name, spec in parts[0].arrays.items():
            view = h5py.VirtualLayout((len(ids[spec.item_kind]), *spec.row_shape), spec.disk_dtype)
            first = 0
            for number, start, stop in pieces[spec.item_kind]:
                shape = (len(parts[number].ids[spec.item_kind]), *spec.row_shape)
                source = h5py.VirtualSource(parts[number].path.name, f"arrays/{name}", shape, spec.disk_dtype)
                view[first : first + stop - start] = source[start:stop]
                first += stop - start
            _describe(file.create_virtual_dataset(f"arrays/{name}", view), spec)
    publish(temporary, path)


def _write_header(file: h5py.File, identity: Mapping[str, Any], ids: Mapping[str, np.ndarray]) -> None:
    file.attrs["format_version"] = FORMAT_VERSION
    group = file.create_group("identity")
    for key, value in identity.items():
        # Strings of fixed length lie in the object header, which is checksummed; others lie in a heap that is not.
        group.attrs[key] = np.bytes_(value.encode("utf-8")) if isinstance(value, str) else value
    for kind, values in ids.items():
        _write_table(file, f"ids/{kind}", values)


def _write_table(file: h5py.File, name: str, values: np.ndarray) -> None:
    file.create_dataset(name, data=values).attrs["crc32"] = zlib.crc32(np.ascontiguousarray(values).data)


def _read_table(file: h5py.File, name: str, path: Path) -> np.ndarray:
    values = file[name][:]
    if zlib.crc32(values) != file[name].attrs["crc32"]:
        raise UserError(f"{path}: its table {name} is damaged (checksum differs); extract again")
    return values


def _reserve(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype) -> h5py.Dataset:
    """A contiguous dataset that has its place in the file at once and is never filled by HDF5."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)
    group = file.require_group(name.split("/")[0])
    kind, space = h5py.h5t.py_create(dtype, logical=True), h5py.h5s.create_simple(shape)
    return h5py.Dataset(h5py.h5d.create(group.id, name.split("/")[1].encode("utf-8"), kind, space, properties))


def _describe(dataset: h5py.Dataset, spec: ArraySpec) -> None:
    for key in ("dtype", "units", "item_kind"):
        dataset.attrs[key] = np.bytes_(getattr(spec, key).encode("utf-8"))


def read_layout(path: Path) -> Layout:
    """What `path` holds. Raises UserError for a file that is truncated, damaged, or of another kind or version."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            return _read(file, path)
    except (FileNotFoundError, UserError):
        raise
    except Exception as error:  # A damaged file makes HDF5 raise errors of nearly every type.
        raise UserError(f"{path}: not a whole feature store, truncated or damaged ({error}); extract again") from error


def _read(file: h5py.File, path: Path) -> Layout:
    version = file.attrs.get("format_version")
    if version is None:
        raise UserError(f"{path}: an HDF5 file, but not a feature store of convclip")
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: feature store format {version}, this convclip reads {FORMAT_VERSION}; extract again")
    layout = Layout(path, {key: _plain(value) for key, value in file["identity"].attrs.items()})
    layout.ids = {kind: _read_table(file, f"ids/{kind}", path) for kind in file["ids"]}
    (_read_joined if "parts" in file else _read_part)(file, layout)
    return layout


def _read_part(file: h5py.File, layout: Layout) -> None:
    for group in ("done", "crc32", "arrays"):
        for name, dataset in file[group].items():
            layout.offsets[f"{group}/{name}"] = dataset.id.get_offset() or 0
    for kind in layout.ids:
        layout.done[kind] = file["done"][kind][:] == 1
    for name, dataset in file["arrays"].items():
        about = {key: _plain(dataset.attrs[key]) for key in ("dtype", "units", "item_kind")}
        spec = layout.arrays[name] = ArraySpec(dataset.shape[1:], **about)
        layout.crc32[name] = file["crc32"][name][:]
        layout.extents[name] = [Extent(layout.path, layout.offsets[f"arrays/{name}"], 0, len(dataset))]
        if not len(dataset) == len(layout.ids[spec.item_kind]) == len(layout.crc32[name]):
            raise UserError(f"{layout.path}: array {name} has {len(dataset)} rows, its ids or checksums have others")


def _read_joined(file: h5py.File, layout: Layout) -> None:
    """Fill in what the parts hold. The virtual datasets are for other programs: HDF5 does not checksum their maps."""
    parts = []
    for name in _read_table(file, "parts", layout.path):
        path = layout.path.parent / name.decode("utf-8")
        try:
            parts.append(read_layout(path))
        except FileNotFoundError:
            raise UserError(f"{layout.path}: its part {path} is missing; keep them in one folder") from None
        check_identity(path, parts[-1].identity, layout.identity)
        check_identity(path, parts[-1].arrays, parts[0].arrays)
    layout.arrays = parts[0].arrays
    pieces = {kind: _read_table(file, f"pieces/{kind}", layout.path).tolist() for kind in layout.ids}
    for kind, ids in layout.ids.items():
        layout.done[kind] = np.ones(len(ids), dtype=bool)
        if not np.array_equal(_joined_ids(parts, pieces[kind], kind), ids):
            raise UserError(
                f"{layout.path}: its parts do not hold the {kind} rows it lists; are they of another store?"
            )
    for name, spec in layout.arrays.items():
        layout.extents[name], first = [], 0
        for number, start, stop in pieces[spec.item_kind]:
            (whole,) = parts[number].extents[name]
            layout.extents[name].append(Extent(whole.file, whole.offset + start * spec.row_bytes, first, stop - start))
            first += stop - start
        checksums = [parts[number].crc32[name][start:stop] for number, start, stop in pieces[spec.item_kind]]
        layout.crc32[name] = np.concatenate(checksums)


def _joined_ids(parts: list[Layout], pieces: list[Piece], kind: str) -> np.ndarray:
    return np.concatenate([parts[number].ids[kind][start:stop] for number, start, stop in pieces])


def _plain(value: Any) -> Any:
    return value.decode("utf-8") if isinstance(value, bytes) else value.item()
