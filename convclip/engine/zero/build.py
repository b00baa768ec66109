"""Building the DeepSpeed engine, and rebuilding it with more parameter groups at an unfreeze event.

The rebuild moves only this rank's own shards: the optimizer's fp32 masters and its state are kept by reference, the
old engine is taken apart, a new one is built with the old groups first (same parameters, same order, so the same
partition), and the shards are copied back. Nothing is gathered, and what was training goes on to the bit.
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero import parameter_offload
from torch import Tensor, nn

from convclip.engine.stages.groups import Group
from convclip.engine.zero.ds_config import precision
from convclip.engine.zero.masters import master_shards, refresh_model_copy, write_masters
from convclip.engine.zero.optimizer import make_optimizer, moved_state, optimizer_groups
from convclip.models.batch_norm import float32_statistics
from convclip.schema import Optim

COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


@dataclass
class OptimizerSnapshot:
    """What the optimizer of this rank knows: per shard the master and its state, loss scaler, step counters."""

    masters: list[Tensor]
    states: list[dict[str, Any]]
    scaler: dict[str, float]
    counters: dict[str, int]


def build_engine(
    model: nn.Module,
    groups: Sequence[Group],
    ds_config: Mapping[str, Any],
    optim: Optim,
    fp32_values: Mapping[str, Tensor],
) -> DeepSpeedEngine:
    """A DeepSpeed engine that trains `groups` of `model` and freezes everything else.

    `fp32_values` are full-precision tensors by parameter name: DeepSpeed makes the masters from already rounded bf16 /
    fp16 weights, so the masters of these parameters are written again, unrounded.
    """
    trainable = {name for group in groups for name in group.parameters}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    model.train()
    optimizer = make_optimizer(optim, optimizer_groups(model, groups))
    with _quiet(), float32_statistics(model):
        for buffer in model.buffers():
            # DeepSpeed casts the parameters alone; a mask must have the precision of what it is added to.
            if buffer.is_floating_point():
                buffer.data = buffer.data.to(precision(ds_config))
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=dict(ds_config))
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        # Its constructor runs a step on zero gradients: undo the step count and the weight decay it applied.
        engine.optimizer.refresh_fp32_params()
        engine.basic_optimizer.state.clear()
    if fp32_values and engine.module.logit_scale.dtype != torch.float32:
        write_masters(engine, fp32_values)
    return engine


def rebuild_engine(
    engine: DeepSpeedEngine,
    groups: Sequence[Group],
    ds_config: Mapping[str, Any],
    optim: Optim,
    fp32_values: Mapping[str, Tensor],
) -> DeepSpeedEngine:
    """A new engine that trains `groups`, whose first ones are the old engine's; call between optimizer steps.

    `fp32_values` holds the unrounded weights of the newly trained parameters.
    """
    snapshot = take_snapshot(engine)
    model = dismantle(engine)
    del engine
    gc.collect()
    # What is left lives on: later collections, DeepSpeed's own too, need not walk it (imports alone take 0.3 s).
    gc.freeze()
    engine = build_engine(model, groups, ds_config, optim, fp32_values)
    restore_snapshot(engine, snapshot)
    return engine


def take_snapshot(engine: DeepSpeedEngine) -> OptimizerSnapshot:
    """References, not copies, to this rank's optimizer state."""
    shards = master_shards(engine)
    state = engine.basic_optimizer.state
    return OptimizerSnapshot(
        masters=[shard.flat for shard in shards],
        states=[dict(state.get(shard.master, {})) for shard in shards],
        scaler=_numbers(getattr(engine.optimizer, "loss_scaler", None)),
        counters={name: getattr(engine, name) for name in COUNTERS},
    )


def restore_snapshot(engine: DeepSpeedEngine, snapshot: OptimizerSnapshot) -> None:
    """Give `engine` the snapshot's state; its first shards are the snapshot's, later ones keep their fresh state."""
    shards = master_shards(engine)
    for shard, master, state in zip(shards, snapshot.masters, snapshot.states, strict=False):
        if shard.master.numel() != master.numel():
            raise RuntimeError(f"shard of {master.numel()} values does not fit one of {shard.master.numel()}")
        shard.flat.copy_(master)
        if state:
            engine.basic_optimizer.state[shard.master] = moved_state(state, shard.master.device)
    for name, value in snapshot.scaler.items():
        setattr(engine.optimizer.loss_scaler, name, value)
    for name, value in snapshot.counters.items():
        setattr(engine, name, value)
    refresh_model_copy(engine)


def dismantle(engine: DeepSpeedEngine) -> nn.Module:
    """Take `engine` apart and return its model: destroy() alone leaves a hook pair and a live engine behind."""
    model = engine.module
    for hook in (engine.module_forward_pre_hook, engine.module_forward_post_hook):
        hook.remove()
    with _quiet():
        engine.destroy()
    engine.optimizer = engine.basic_optimizer = engine.client_optimizer = None
    parameter_offload.FWD_MODULE_STACK[:] = [
        module for module in parameter_offload.FWD_MODULE_STACK if module is not model
    ]
    for parameter in model.parameters():
        parameter.grad = None
        for name in ("_hp_mapping", "grad_accum", "_hp_grad", "all_grad_tensors", "param_idx_in_group"):
            if hasattr(parameter, name):
                delattr(parameter, name)
    return model


def reduce_once(engine: DeepSpeedEngine) -> contextlib.AbstractContextManager:
    """Makes ZeRO stage 2 reduce gradients once for all backward passes within; stages 0 and 1 do by themselves.

    Stage 3 goes on reducing at each, which is how it never holds the whole gradient.
    """
    return engine.coalesce_grad_reduction() if engine.zero_optimization_stage() == 2 else contextlib.nullcontext()


def _numbers(scaler: object) -> dict[str, float]:
    """The plain numbers among a loss scaler's attributes: scale, counters, window."""
    return {name: value for name, value in vars(scaler).items() if isinstance(value, int | float)} if scaler else {}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed prints memory reports and build notes to stdout, whatever its log level."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        yield
