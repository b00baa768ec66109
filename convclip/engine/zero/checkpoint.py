"""Checkpoints: this rank's optimizer shards as plain tensors, in a folder that appears whole or not at all.

`checkpoints/step-00001000/` holds `rank-00000.safetensors` … (masters, optimizer state, random state, buffers, and
where each piece of each parameter stands) and `state.json`. It is written as `….part`, renamed by rank 0 after every
rank has written, and only then does `latest` move. Weights that do not train at the start of the run are written once,
to `checkpoints/locked.safetensors`. `convclip.models.checkpoint_weights` reads the weights back, without DeepSpeed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deepspeed import DeepSpeedEngine
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from convclip.config import UserError
from convclip.devices import RandomState
from convclip.distributed import barrier, gather_objects, is_main, rank
from convclip.engine.zero.build import OptimizerSnapshot, restore_snapshot, take_snapshot
from convclip.engine.zero.masters import is_replicated, master_shards
from convclip.files import CannotWrite, publish, whole_file, write_text, writing
from convclip.models.checkpoint_weights import RunState, open_tensors, rank_file


def save_locked(model: nn.Module, trainable: set[str], folder: Path) -> None:
    """Write the fp32 weights of the parameters that do not train at the start, once, to `folder`/locked.safetensors."""
    # The main rank alone looks for the file: seen by a rank that comes late, it would keep that one from the barrier.
    if is_main() and not (folder / "locked.safetensors").is_file():
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        locked = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if n not in trainable}
        # safetensors cannot read back a file that has neither tensors nor metadata, as where nothing is locked.
        _write_tensors(locked, folder / "locked.safetensors", {"content": "locked"})
    barrier()


def save_checkpoint(engine: DeepSpeedEngine, folder: Path, state: RunState) -> Path:
    """Save to `folder`/step-XXXXXXXX on all ranks and return it; UserError on every rank when one cannot write."""
    target = folder / f"step-{state.step:08d}"
    part = target.with_name(target.name + ".part")
    if is_main():
        for stale in (part, target):
            shutil.rmtree(stale, ignore_errors=True)
        with writing(part):
            part.mkdir(parents=True)
    barrier()
    problem = None
    try:
        _save_rank(engine, part / rank_file(rank()))
        if is_main():
            write_text(part / "state.json", json.dumps(asdict(state), indent=1))
    except (OSError, CannotWrite) as error:
        problem = f"rank {rank()} cannot write checkpoint {part}: {error}"
    problems = [found for found in gather_objects(problem) if found]
    if problems:
        raise UserError(problems[0])
    if is_main():
        with writing(target):
            publish(part, target)
    barrier()
    return target


def load_checkpoint(engine: DeepSpeedEngine, path: Path) -> None:
    """Give `engine` (built for the checkpoint's stage) the optimizer state, counters, buffers and random state."""
    shards = master_shards(engine)
    own = path / rank_file(rank())
    source = path / rank_file(0) if is_replicated(engine) else own
    with open_tensors(source) as file:
        layout = json.loads(file.metadata()["layout"])
        expected = [_layout(shard.pieces) for shard in shards]
        if layout["shards"] != json.loads(json.dumps(expected)):
            raise UserError(f"{source}: its parameter groups are not those of this model and recipe")
        masters = [file.get_tensor(f"{index}/master") for index in range(len(shards))]
        # A checkpoint of 0.1.0 has no "state_values": all of its state was tensors.
        values = layout.get("state_values", [{}] * len(shards))
        states = [
            {**values[index], **{key: file.get_tensor(f"{index}/{key}") for key in layout["state_keys"][index]}}
            for index in range(len(shards))
        ]
    restore_snapshot(engine, OptimizerSnapshot(masters, states, layout["scaler"], layout["counters"]))
    with open_tensors(own) as file:
        buffers = _buffers(engine.module)
        for key in file.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
            if key.startswith("buffer/"):
                buffers[key.removeprefix("buffer/")].data.copy_(file.get_tensor(key))
        on_device = "random/device" in file.keys()  # noqa: SIM118
        RandomState(file.get_tensor("random/cpu"), file.get_tensor("random/device") if on_device else None).restore()


def move_pointer(run_folder: Path, name: str, target: Path) -> None:
    """Point `latest` or `best` of a run at a whole checkpoint; rank 0 only does anything."""
    if is_main():
        write_text(run_folder / name, f"{target.relative_to(run_folder)}\n")


def remove_old(run_folder: Path, keep_last: int) -> None:
    """Delete all but the `keep_last` newest checkpoints and the best one, and what a killed save left behind."""
    if not is_main():
        return
    folder = run_folder / "checkpoints"
    for stale in folder.glob("step-*.part"):
        shutil.rmtree(stale, ignore_errors=True)
    for stale in folder.glob("locked.safetensors.*part"):
        stale.unlink(missing_ok=True)
    kept = {(run_folder / p).read_text().strip() for p in ("best", "latest") if (run_folder / p).is_file()}
    for path in sorted(folder.glob("step-*"))[:-keep_last]:
        if str(path.relative_to(run_folder)) not in kept:
            shutil.rmtree(path, ignore_errors=True)


def _save_rank(engine: DeepSpeedEngine, path: Path) -> None:
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
    layout = {
        "shards": [_layout(shard.pieces) for shard in shards],
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
    _write_tensors(tensors, path, {"layout": json.dumps(layout)})


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to the model's state, such as running statistics; not constants such as masks."""
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def _tensor_keys(state: Mapping[str, Any]) -> list[str]:
    """Names of the tensors of an optimizer's state; the rest of it are plain values, which go into the layout."""
    return sorted(key for key, value in state.items() if isinstance(value, Tensor))


def _layout(pieces: Iterable[Any]) -> list[list[Any]]:
    return [[piece.parameter, piece.start, piece.offset, piece.length] for piece in pieces]


def _write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    with whole_file(path) as part:
        try:
            save_file(dict(tensors), part, metadata=metadata)
        except SafetensorError as error:  # Its name for a full disk.
            raise CannotWrite(f"{path} cannot be written: {error}") from None
