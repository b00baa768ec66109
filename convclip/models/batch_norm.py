"""Batch norms in half precision and on several ranks: running statistics stay in float32, and ranks share them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from convclip.devices import on_accelerator
from convclip.distributed import all_reduce_mean, world_size
from convclip.schema import UserError

Model = TypeVar("Model", bound=nn.Module)


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms of `model` that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def to_precision(model: Model, dtype: torch.dtype, device: torch.device | None = None) -> Model:
    """`model.to(device, dtype)`, with the batch norms' running statistics in float32."""
    with float32_statistics(model):
        return model.to(device=device, dtype=dtype)


@contextmanager
def float32_statistics(model: nn.Module) -> Iterator[None]:
    """Whatever precision the model is cast to in this context, its batch norms keep float32 running statistics.

    A running mean moves by a tenth of a batch's deviation at a time, and bfloat16's eight bits lose most of that. torch
    takes a half-precision input with float32 weights and statistics, but no mixture: the weights are cast as it runs.
    """
    norms = batch_norms(model)
    # Copies: a cast may change a buffer in place.
    kept = [[value.float().clone() for value in _statistics(norm)] for norm in norms]
    yield
    for norm, (mean, variance) in zip(norms, kept, strict=True):
        device = _statistics(norm)[0].device
        norm.running_mean, norm.running_var = mean.to(device), variance.to(device)
        norm.forward = _Float32Weights(norm)  # type: ignore[method-assign, assignment]  # of this one module


def average_running_statistics(model: nn.Module) -> None:
    """Give every rank the mean of all ranks' running statistics; a collective. They train on different rows.

    A running mean is linear in what it has seen, so it does not matter how often this is called. Norms in eval mode,
    such as a locked tower's, are alike already: the mean of three equal numbers may round to another one.
    """
    norms = [norm for norm in batch_norms(model) if norm.training]
    if world_size() == 1 or not norms:
        return
    own = [value for norm in norms for value in _statistics(norm)]
    mean = all_reduce_mean(torch.cat([value.float().flatten() for value in own]))
    with torch.no_grad():
        for value, shared in zip(own, mean.split([value.numel() for value in own]), strict=True):
            value.copy_(shared.view_as(value))


def synchronised(model: Model) -> Model:
    """`model` with batch norms that take the statistics of a step over all ranks. Errors: UserError on a CPU."""
    if not on_accelerator():
        raise UserError(
            "batch.sync_batch_norm: torch synchronises batch norms on accelerators only; leave it out on a CPU "
            "(running statistics are averaged over ranks in any case)"
        )
    return convert_sync_batchnorm(model)


def _statistics(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None and norm.running_var is not None
    return norm.running_mean, norm.running_var


class _Float32Weights:
    """A batch norm's own forward, with its weight and bias in float32 while it runs."""

    def __init__(self, norm: _BatchNorm) -> None:
        self.norm = norm

    def __call__(self, x: Tensor, *more: Any) -> Tensor:
        with _in_float32(self.norm):
            return type(self.norm).forward(self.norm, x, *more)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Float32Weights:
        return _Float32Weights(memo[id(self.norm)])


@contextmanager
def _in_float32(norm: _BatchNorm) -> Iterator[None]:
    # A module looks for an attribute in its own dictionary before it looks among its parameters.
    shadows = {n: p.float() for n, p in norm.named_parameters(recurse=False) if p.dtype != torch.float32}
    norm.__dict__.update(shadows)
    try:
        yield
    finally:
        for name in shadows:
            del norm.__dict__[name]
