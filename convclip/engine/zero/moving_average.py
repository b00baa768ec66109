"""The moving average of what trains (`optim.ema_decay`): in fp32, beside the masters and partitioned as they are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from deepspeed import DeepSpeedEngine
from torch import Tensor

from convclip.engine.zero.masters import MasterShard, refresh_model_copy


class MovingAverage:
    """average = decay x average + (1 - decay) x weights, after each update; nothing at all where `decay` is None.

    `values` are this rank's, one flat fp32 tensor for each of its master shards, on that shard's device. A rebuilt
    engine has the shards of the one before it first, so an unfreeze event only adds to them. Buffers have no average:
    running statistics are moving averages already, and what evaluates or exports the average takes them as they are.
    """

    def __init__(self, decay: float | None) -> None:
        self.decay = decay
        self.values: list[Tensor] = []
        self._shards: Sequence[MasterShard] = ()

    def begin(self, shards: Sequence[MasterShard], values: Sequence[Tensor] | None = None) -> None:
        """Start from the weights as they are now, or from the `values` that a checkpoint has."""
        self.values = []
        self.follow(shards)
        for own, value in zip(self.values, values or (), strict=False):
            own.copy_(value)

    def follow(self, shards: Sequence[MasterShard]) -> None:
        """Go on with the shards of a rebuilt engine; those that it adds start from their present weights."""
        if self.decay is not None:
            self._shards = shards
            self.values += [shard.flat.clone() for shard in shards[len(self.values) :]]

    def update(self) -> None:
        """Take in the weights after an update of the optimizer."""
        if self.decay is not None:
            for shard, value in zip(self._shards, self.values, strict=True):
                value.lerp_(shard.flat, 1 - self.decay)

    @contextlib.contextmanager
    def as_weights(self, engine: DeepSpeedEngine) -> Iterator[None]:
        """The model has the average as its weights within; all ranks take part. Errors inside end the run anyway."""
        self._exchange(engine)
        yield
        self._exchange(engine)

    def _exchange(self, engine: DeepSpeedEngine) -> None:
        """Swap masters and averages, shard by shard, so that there is never a third copy of all."""
        for shard, value in zip(self._shards, self.values, strict=True):
            kept = shard.flat.clone()
            shard.flat.copy_(value)
            value.copy_(kept)
        refresh_model_copy(engine)
