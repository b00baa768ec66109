"""The small model saved by one number of ranks, ZeRO stage and precision, and gone on with by another.

What a checkpoint holds is put together by brute force, from the files' own words and whole tensors; what an engine
holds after loading is gathered from its shards. The losses that follow are those of a plain torch loop that starts from
the tensors put together.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from tests.engine.small_engine import CLIP, EMA, OPTIM, SCHEDULE, SmallModel, ds_config, lr

# A step's rows: divisible by 1, 2 and 3 ranks.
ROWS, ACCUMULATION = 12, 2
# One step before the first event, at it (it has not happened yet), and one step after it.
SAVED_AT = (5, 6, 7)
MOMENTS = ("exp_avg", "exp_avg_sq")


class Kind(NamedTuple):
    """What an engine is."""

    world: int
    stage: int
    precision: str
    offload: bool = False

    def __str__(self) -> str:
        return f"{self.world} x ZeRO {self.stage} {self.precision}{' offload' if self.offload else ''}"

    @property
    def folder(self) -> str:
        return str(self).replace(" ", "-")


def rows(step: int, micro: int) -> Tensor:
    """The global micro batch [ROWS, 7] of a step."""
    return torch.randn(ROWS, 7, generator=torch.Generator().manual_seed(1000 + ACCUMULATION * step + micro))


def config_of(kind: Kind) -> dict[str, Any]:
    config = ds_config(kind.stage, kind.precision, kind.world, kind.offload)
    return {
        **config,
        "train_batch_size": ROWS * ACCUMULATION,
        "train_micro_batch_size_per_gpu": ROWS // kind.world,
        "gradient_accumulation_steps": ACCUMULATION,
    }


def stage_at(step: int) -> int:
    """Unfreeze stage of a checkpoint of `step`; an event at that very step has not happened yet."""
    return sum(0 < start < step for start in SCHEDULE)


class Small:
    """An engine of the small model at a step, with its moving average; new, or from a checkpoint."""

    def __init__(self, kind: Kind, checkpoint: Path | None = None, step: int = 0) -> None:
        from convclip.distributed import on_main, share_from_main
        from convclip.engine.zero.build import build_engine
        from convclip.engine.zero.checkpoint import load_checkpoint
        from convclip.engine.zero.masters import master_shards
        from convclip.engine.zero.moving_average import MovingAverage
        from convclip.models.checkpoint_weights import load_weights

        self.kind, self.config, self.step, self.stage = kind, config_of(kind), step, stage_at(step)
        model = SmallModel()
        if checkpoint is not None:
            on_main(lambda: load_weights(model, checkpoint))
            share_from_main(model.state_dict().values(), torch.device("cpu"))
        self.values = {name: value.detach().clone() for name, value in model.named_parameters()}
        self.engine = build_engine(model, list(SCHEDULE.values())[self.stage], self.config, OPTIM, self.values)
        self.average = MovingAverage(EMA)
        averages = None if checkpoint is None else load_checkpoint(self.engine, checkpoint, ema=True, seed=3)
        self.average.begin(master_shards(self.engine), averages)

    def train(self) -> float:
        """One step, with the event that is due before it; the mean loss over ranks and micro batches."""
        from convclip.distributed import all_reduce_mean, rank
        from convclip.engine.zero.build import rebuild_engine
        from convclip.engine.zero.masters import master_shards

        groups = SCHEDULE.get(self.step)
        if self.step and groups is not None:
            self.stage += 1
            self.engine = rebuild_engine(self.engine, groups, self.config, OPTIM, self.values)
            self.average.follow(master_shards(self.engine))
        share, total = ROWS // self.kind.world, 0.0
        for micro in range(ACCUMULATION):
            x = rows(self.step, micro)[rank() * share :][:share].to(next(self.engine.module.parameters()).dtype)
            loss = self.engine(x).float().square().mean()
            total += all_reduce_mean(loss.detach()).item() / ACCUMULATION
            self.engine.backward(loss)
            for group in self.engine.optimizer.param_groups:
                group["lr"] = lr(self.step) * group["lr_scale"]
            self.engine.step()
        self.average.update()
        self.step += 1
        return total

    def save(self, folder: Path) -> Path:
        from convclip.distributed import on_main
        from convclip.engine.zero.checkpoint import save_checkpoint, save_locked
        from convclip.models.checkpoint_weights import RunState

        if not on_main(lambda: (folder / "locked.safetensors").exists()):
            first = {name for group in SCHEDULE[0] for name in group.parameters}
            model = SmallModel()
            save_locked(model, first, folder)
        state = RunState(self.step, self.stage, self.kind.world, self.kind.stage, self.kind.precision)
        return save_checkpoint(self.engine, folder, state, self.average.values)

    def held(self) -> dict[str, Any]:
        """What the engine holds, full, as `put_together` has it; a collective."""
        from convclip.distributed import gather_objects
        from convclip.engine.zero.build import COUNTERS, take_snapshot
        from convclip.engine.zero.masters import is_replicated, master_shards

        own: list[tuple[str, str, int, Tensor]] = []
        steps: dict[str, float] = {}
        snapshot = take_snapshot(self.engine)
        for index, shard in enumerate(master_shards(self.engine)):
            state = snapshot.states[index]
            tensors = {"master": snapshot.masters[index], "ema": self.average.values[index]}
            tensors |= {key: state[key].reshape(-1) for key in MOMENTS if key in state}
            assert all(not value[gap].any() for value in tensors.values() for gap in shard.padding)
            for piece in shard.pieces:
                steps |= {piece.parameter: float(state["step"])} if "step" in state else {}
                stretch = slice(piece.offset, piece.offset + piece.length)
                own += [(key, piece.parameter, piece.start, value[stretch].clone()) for key, value in tensors.items()]
        found: dict[str, Any] = {"counters": {name: getattr(self.engine, name) for name in COUNTERS}, "steps": {}}
        everybody = gather_objects((own, steps))
        for stretches, theirs in everybody[:1] if is_replicated(self.engine) else everybody:
            found["steps"] |= theirs
            for key, name, start, value in stretches:
                _lay(found, key, name, start, value)
        return found


def put_together(checkpoint: Path, kind: Kind) -> dict[str, Any]:
    """What a checkpoint holds, by brute force: {key: {parameter: all of its values, flat}}, steps, counters."""
    found: dict[str, Any] = {"steps": {}}
    for number in range(kind.world if kind.stage else 1):
        with safe_open(checkpoint / f"rank-{number:05d}.safetensors", framework="pt") as file:
            layout = json.loads(file.metadata()["layout"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        found["counters"] = layout["counters"]
        for index, pieces in enumerate(layout["shards"]):
            for name, start, offset, length in pieces:
                for key in ("master", "ema", *MOMENTS):
                    if f"{index}/{key}" in tensors:
                        _lay(found, key, name, start, tensors[f"{index}/{key}"].reshape(-1)[offset : offset + length])
                if f"{index}/step" in tensors:
                    found["steps"][name] = float(tensors[f"{index}/step"])
    return found


def _lay(found: dict[str, Any], key: str, name: str, start: int, value: Tensor) -> None:
    shapes = {parameter: p.numel() for parameter, p in SmallModel().named_parameters()}
    full = found.setdefault(key, {}).setdefault(name, torch.full((shapes[name],), torch.nan))
    full[start : start + len(value)] = value


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Where two of `held` and `put_together` differ, to the bit."""
    wrong = list(one.keys() ^ other.keys())
    for key in one.keys() & other.keys():
        if key in ("counters", "steps"):
            wrong += [] if one[key] == other[key] else [f"{key}: {one[key]} != {other[key]}"]
        else:
            names = one[key].keys() | other[key].keys()
            wrong += [
                f"{key} {name}"
                for name in sorted(names)
                if name not in one[key] or name not in other[key] or not torch.equal(one[key][name], other[key][name])
            ]
    return wrong


