"""Where DeepSpeed keeps the fp32 masters: the one module that knows each ZeRO stage's layout.

Every rank's optimizer holds flat fp32 shards. A `MasterShard` names one, and the `Piece`s of model
parameters it is made of.
Rebuilding the engine, checkpoints, exact initial masters and the clamp of logit_scale are all written on top of this.
Measured on deepspeed 0.19; the attributes read here are not public, `tests/engine/zero/test_masters.py` watches them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + length) of a flattened parameter, standing at `offset` in the shard."""

    parameter: str
    start: int
    offset: int
    length: int


@dataclass(frozen=True)
class MasterShard:
    """One fp32 master tensor of this rank: the optimizer's own key for its state."""

    master: Tensor
    pieces: tuple[Piece, ...]

    @property
    def flat(self) -> Tensor:
        """The master's values [n], sharing memory with it."""
        return self.master.data.view(-1)

    @property
    def padding(self) -> list[slice]:
        """Stretches of `flat` that belong to no parameter. ZeRO-3 leaves there what the memory held before."""
        gaps, end = [], 0
        for piece in sorted(self.pieces, key=lambda piece: piece.offset):
            gaps.append(slice(end, piece.offset))
            end = piece.offset + piece.length
        return [gap for gap in (*gaps, slice(end, self.flat.numel())) if gap.start < gap.stop]


def master_shards(engine: DeepSpeedEngine) -> list[MasterShard]:
    """This rank's shards, in the optimizer's order: old groups first, so they keep their place across a rebuild."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return _stage3_shards(optimizer, names)
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        return [
            _cut(zip(group, offsets, strict=True), names, master, rank_of(optimizer.real_dp_process_group[index]))
            for index, (group, offsets, master) in enumerate(
                zip(
                    optimizer.round_robin_bit16_groups,
                    optimizer.round_robin_bit16_offsets,
                    optimizer.single_partition_of_fp32_groups,
                    strict=True,
                )
            )
        ]
    if isinstance(optimizer, BF16_Optimizer):
        return [
            _cut(_packed(group), names, master, rank_of(optimizer.real_dp_process_group[index]))
            for index, (group, master) in enumerate(
                zip(optimizer.bf16_groups, optimizer.fp32_groups_flat_partition, strict=True)
            )
        ]
    # Stage 0 keeps one master per parameter, on every rank: beside the model in bf16, the model's own weights in fp32.
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        return [_whole(parameter, names, master) for parameter, master in _stage0_pairs(optimizer)]
    return [_whole(parameter, names, parameter) for group in optimizer.param_groups for parameter in group["params"]]


def is_replicated(engine: DeepSpeedEngine) -> bool:
    """True in stage 0: every rank holds all of the optimizer's state."""
    return engine.zero_optimization_stage() == 0


def write_masters(engine: DeepSpeedEngine, values: Mapping[str, Tensor]) -> None:
    """Overwrite the masters of the named parameters with full fp32 tensors, then refresh the model's copy of them."""
    for shard in master_shards(engine):
        for piece in shard.pieces:
            if piece.parameter in values:
                source = values[piece.parameter].reshape(-1)[piece.start : piece.start + piece.length]
                shard.flat[piece.offset : piece.offset + piece.length].copy_(source)
    refresh_model_copy(engine)


@torch.no_grad()
def refresh_model_copy(engine: DeepSpeedEngine) -> None:
    """Make the model's (possibly rounded) weights follow the fp32 masters; all ranks take part."""
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        for flat, master in zip(
            optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True
        ):
            flat.data.copy_(master.data)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer | BF16_Optimizer):
        optimizer.update_lp_params()
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        for parameter, master in _stage0_pairs(optimizer):
            parameter.data.copy_(master.data)


@torch.no_grad()
def clamp_parameter(engine: DeepSpeedEngine, shards: Iterable[MasterShard], name: str, low: float, high: float) -> None:
    """Clamp a parameter's master and the model's copy: clamping the copy alone is undone by the next step."""
    for shard in shards:
        for piece in shard.pieces:
            if piece.parameter == name:
                shard.flat[piece.offset : piece.offset + piece.length].clamp_(low, high)
    parameter = engine.module.get_parameter(name)
    parameter.data.clamp_(low, high)
    partition = getattr(parameter, "ds_tensor", None)
    if partition is not None:
        # This rank's part of it in stage 3; behind the end of it lies padding, which nobody reads.
        partition.data.clamp_(low, high)


def rank_of(group: torch.distributed.ProcessGroup) -> int:
    """This process's rank in a process group."""
    return torch.distributed.get_rank(group)


def _whole(parameter: Tensor, names: Mapping[int, str], master: Tensor) -> MasterShard:
    """The shard of one undivided parameter."""
    return MasterShard(master, (Piece(names[id(parameter)], 0, 0, parameter.numel()),))


def _stage0_pairs(optimizer: FP16_UnfusedOptimizer) -> list[tuple[Tensor, Tensor]]:
    """(parameter, master) pairs of stage 0 in bf16."""
    return [
        pair
        for group, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        for pair in zip(group, masters, strict=True)
    ]


def _packed(parameters: Iterable[Tensor]) -> list[tuple[Tensor, int]]:
    """Parameters with their offsets when laid end to end."""
    offset, placed = 0, []
    for parameter in parameters:
        placed.append((parameter, offset))
        offset += parameter.numel()
    return placed


def _cut(layout: Iterable[tuple[Tensor, int]], names: Mapping[int, str], master: Tensor, rank: int) -> MasterShard:
    """The shard that holds elements [rank * size, (rank + 1) * size) of a flattened group."""
    first, last = rank * master.numel(), (rank + 1) * master.numel()
    pieces = []
    for parameter, offset in layout:
        begin, end = max(offset, first), min(offset + parameter.numel(), last)
        if begin < end:
            pieces.append(Piece(names[id(parameter)], begin - offset, begin - first, end - begin))
    return MasterShard(master, tuple(pieces))


def _stage3_shards(optimizer: DeepSpeedZeroOptimizer_Stage3, names: Mapping[int, str]) -> list[MasterShard]:
    """Stage 3 partitions each parameter on its own; a shard is a sub-group of such partitions laid end to end."""
    shards = []
    for group, master, process_group in zip(
        optimizer.fp16_groups,
        optimizer.fp32_partitioned_groups_flat,
        optimizer.sub_group_process_groups,
        strict=True,
    ):
        rank, offset, pieces = rank_of(process_group), 0, []
        for parameter in group:
            size = parameter.partition_numel()
            start = rank * size
            length = max(0, min(size, parameter.ds_numel - start))
            if length:
                pieces.append(Piece(names[id(parameter)], start, offset, length))
            offset += size
        shards.append(MasterShard(master, tuple(pieces)))
    return shards
