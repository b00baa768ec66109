"""A full step on made-up data before the data starts: what does not fit is found at once and not hours later."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator

from convclip.distributed import world_size
from convclip.engine.inputs import InputSource
from convclip.engine.meters import logger, memory_gib
from convclip.engine.plan.memory import GIB, estimate_stage, longest_captions
from convclip.engine.stages.groups import Stage
from convclip.engine.steps import RandomState
from convclip.engine.zero.build import OptimizerSnapshot, restore_snapshot, take_snapshot
from convclip.schema import Recipe, UserError


def try_full_step(
    engine: DeepSpeedEngine,
    recipe: Recipe,
    stage: Stage,
    ds_config: Mapping[str, Any],
    source: InputSource,
    take_step: Callable[[Iterator[dict[str, Any]]], Any],
) -> None:
    """Run `take_step`, one optimizer step on the loader's batches, on made-up ones; then undo whatever it changed.

    It is a whole step, so that the optimizer's state is there too; weights, state, counters, loss scale, buffers and
    random state are put back, and what follows is to the bit what it would have been. UserError where memory runs out.
    """
    before, random = _copied(take_snapshot(engine)), RandomState.now()
    buffers = [buffer.clone() for buffer in engine.module.buffers()]
    micro, count = recipe.batch.per_rank(world_size())
    logger.info(f"trying a full step of {micro * count} rows on made-up data")
    try:
        take_step(itertools.repeat(made_up_batch(recipe, micro, source)))
    except torch.OutOfMemoryError:
        raise UserError(_advice(recipe, stage, ds_config)) from None
    logger.info(f"a full step fits: peak memory {memory_gib():.2f} GiB")
    engine.basic_optimizer.state.clear()
    restore_snapshot(engine, before)
    with torch.no_grad():
        for buffer, value in zip(engine.module.buffers(), buffers, strict=True):
            buffer.copy_(value)
    random.restore()
    get_accelerator().empty_cache()
    get_accelerator().reset_peak_memory_stats()


def made_up_batch(recipe: Recipe, rows: int, source: InputSource) -> dict[str, Any]:
    """A batch as the loader gives it: noise, captions as long as the context, ids that the store has."""
    generator, side = torch.Generator().manual_seed(0), recipe.model.image.image_size
    batch: dict[str, Any] = {
        "image": torch.randint(0, 256, (rows, 3, side, side), dtype=torch.uint8, generator=generator),
        "text": longest_captions(recipe, rows),
        "image_id": torch.arange(rows),
        "caption_id": torch.arange(rows),
        "broken": [],
    }
    if source.teacher is not None:
        batch["teacher_text"] = source.teacher.tokenizer(["made up"]).repeat(rows, 1)
    if source.store is not None:
        for name, key, per_item in (
            ("image_map", "image_id", source.views),
            ("teacher_image", "image_id", source.views),
            ("text_embedding", "caption_id", 1),
            ("teacher_text", "caption_id", 1),
        ):
            if name in source.store:
                batch[key] = torch.full((rows,), int(source.store.ids(name)[0]) // per_item)
    return batch


def _copied(snapshot: OptimizerSnapshot) -> OptimizerSnapshot:
    """The snapshot, which only refers to tensors, with copies of them in main memory."""
    return OptimizerSnapshot(
        [master.detach().to("cpu", copy=True) for master in snapshot.masters],
        [{key: value.to("cpu", copy=True) for key, value in state.items()} for state in snapshot.states],
        snapshot.scaler,
        snapshot.counters,
    )


def _advice(recipe: Recipe, stage: Stage, ds_config: Mapping[str, Any]) -> str:
    """One line that says what to change."""
    world, size, batch = world_size(), get_accelerator().total_memory(), recipe.batch
    micro, count = batch.per_rank(world)
    if batch.accumulation > 1:
        changes = [f"raise batch.accumulation above {batch.accumulation}"]
    else:
        chunked = recipe.model_copy(update={"batch": batch.model_copy(update={"micro": micro})})
        fits = estimate_stage(chunked, stage, ds_config, world).largest_micro(size)
        changes = [f"set batch.micro below {micro}" + (f" ({fits} should fit)" if 0 < fits < micro else "")]
    if not recipe.activation_checkpointing:
        changes.append("set activation_checkpointing=true")
    if recipe.loss.tile is None:
        changes.append("set loss.tile=4096")
    return (
        f"out of memory in a trial step of {micro * count} rows, {micro} at a time, on a device of {size / GIB:.0f} "
        f"GiB: {', or '.join(changes)}"
    )
