"""Reading a checkpoint whose pieces lie otherwise: of another number of ranks, ZeRO stage, or size of sub-groups.

Every rank's file says where each stretch of each parameter stands in its shards. A rank looks for the stretches that
its own shards are made of, and reads these alone: masters, state of the optimizer, moving average. It begins with the
file that most likely has them, and opens no more files when all are found.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convclip.distributed import rank, world_size
from convclip.engine.zero.masters import MasterShard, Piece
from convclip.models.checkpoint_files import TensorFile, advice
from convclip.models.checkpoint_weights import EMA, MASTER, RunState, rank_file
from convclip.schema import UserError


@dataclass(frozen=True)
class Stretch:
    """`length` values of a file's shard, from `source` on, that belong to one of this rank's from `target` on."""

    file: TensorFile
    shard: int
    source: int
    target: int
    length: int


@dataclass
class Shares:
    """What a checkpoint holds for this rank's shards, one of each by shard: as in OptimizerSnapshot, and the moving
    averages where it has some."""

    masters: list[Tensor]
    states: list[dict[str, Any]]
    averages: list[Tensor] | None


def layout_of(pieces: Iterable[Piece]) -> list[list[Any]]:
    """The pieces of a shard as a checkpoint's layout has them."""
    return [[piece.parameter, piece.start, piece.offset, piece.length] for piece in pieces]


def lies_alike(file: TensorFile, shards: Sequence[MasterShard]) -> bool:
    """Whether a file's shards are made of the same pieces, in the same places, as these."""
    return file.layout["shards"] == [layout_of(shard.pieces) for shard in shards] and all(
        math.prod(file.shape(f"{index}/{MASTER}")) == shard.master.numel() for index, shard in enumerate(shards)
    )


def read_alike(file: TensorFile, count: int, ema: bool) -> Shares:
    """The shares of a file whose `count` shards lie as this rank's do. Errors: UserError, KeyError of its layout."""
    layout, numbers = file.layout, range(count)
    # A checkpoint of 0.1.0 has no "state_values": all of its state was tensors.
    values = layout.get("state_values", [{}] * count)
    states = [{**values[n], **{key: file.get(f"{n}/{key}") for key in layout["state_keys"][n]}} for n in numbers]
    has_average = ema and f"0/{EMA}" in file.keys
    averages = [file.get(f"{n}/{EMA}") for n in numbers] if has_average else None
    return Shares([file.get(f"{n}/{MASTER}") for n in numbers], states, averages)


def read_shares(path: Path, state: RunState, shards: Sequence[MasterShard], ema: bool) -> Shares:
    """This rank's shares of the checkpoint at `path`; where its shards belong to no parameter stand zeros.

    Errors: UserError of one line names a file that is missing or damaged, a parameter that is not all there, and state
    that cannot be of one shard.
    """
    stretches = _find(path, state, [shard.pieces for shard in shards])
    files = list({id(one.file): one.file for found in stretches for one in found}.values())
    has_average = ema and all(f"0/{EMA}" in file.keys for file in files)
    shares = Shares([], [], [] if has_average else None)
    each = _per_value(files)
    for shard, found in zip(shards, stretches, strict=True):
        shares.masters.append(_laid(found, MASTER, shard.master.numel()))
        shares.states.append(_state(path, state, shard, found, each))
        if shares.averages is not None:
            shares.averages.append(_laid(found, EMA, shard.master.numel()))
    return shares


def _find(path: Path, state: RunState, shards: Sequence[Sequence[Piece]]) -> list[list[Stretch]]:
    """The stretches of each of this rank's shards."""
    found: list[list[Stretch]] = [[] for _ in shards]
    wanted: dict[str, list[tuple[int, Piece]]] = {}
    for number, pieces in enumerate(shards):
        for piece in pieces:
            wanted.setdefault(piece.parameter, []).append((number, piece))
    missing = {name: sum(piece.length for _, piece in pieces) for name, pieces in wanted.items()}
    for file in _files(path, state):
        if not any(missing.values()):
            break
        try:
            for shard, pieces in enumerate(file.layout["shards"]):
                for name, start, offset, length in pieces:
                    for number, piece in wanted.get(name, ()):
                        begin, end = max(start, piece.start), min(start + length, piece.start + piece.length)
                        if begin < end:
                            source, target = offset + begin - start, piece.offset + begin - piece.start
                            found[number].append(Stretch(file, shard, source, target, end - begin))
                            missing[name] -= end - begin
        except (KeyError, TypeError, ValueError) as error:
            raise file.wrong_layout(error) from None
    lacking = next((name for name, count in missing.items() if count), None)
    if lacking is not None:
        raise UserError(f"{path} does not hold all of {lacking}: {advice(path)}")
    return found


