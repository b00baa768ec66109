"""Checkpoints: exact resumption around unfreeze events, whole-or-nothing saves, readable without DeepSpeed."""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path

import pytest
import torch

from convclip.config import UserError
from tests.engine.small_engine import (
    OPTIM,
    SCHEDULE,
    SmallModel,
    allow_fp16_on_cpu,
    deepspeed_run,
    ds_config,
    masters,
    train_step,
)
from tests.processes import run_ranks

# Before, at and after the first unfreeze event.
SAVED_AT = (5, 6, 7)
STEPS = 9
KINDS = [(s, p) for s, p in itertools.product(range(4), ("fp32", "bf16", "fp16")) if (s, p) != (0, "fp16")]
# Starting engines is what costs time: two ranks take each stage once.
KINDS_OF_WORLD = {1: KINDS, 2: [(0, "fp32"), (1, "fp16"), (2, "bf16"), (3, "fp16")]}


def stage_at(step: int, before_event: bool) -> int:
    """Stage a run is in when `step` steps are done; an event at that very step has not happened yet."""
    return sum(start < step if before_event else start <= step for start in SCHEDULE if start) if step else 0


def resume_everywhere(world: int, folder: str) -> dict:
    """Save around both events, go on from each checkpoint in a new engine, compare with never having stopped."""
    from convclip.distributed import world_size
    from convclip.engine.zero.build import build_engine, rebuild_engine
    from convclip.engine.zero.checkpoint import load_checkpoint, save_checkpoint, save_locked
    from convclip.models.checkpoint_weights import RunState, load_weights, read_weights

    assert world_size() == world
    allow_fp16_on_cpu()
    groups = list(SCHEDULE.values())
    starts = list(SCHEDULE)
    found: dict = {}
    for stage, precision in KINDS_OF_WORLD[world]:
        config = ds_config(stage, precision, world)
        place = Path(folder) / f"{stage}-{precision}"
        model = SmallModel()
        original = {name: value.detach().clone() for name, value in model.named_parameters()}
        trained_first = {name for group in groups[0] for name in group.parameters}
        save_locked(model, trained_first, place)
        engine, at = build_engine(model, groups[0], config, OPTIM, original), 0
        for step in range(STEPS):
            if step in SAVED_AT:
                save_checkpoint(engine, place, RunState(step, at, world, stage, precision))
            if at + 1 < len(starts) and step == starts[at + 1]:
                at += 1
                engine = rebuild_engine(engine, groups[at], config, OPTIM, original)
            train_step(engine, step)
        uninterrupted = masters(engine)
        # The model's copy of trained parameters is rounded; compare what the file holds with the fp32 masters.
        save_checkpoint(engine, place, RunState(STEPS, at, world, stage, precision))
        weights = read_weights(place / f"step-{STEPS:08d}")
        trained = {name for group in groups[at] for name in group.parameters}
        found[stage, precision, "weights"] = all(torch.equal(weights[n], uninterrupted[n]) for n in trained)
        for saved in SAVED_AT:
            checkpoint = place / f"step-{saved:08d}"
            model = SmallModel()
            load_weights(model, checkpoint)
            values = {name: value.detach().clone() for name, value in model.named_parameters()}
            at = stage_at(saved, before_event=True)
            engine = build_engine(model, groups[at], config, OPTIM, values)
            load_checkpoint(engine, checkpoint)
            for step in range(saved, STEPS):
                if at + 1 < len(starts) and step == starts[at + 1]:
                    at += 1
                    engine = rebuild_engine(engine, groups[at], config, OPTIM, values)
                train_step(engine, step)
            resumed = masters(engine)
            found[stage, precision, saved] = all(torch.equal(resumed[n], uninterrupted[n]) for n in resumed)
    return found


