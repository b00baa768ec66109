"""A checkpoint's safetensors files: each says whose it is, and has checksums of every tensor, verified when read.

A large tensor has one for each block of it, so that a stretch can be read, and verified, without the rest. Files of
before that have one for the whole tensor, which is then read. Files of format 1 (convclip 0.1.0) have none, and do not
say whose they are; of them only what cannot be right at all is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from convclip.files import CannotWrite, whole_file
from convclip.schema import UserError

LOCKED = "locked.safetensors"
# The checksum of the layout stands among those of the tensors.
LAYOUT = "layout"
# Values under one checksum, 1 MiB in fp32: a larger tensor has one for each block of so many.
BLOCK = 2**18


def write_tensors(
    tensors: Mapping[str, Tensor], path: Path, origin: Mapping[str, Any], layout: Mapping[str, Any] | None = None
) -> str:
    """Write contiguous CPU tensors whole or not at all, and return what identifies them: a hash of their checksums.

    `origin` says whose they are (run, step, rank), `layout` what lies where. Errors: CannotWrite.
    """
    text = json.dumps(layout)
    sums = {LAYOUT: zlib.crc32(text.encode()), **{name: checksums(tensor, BLOCK) for name, tensor in tensors.items()}}
    table = json.dumps(sums, sort_keys=True)
    identity = hashlib.sha256(table.encode()).hexdigest()[:16]
    metadata = {"origin": json.dumps({**origin, "identity": identity}), "checksums": table, "layout": text}
    metadata["block"] = str(BLOCK)
    with whole_file(path) as part:
        try:
            save_file(dict(tensors), part, metadata=metadata)
        except SafetensorError as error:  # Its name for a full disk.
            raise CannotWrite(f"{path} cannot be written: {error}") from None
    return identity


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a contiguous CPU tensor's bytes."""
    return zlib.crc32(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)


def checksums(tensor: Tensor, block: int) -> int | list[int]:
    """One of a tensor of up to `block` values, else one of each block of so many."""
    flat = tensor.detach().reshape(-1)
    return checksum(flat) if flat.numel() <= block else [checksum(part) for part in flat.split(block)]


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is infinite or not a number; one pass without a copy, `isfinite` takes several times as long."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(bound.isfinite().item() for bound in torch.aminmax(tensor.detach()))


