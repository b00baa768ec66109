"""Collectives between the ranks of a run: torch.distributed only, any backend, and world 1 where nothing is set up.

Shape legend: B rows per rank, W world, R rank, ... any trailing axes. Every function but `rank`, `world_size` and
`is_main` is a collective: all ranks of the group must call it, in the same order. `group=None` is the default group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

Group: TypeAlias = "dist.ProcessGroup | None"
T = TypeVar("T")


def rank(group: Group = None) -> int:
    """This process's number within the group, 0 without an initialised torch.distributed."""
    return dist.get_rank(group) if _ready() else 0


def world_size(group: Group = None) -> int:
    """Number of processes in the group, 1 without an initialised torch.distributed."""
    return dist.get_world_size(group) if _ready() else 1


def is_main() -> bool:
    """True in the one process that prints and writes."""
    return rank() == 0


def barrier(group: Group = None) -> None:
    """Wait until every rank is here."""
    if world_size(group) > 1:
        dist.barrier(group)


def gather(x: Tensor, group: Group = None) -> Tensor:
    """[B, ...] of every rank, in rank order: [W*B, ...]; no gradient; x itself at world 1. B must not differ."""
    world = world_size(group)
    if world == 1:
        return x.detach()
    if x.ndim == 0:
        return gather(x[None], group)
    rows = x.new_empty(world * x.shape[0], *x.shape[1:])
    # One tensor for all rows, and on the way back below each rank is sent the sums of its own rows only.
    dist.all_gather_into_tensor(rows, x.detach().contiguous(), group)
    return rows


def gather_with_gradient(x: Tensor, group: Group = None) -> Tensor:
    """[B, ...] of every rank as [W*B, ...], differentiable; x itself at world 1.

    The gradient that a rank gets for its rows is the sum over ranks of their gradients for these rows, so a loss that
    every rank takes over its own rows averages to the loss of the whole batch in value and gradient.
    """
    return x if world_size(group) == 1 else _Gather.apply(x, group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.rows = group, x.shape[0]
        return gather(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        own = gradient.new_empty(ctx.rows, *gradient.shape[1:])
        dist.reduce_scatter_tensor(own, gradient.contiguous(), group=ctx.group)
        return own, None


def all_reduce_sum(x: Tensor, group: Group = None) -> Tensor:
    """Sum of x over the ranks, as a new tensor without gradient (x itself at world 1)."""
    return _all_reduce(x, dist.ReduceOp.SUM, group)


def all_reduce_max(x: Tensor, group: Group = None) -> Tensor:
    """Largest x over the ranks, entry by entry, as a new tensor without gradient (x itself at world 1)."""
    return _all_reduce(x, dist.ReduceOp.MAX, group)


def all_reduce_mean(x: Tensor, group: Group = None) -> Tensor:
    """Mean of x over the ranks, as a new tensor without gradient (x itself at world 1)."""
    return all_reduce_sum(x, group) / world_size(group)


def share_from_main(values: Iterable[Tensor], device: torch.device) -> None:
    """Overwrite `values` with those of the main rank. They may lie anywhere; `device` is one that the backend sends
    from."""
    for value in values if world_size() > 1 else ():
        sent = value.detach().to(device).contiguous()
        dist.broadcast(sent, 0)
        value.detach().copy_(sent)


def gather_objects(value: Any, group: Group = None) -> list[Any]:
    """The picklable values of all ranks in rank order, on every rank. For small things: counts, names, results."""
    if world_size(group) == 1:
        return [value]
    values: list[Any] = [None] * world_size(group)
    dist.all_gather_object(values, value, group)
    return values


def on_main(work: Callable[[], T]) -> T:
    """`work()`, done by the main rank alone; every rank gets its value, or raises the exception that it raised.

    For what only one process may read or write: if it fails, all ranks fail and none waits for it.
    """
    if world_size() == 1:
        return work()
    value, error = _attempt(work) if is_main() else (None, None)
    value, error = gather_objects((value, error))[0]
    if error is not None:
        raise error
    return cast(T, value)


def alike(work: Callable[[], T]) -> T:
    """`work()` on every rank. If it raises on any, all raise: a rank where it succeeded raises the first error."""
    if world_size() == 1:
        return work()
    value, error = _attempt(work)
    errors = [raised for raised in gather_objects(error) if raised is not None]
    if errors:
        raise error if error is not None else errors[0]
    return cast(T, value)


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, error


def _ready() -> bool:
    return dist.is_available() and dist.is_initialized()


def _all_reduce(x: Tensor, operation: Any, group: Group) -> Tensor:
    x = x.detach()
    if world_size(group) == 1:
        return x
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, operation, group)
    return x
