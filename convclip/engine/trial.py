"""A full step on made-up data before the data starts: a step that does not fit fails at once, not hours later."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from convclip.data.micro_batches import Batch
from convclip.devices import RandomState, forget_peak_memory, memory_gib, total_memory
from convclip.distributed import world_size
from convclip.engine.meters import logger
from convclip.engine.plan.memory import GIB, check_estimate, estimate_stage
from convclip.engine.zero.build import OptimizerSnapshot, restore_snapshot, take_snapshot
from convclip.engine.zero.optimizer import moved_state
from convclip.engine.zero.staged_engine import StagedEngine
from convclip.schema import Recipe, UserError


def try_full_step(
    staged: StagedEngine, recipe: Recipe, batch: Batch, take_step: Callable[[Iterator[Batch]], Any]
) -> None:
    """Run `take_step`, one optimizer step on the loader's batches, on `batch` alone; then undo whatever it changed.

    It is a whole step, so that the optimizer's state is there too; weights, state, counters, loss scale, buffers and
    random state are put back, so the run after it is the same bit for bit. UserError where memory runs out.
    """
    engine = staged.engine
    before, random = _copied(take_snapshot(engine)), RandomState.now()
    buffers = [buffer.clone() for buffer in engine.module.buffers()]
    micro, count = recipe.batch.per_rank(world_size())
    logger.info(f"trying a full step of {micro * count} rows on made-up data")
    try:
        take_step(itertools.repeat(batch))
    except torch.OutOfMemoryError:
        raise UserError(_advice(staged, recipe)) from None
    logger.info(f"a full step fits: peak memory {memory_gib():.2f} GiB")
    engine.basic_optimizer.state.clear()
    restore_snapshot(engine, before)
    with torch.no_grad():
        for buffer, value in zip(engine.module.buffers(), buffers, strict=True):
            buffer.copy_(value)
    random.restore()
    forget_peak_memory()


def estimate_report(staged: StagedEngine, recipe: Recipe) -> str:
    """The plan's estimate of the present stage beside the memory that this process has taken at most."""
    return check_estimate(recipe, staged.present, staged.ds_config, staged.world, memory_gib())


def _copied(snapshot: OptimizerSnapshot) -> OptimizerSnapshot:
    """The snapshot, which only refers to tensors, with copies of them in main memory."""
    return OptimizerSnapshot(
        [master.detach().to("cpu", copy=True) for master in snapshot.masters],
        [moved_state(state, "cpu", copy=True) for state in snapshot.states],
        snapshot.scaler,
        snapshot.counters,
    )


def _advice(staged: StagedEngine, recipe: Recipe) -> str:
    """One line that says what to change."""
    world, size, batch = world_size(), total_memory(), recipe.batch
    micro, count = batch.per_rank(world)
    if batch.accumulation > 1:
        changes = [f"raise batch.accumulation above {batch.accumulation}"]
    else:
        chunked = recipe.model_copy(update={"batch": batch.model_copy(update={"micro": micro})})
        fits = estimate_stage(chunked, staged.present, staged.ds_config, world).largest_micro(size)
        changes = [f"set batch.micro below {micro}" + (f" ({fits} should fit)" if 0 < fits < micro else "")]
    if not recipe.activation_checkpointing:
        changes.append("set activation_checkpointing=true")
    if recipe.loss.tile is None:
        changes.append("set loss.tile=4096")
    return (
        f"out of memory in a trial step of {micro * count} rows, {micro} at a time, on a device of {size / GIB:.0f} "
        f"GiB: {', or '.join(changes)}"
    )