class TensorFile:
    """An open file of a checkpoint, for reading.

    `keys` are the names of its tensors, `layout` is what `write_tensors` was given. Errors, here and in `get`:
    UserError of one line names the file and the checkpoints that could be used instead.
    """

    def __init__(self, path: Path, origin: Mapping[str, Any] | None = None) -> None:
        """`origin`: what the file must say that it is; None for a file of format 1, which says nothing."""
        self.path, self._sums, self._block = path, None, BLOCK
        try:
            self._file: Any = safe_open(path, framework="pt")
            metadata = self._file.metadata() or {}
            self.keys: list[str] = list(self._file.keys())
            text = metadata.get("layout", "null")
            self.layout: Any = json.loads(text)
            self.origin: dict[str, Any] = dict(json.loads(metadata.get("origin", "{}")))
            if origin is not None:
                self._sums = dict(json.loads(metadata["checksums"]))
                self._block = max(1, int(metadata.get("block", BLOCK)))
                if self._sums.keys() != {LAYOUT, *self.keys} or self._sums[LAYOUT] != zlib.crc32(text.encode()):
                    raise ValueError("its table of contents was changed")
        except KeyError:
            raise self._refusal("is damaged (it has no checksums)") from None
        except (OSError, SafetensorError, ValueError, TypeError, RecursionError) as error:
            raise self._refusal(f"is missing or damaged ({error})") from None
        for key, value in (origin or {}).items():
            if self.origin.get(key) != value:
                raise self._refusal(f"is of {key} {self.origin.get(key)}, its checkpoint of {key} {value}")

    def get(self, key: str) -> Tensor:
        """A tensor, on the CPU: as it was written, and finite."""
        try:
            tensor: Tensor = self._file.get_tensor(key)
        except (OSError, SafetensorError, ValueError) as error:
            raise self._refusal(f"is damaged ({error})") from None
        if self._sums is not None:
            sums = self._sums[key]
            found = checksums(tensor, self._block) if isinstance(sums, list) else checksum(tensor)
            if found != sums:
                raise self._refusal(f"is damaged (wrong checksum of {key})")
        if not all(is_finite(part) for part in self._of_parameters(key, tensor)):
            raise self._refusal(f"has values in {key} that are not finite")
        return tensor

    def shape(self, key: str) -> list[int]:
        """Shape of a tensor, by the file's head. KeyError: it is not there."""
        if key not in self.keys:
            raise KeyError(key)
        return list(self._file.get_slice(key).get_shape())

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Stretches [start, stop) of a tensor's flattened values, each flat: as they were written, and finite.

        Only the blocks that hold them are read. Errors: also IndexError where the tensor does not reach so far.
        """
        size, sums = math.prod(self.shape(key)), self._sums[key] if self._sums is not None else None
        if any(not 0 <= start <= stop <= size for start, stop in ranges):
            raise IndexError(f"{key} has {size} values")
        if not isinstance(sums, list):
            flat = self.get(key).view(-1)
            return [flat[start:stop] for start, stop in ranges]
        block = self._block
        numbers = sorted({n for start, stop in ranges for n in range(start // block, -(-stop // block))})
        runs: dict[int, Tensor] = {}
        for first, last in _runs(numbers):
            flat = self._read(key, first * block, min(last * block, size))
            if [checksum(part) for part in flat.split(block)] != sums[first:last]:
                raise self._refusal(f"is damaged (wrong checksum of {key})")
            runs.update((number, flat[(number - first) * block :]) for number in range(first, last))
        values = [
            runs[start // block][start % block :][: stop - start] if start < stop else torch.empty(0)
            for start, stop in ranges
        ]
        if not all(map(is_finite, values)):
            raise self._refusal(f"has values in {key} that are not finite")
        return values

    def _read(self, key: str, start: int, stop: int) -> Tensor:
        """Values [start, stop) of a flattened tensor; the file gives whole rows of it."""
        try:
            rows = self._file.get_slice(key)
            width = math.prod(rows.get_shape()[1:])
            first = start // width
            return rows[first : -(-stop // width)].reshape(-1)[start - first * width : stop - first * width]
        except (OSError, SafetensorError, ValueError) as error:
            raise self._refusal(f"is damaged ({error})") from None

    def _of_parameters(self, key: str, tensor: Tensor) -> list[Tensor]:
        """What of a shard's tensor belongs to parameters; format 1 kept whatever stood in the padding between them."""
        number, flat = key.partition("/")[0], tensor.view(-1)
        if self._sums is not None or not number.isdecimal():
            return [tensor]
        try:
            pieces = [(offset, offset + length) for _, _, offset, length in self.layout["shards"][int(number)]]
        except (KeyError, TypeError, ValueError, IndexError):
            return [tensor]
        fits = flat.numel() >= max((end for _, end in pieces), default=0)
        return [flat[start:end] for start, end in pieces] if fits else [tensor]

    def wrong_layout(self, error: Exception) -> UserError:
        """What to raise when the layout did not lead to the tensors."""
        return self._refusal(f"is damaged (its layout is not one of a checkpoint: {type(error).__name__} {error})")

    def _refusal(self, what: str) -> UserError:
        return UserError(f"{self.path} {what}: {advice(self.path.parent)}")


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Stretches [first, last) of ascending whole numbers that follow one another."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs


def advice(checkpoint: Path) -> str:
    """What to do without `checkpoint`: the others beside it that have a state, newest first."""
    beside = sorted(checkpoint.parent.glob("step-*"), reverse=True)
    names = [path.name for path in beside if path.name != checkpoint.name and (path / "state.json").is_file()]
    return "resume from another checkpoint" + (f": {', '.join(names[:5])}" if names else "")