@pytest.fixture(scope="module", params=[1, 2], ids=["world1", "world2"])
def found(request, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("checkpoints")
    return run_ranks(request.param, resume_everywhere, request.param, str(folder))


@pytest.mark.launch
def test_resume_around_an_event_is_bitwise_the_uninterrupted_run(found):
    resumed = {key: same for key, same in found.items() if key[2] != "weights"}
    assert len(resumed) == 3 * len(found) // 4
    assert all(resumed.values()), [key for key, same in resumed.items() if not same]


@pytest.mark.launch
def test_weights_are_read_whole_from_any_stage(found):
    wrong = [key for key, same in found.items() if key[2] == "weights" and not same]
    assert not wrong


def broken_saves(folder: str) -> list[str]:
    """Damage a checkpoint in several ways; the messages of reading it."""
    from convclip.engine.zero.checkpoint import save_checkpoint, save_locked
    from convclip.models.checkpoint_weights import RunState, load_weights

    place = Path(folder) / "run" / "checkpoints"
    save_locked(SmallModel(), {"third.weight", "third.bias", "logit_scale"}, place)
    _, engine = deepspeed_run(ds_config(1), steps=3)
    path = save_checkpoint(engine, place, RunState(3, 0, 1, 1, "fp32"))
    load_weights(SmallModel(), path)
    messages = []

    def fails(model: torch.nn.Module) -> None:
        with pytest.raises(UserError) as caught:
            load_weights(model, path)
        messages.append(str(caught.value))

    fails(torch.nn.Linear(3, 3))
    file = path / "rank-00000.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    fails(SmallModel())
    file.unlink()
    fails(SmallModel())
    (path / "state.json").write_text("{")
    fails(SmallModel())
    return messages


@pytest.mark.launch
def test_damaged_checkpoints_are_named(tmp_path):
    other, truncated, missing, unreadable = run_ranks(1, broken_saves, str(tmp_path))
    assert "another model" in other
    assert "first.bias is not in this model" in other
    for message in (truncated, missing):
        assert "rank-00000.safetensors is missing or damaged" in message
    assert "is not a convclip checkpoint" in unreadable


def killed_save(folder: str) -> None:
    """A rank that dies while it writes its part of the second checkpoint."""
    from convclip.engine.zero.checkpoint import move_pointer, save_checkpoint, save_locked
    from convclip.models import checkpoint_files
    from convclip.models.checkpoint_weights import RunState

    run = Path(folder) / "run"
    save_locked(SmallModel(), {"third.weight", "third.bias", "logit_scale"}, run / "checkpoints")
    _, engine = deepspeed_run(ds_config(2), steps=3)
    move_pointer(run, "latest", save_checkpoint(engine, run / "checkpoints", RunState(3, 0, 1, 2, "fp32")))
    whole = checkpoint_files.save_file

    def half_then_die(tensors, path, metadata):
        whole(tensors, path, metadata=metadata)
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoint_files.save_file = half_then_die
    save_checkpoint(engine, run / "checkpoints", RunState(4, 0, 1, 2, "fp32"))


@pytest.mark.launch
def test_a_kill_in_mid_save_leaves_the_last_good_checkpoint(tmp_path):
    from convclip.engine.zero.checkpoint import remove_old
    from convclip.models.checkpoint_weights import checkpoint_path, load_weights

    with pytest.raises(Exception, match="SIGKILL"):
        run_ranks(1, killed_save, str(tmp_path))
    run = tmp_path / "run"
    assert checkpoint_path(run).name == "step-00000003"
    load_weights(SmallModel(), checkpoint_path(run))
    assert (run / "checkpoints" / "step-00000004.part").exists()
    (run / "checkpoints" / "locked.safetensors.part").write_bytes(b"half")  # as convclip 0.1.0 left it
    remove_old(run, keep_last=2)
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"step-00000003", "locked.safetensors"}


def saved_with_padding_of_nan(folder: str) -> bool:
    """A checkpoint of stage 3, whose padding holds whatever the memory held, is written and read back."""
    from convclip.distributed import gather_objects
    from convclip.engine.zero.build import build_engine
    from convclip.engine.zero.checkpoint import load_checkpoint, save_checkpoint, save_locked
    from convclip.engine.zero.masters import master_shards
    from convclip.models.checkpoint_weights import RunState, read_weights

    model, groups = SmallModel(), next(iter(SCHEDULE.values()))
    values = {name: value.detach().clone() for name, value in model.named_parameters()}
    save_locked(model, {name for group in groups for name in group.parameters}, Path(folder))
    engine = build_engine(model, groups, ds_config(3, "fp32", 2), OPTIM, values)
    train_step(engine, 0)
    for shard in master_shards(engine):
        for gap in shard.padding:
            shard.flat[gap] = torch.nan
    padded = any(gather_objects(any(shard.padding for shard in master_shards(engine))))
    path = save_checkpoint(engine, Path(folder), RunState(1, 0, 2, 3, "fp32"))
    load_checkpoint(engine, path)
    found, expected = read_weights(path), masters(engine)
    trained = {name for group in groups for name in group.parameters}
    return padded and all(torch.equal(found[name], expected[name]) for name in trained)


@pytest.mark.launch
def test_what_stands_in_the_padding_of_stage_3_does_not_matter(tmp_path):
    assert run_ranks(2, saved_with_padding_of_nan, str(tmp_path / "checkpoints"))