def plain_losses(found: dict[str, Any], step: int, steps: int) -> list[float]:
    """Losses of the next `steps` steps of a plain torch loop in fp32 that starts from what was put together."""
    model = SmallModel().requires_grad_(False)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in found["master"].items():
            parameters[name].copy_(value.view_as(parameters[name]))
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=0.0, betas=OPTIM.betas, eps=OPTIM.eps)
    optimizer.param_groups.clear()
    losses = []
    for now in range(step, step + steps):
        present = list(SCHEDULE.values())[stage_at(now + 1)]
        for group in present[len(optimizer.param_groups) :]:
            members = [parameters[name].requires_grad_(True) for name in group.parameters]
            optimizer.add_param_group(
                {"params": members, "weight_decay": group.weight_decay, "lr_scale": group.lr_scale}
            )
            for name, parameter in zip(group.parameters, members, strict=True):
                if now == step and name in found["steps"]:
                    moments = {key: found[key][name].view_as(parameter).clone() for key in MOMENTS}
                    optimizer.state[parameter] = {"step": torch.tensor(found["steps"][name]), **moments}
        optimizer.zero_grad()
        total = 0.0
        for micro in range(ACCUMULATION):
            loss = model(rows(now, micro)).square().mean() / ACCUMULATION
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_([p for p in parameters.values() if p.requires_grad], CLIP)
        for entry in optimizer.param_groups:
            entry["lr"] = lr(now) * entry["lr_scale"]
        optimizer.step()
        losses.append(total)
    return losses


def furthest(one: list[float], other: list[float]) -> float:
    """The largest difference of two lists of losses."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))
