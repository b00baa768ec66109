"""Checkpoints: this rank's optimizer shards as plain tensors, in a folder that appears whole or not at all.

`checkpoints/step-00001000/` holds `rank-00000.safetensors` … (masters, optimizer state, moving average, random state,
buffers, and where each piece of each parameter stands) and `state.json`. It is written as `….part`, renamed by rank 0
after every rank has written, and only then do `latest` and `best` move. Weights that do not train at the start of the
run are written once, to `checkpoints/locked.safetensors`. `convclip.models.checkpoint_weights` reads the weights back,
without DeepSpeed; `convclip.models.checkpoint_files` has the checksums.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn

from convclip.config import UserError
from convclip.devices import RandomState
from convclip.distributed import alike, gather_objects, is_main, on_main, rank, world_size
from convclip.engine.meters import Diverged
from convclip.engine.zero.build import OptimizerSnapshot, restore_snapshot, take_snapshot
from convclip.engine.zero.elastic import layout_of, lies_alike, read_alike, read_shares
from convclip.engine.zero.masters import MasterShard, is_replicated, master_shards
from convclip.files import CannotWrite, publish, remove_folder, write_text, writing
from convclip.models.checkpoint_files import LOCKED, TensorFile, is_finite, write_tensors
from convclip.models.checkpoint_weights import (
    EMA,
    RunState,
    best_checkpoint,
    rank_file,
    read_pointer,
    read_state,
    step_folders,
    step_of,
    write_state,
)

# How a checkpoint's state names fp16: only there is a loss scale to go on with.
FP16 = ("fp16", str(torch.float16))


def save_locked(model: nn.Module, trainable: set[str], folder: Path, run: str = "") -> str:
    """Write the fp32 weights of the parameters that do not train at the start, once, to `folder`/locked.safetensors,
    over what another run left there; returns what identifies the file, for the state of this run's checkpoints.

    Errors: UserError on every rank, of a file that cannot be written and of a weight that is not finite.
    """
    locked = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if n not in trainable}
    bad = next((name for name, value in locked.items() if not is_finite(value)), None)
    if bad is not None:
        raise UserError(f"{bad} of the model to train has values that are not finite: check its pretrained weights")

    def write() -> str:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return write_tensors(locked, folder / LOCKED, {"run": run, "content": "locked"})

    return on_main(write)


def save_checkpoint(engine: DeepSpeedEngine, folder: Path, state: RunState, averages: Sequence[Tensor] = ()) -> Path:
    """Save to `folder`/step-XXXXXXXX on all ranks and return it; `averages` are those of this rank's shards, if any.

    Errors: UserError on every rank when one cannot write, or has a value that is not finite; nothing is touched then.
    """
    target = folder / f"step-{state.step:08d}"
    part = target.with_name(target.name + ".part")
    refuse_not_finite(engine, state.step, averages)

    def clear() -> None:
        with writing(part):
            if part.exists():
                shutil.rmtree(part)
            part.mkdir(parents=True)

    on_main(clear)
    problem = None
    try:
        _save_rank(engine, part / rank_file(rank()), state, averages)
        if is_main():
            write_state(part, state)
    except (OSError, CannotWrite) as error:
        problem = f"rank {rank()} cannot write checkpoint {part}: {error}"
    problems = [found for found in gather_objects(problem) if found]
    if problems:
        raise UserError(problems[0])

    def show() -> None:
        with writing(target):
            # One of that step is there where a run goes on from an older checkpoint, or was killed before `latest`.
            remove_folder(target)
            publish(part, target)

    on_main(show)
    return target


def load_checkpoint(engine: DeepSpeedEngine, path: Path, ema: bool = False, seed: int = 0) -> list[Tensor] | None:
    """Give `engine` (built for the checkpoint's unfreeze stage) the optimizer state, counters, buffers, random state.

    The checkpoint may be of another number of ranks, ZeRO stage or precision. Of another number of ranks, each rank's
    generators start from (`seed`, rank, step). With `ema`, the moving averages of this rank's shards; None where the
    checkpoint has none. Errors: UserError on every rank, of a file that is missing, damaged, or of another step, run or
    model.
    """
    snapshot, buffers, random, averages = alike(lambda: _read_rank(engine, path, ema))
    restore_snapshot(engine, snapshot)
    own = _buffers(engine.module)
    for name, value in buffers.items():
        own[name].data.copy_(value)
    if random is not None:
        random.restore()
    else:
        start = np.random.SeedSequence((seed, rank(), read_state(path).step)).generate_state(1, np.uint64)
        torch.manual_seed(int(start[0]))
    return averages


def move_pointer(run_folder: Path, name: str, target: Path) -> None:
    """Point `latest` or `best` of a run at a whole checkpoint, on all ranks. Errors: CannotWrite on all of them."""
    on_main(lambda: write_text(run_folder / name, f"{target.relative_to(run_folder)}\n"))


def remove_old(run_folder: Path, keep_last: int, later: bool = True) -> None:
    """Delete what the run has no more use for, and what a killed save left behind; on all ranks.

    Kept are the `keep_last` newest checkpoints up to `latest`, the best one by what `latest` says of itself, and what
    the pointers name. `later` ones than `latest`, of a run that was taken up again from before them, go with the first
    save after that: until then it may have been a mistake.
    """
    on_main(lambda: _remove_old(run_folder, keep_last, later))


def _remove_old(run_folder: Path, keep_last: int, later: bool) -> None:
    latest = read_pointer(run_folder, "latest")
    if latest is None:
        return
    folder = run_folder / "checkpoints"
    for stale in folder.glob("step-*.part"):
        shutil.rmtree(stale, ignore_errors=True)
    for stale in folder.glob(f"{LOCKED}.*part"):
        with contextlib.suppress(OSError):
            stale.unlink()
    state, found = read_state(latest), step_folders(run_folder)
    kept = {latest, read_pointer(run_folder, "best"), best_checkpoint(run_folder, state)}
    kept.update([path for path in found if step_of(path) <= state.step][-keep_last:])
    for path in found:
        if path not in kept and (later or step_of(path) <= state.step):
            remove_folder(path)


def _clear_padding(shard: MasterShard, values: Iterable[Any]) -> None:
    """Zeros where a shard's master and state belong to no parameter: what stands there by chance may be no number."""
    for value in values:
        if isinstance(value, Tensor) and value.numel() == shard.flat.numel():
            for gap in shard.padding:
                value.data.view(-1)[gap] = 0


def refuse_not_finite(engine: DeepSpeedEngine, step: int, averages: Sequence[Tensor]) -> None:
    """Diverged on every rank where masters, optimizer state or buffers of one are infinite or not a number."""
    snapshot, found = take_snapshot(engine), None
    for shard, average in zip(master_shards(engine), averages, strict=False):
        # Of finite weights it is finite.
        _clear_padding(shard, [average])
    for shard, master, state in zip(master_shards(engine), snapshot.masters, snapshot.states, strict=True):
        _clear_padding(shard, (master, *state.values()))
        for what, value in (("", master), *state.items()):
            if found is None and isinstance(value, Tensor) and not is_finite(value):
                found = f"{what} {shard.pieces[0].parameter if shard.pieces else ''} …".strip()
    bad = [name for name, value in _buffers(engine.module).items() if not is_finite(value)]
    problems = [problem for problem in gather_objects(found or (bad[0] if bad else None)) if problem]
    if problems:
        raise Diverged(
            f"stopped at step {step}, and not saved: {problems[0]} has values that are not finite; resume from the "
            f"last checkpoint with a lower optim.lr, set optim.clip_grad_norm, or use bf16 or fp32"
        )


def _read_rank(
    engine: DeepSpeedEngine, path: Path, ema: bool
) -> tuple[OptimizerSnapshot, dict[str, Tensor], RandomState | None, list[Tensor] | None]:
    """What a checkpoint holds for this rank: optimizer, buffers by name, random state, moving averages.

    Random state is None where another number of ranks saved; buffers are rank 0's then.
    """
    state, shards = read_state(path), master_shards(engine)
    same_world = state.world_size == world_size()
    number = rank() if same_world else 0
    own = TensorFile(path / rank_file(number), state.origin(number))
    file = TensorFile(path / rank_file(0), state.origin(0)) if state.zero_stage == 0 else own
    try:
        trained = {name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
        if file.layout["shapes"].keys() != trained:
            raise UserError(f"{file.path}: its parameter groups are not those of this model and recipe")
        # In stage 0 every rank has all of it.
        same_stage = state.zero_stage == engine.zero_optimization_stage() and (same_world or state.zero_stage == 0)
        if same_stage and lies_alike(file, shards):
            shares = read_alike(file, len(shards), ema)
        else:
            shares = read_shares(path, state, shards, ema)
        scaler, counters = dict(file.layout["scaler"]), dict(file.layout["counters"])
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise file.wrong_layout(error) from None
    if state.precision not in FP16 or not engine.fp16_enabled():
        scaler = {}
    snapshot = OptimizerSnapshot(shares.masters, shares.states, scaler, counters)
    buffers = _read_buffers(engine.module, own)
    if not same_world:
        return snapshot, buffers, None, shares.averages
    device = own.get("random/device") if "random/device" in own.keys else None
    return snapshot, buffers, RandomState(own.get("random/cpu"), device), shares.averages


def _read_buffers(model: nn.Module, file: TensorFile) -> dict[str, Tensor]:
    """Buffers by name; UserError where one is not the model's."""
    known = _buffers(model)
    keys = {key.removeprefix("buffer/"): key for key in file.keys if key.startswith("buffer/")}
    wrong = [name for name in keys if name not in known]
    buffers = {name: file.get(key) for name, key in keys.items() if name in known}
    wrong += [name for name, value in buffers.items() if value.shape != known[name].shape]
    if wrong:
        raise UserError(f"{file.path}: its buffer {wrong[0]} is not one of this model")
    return buffers


def _save_rank(engine: DeepSpeedEngine, path: Path, run: RunState, averages: Sequence[Tensor]) -> None:
    snapshot = take_snapshot(engine)
    shards = master_shards(engine)
    tensors = {f"buffer/{name}": value.detach().cpu().contiguous() for name, value in _buffers(engine.module).items()}
    random = RandomState.now()
    tensors["random/cpu"] = random.cpu
    if random.device is not None:
        tensors["random/device"] = random.device.cpu()
    if rank() == 0 or not is_replicated(engine):
        for index, (master, state) in enumerate(zip(snapshot.masters, snapshot.states, strict=True)):
            values = {"master": master, **{key: state[key] for key in _tensor_keys(state)}}
            tensors.update({f"{index}/{key}": value.detach().cpu().contiguous() for key, value in values.items()})
        tensors.update({f"{index}/{EMA}": value.detach().cpu() for index, value in enumerate(averages)})
    layout = {
        "shards": [layout_of(shard.pieces) for shard in shards],
        "state_keys": [_tensor_keys(state) for state in snapshot.states],
        "state_values": [{k: v for k, v in state.items() if not isinstance(v, Tensor)} for state in snapshot.states],
        "shapes": {
            name: list(getattr(parameter, "ds_shape", parameter.shape))
            for name, parameter in engine.module.named_parameters()
            if parameter.requires_grad
        },
        "scaler": snapshot.scaler,
        "counters": snapshot.counters,
    }
    write_tensors(tensors, path, run.origin(rank()) or {}, layout)


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to the model's state, such as running statistics; not constants such as masks."""
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def _tensor_keys(state: Mapping[str, Any]) -> list[str]:
    """Names of the tensors of an optimizer's state; the rest of it are plain values, which go into the layout."""
    return sorted(key for key, value in state.items() if isinstance(value, Tensor))