def _files(path: Path, state: RunState) -> Iterator[TensorFile]:
    """The files that hold shards, opened one by one: ZeRO's ranks hold neighbouring parts, in their order."""
    count = 1 if state.zero_stage == 0 else state.world_size
    first = rank() * count // world_size()
    for number in (*range(first, count), *range(first)):
        yield TensorFile(path / rank_file(number), state.origin(number))


def _per_value(files: Iterable[TensorFile]) -> set[str]:
    """The optimizer's state that has a value for each of the master's, as Adam's moments; other state, as the count of
    its steps, is that of a whole shard."""
    same: dict[str, list[bool]] = {}
    for file in files:
        try:
            for index, keys in enumerate(file.layout["state_keys"]):
                size = math.prod(file.shape(f"{index}/{MASTER}"))
                for key in keys:
                    shape = file.shape(f"{index}/{key}")
                    # Of a shard of one value a scalar tells nothing; where all are such, one value has an axis.
                    if size > 1 or shape:
                        same.setdefault(key, []).append(math.prod(shape) == size)
        except (KeyError, TypeError) as error:
            raise file.wrong_layout(error) from None
    return {key for key, votes in same.items() if all(votes)}


def _laid(stretches: Iterable[Stretch], key: str, size: int) -> Tensor:
    """A flat tensor [size] with what the files' tensors `key` of a shard have of it; zeros elsewhere."""
    laid: Tensor | None = None
    for file, shard, group in _by_source(stretches):
        ranges = [(one.source, one.source + one.length) for one in group]
        try:
            values = file.get_ranges(f"{shard}/{key}", ranges)
        except (KeyError, IndexError) as error:
            raise file.wrong_layout(error) from None
        for one, value in zip(group, values, strict=True):
            if laid is None:
                laid = torch.zeros(size, dtype=value.dtype)
            laid[one.target : one.target + one.length] = value
    return torch.zeros(size) if laid is None else laid


def _state(
    path: Path, run: RunState, shard: MasterShard, stretches: Sequence[Stretch], each: set[str]
) -> dict[str, Any]:
    """The optimizer's state of a shard; where a parameter has none yet, its values are zeros, as ZeRO keeps them."""
    state: dict[str, Any] = {}
    holding: dict[str, list[Stretch]] = {}
    for file, index, group in _by_source(stretches):
        try:
            keys = file.layout["state_keys"][index]
            # Copies: several shards here may be of one there, and the optimizer counts each one's steps in place.
            whole = {key: file.get(f"{index}/{key}").clone() for key in keys if key not in each}
            if "state_values" in file.layout:
                whole |= file.layout["state_values"][index]
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise file.wrong_layout(error) from None
        for key in keys:
            if key in each:
                holding.setdefault(key, []).extend(group)
        for key, value in whole.items():
            if not _equal(state.setdefault(key, value), value):
                raise UserError(
                    f"{path}: {key} of the optimizer's state is not the same for all parameters that share a shard "
                    f"here: resume with ZeRO stage {run.zero_stage} on {run.world_size} ranks, as it was made"
                )
    values = {key: _laid(group, key, shard.master.numel()) for key, group in holding.items()}
    return state | {key: value.view(shard.master.shape) for key, value in values.items()}


def _by_source(stretches: Iterable[Stretch]) -> Iterator[tuple[TensorFile, int, list[Stretch]]]:
    """Stretches of one shard of one file together, in the order that they have there."""
    groups: dict[tuple[int, int], list[Stretch]] = {}
    for one in stretches:
        groups.setdefault((id(one.file), one.shard), []).append(one)
    for group in groups.values():
        yield group[0].file, group[0].shard, sorted(group, key=lambda one: one.source)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)
