"""What a run's folder may hold when a run begins or goes on: another run, damage, older checkpoints, lost pointers."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from convclip.files import CannotWrite
from convclip.models import checkpoint_weights
from convclip.models.checkpoint_files import TensorFile, write_tensors
from convclip.models.checkpoint_weights import RunState, checkpoint_path, load_from, read_state, read_weights
from convclip.schema import UserError
from tests.data.makers import noise_jpeg, write_tar
from tests.engine.small_run import make_files, train_here, weights_of
from tests.engine.test_crash_points import kill_everywhere
from tests.processes import run_ranks

pytestmark = pytest.mark.launch

# Three steps an epoch: saved at steps 2, 3, 4, 5; evaluated at 3 and 5; an event at 3.
SMALL = ("batch.global=8", "max_steps=5", "checkpoint.every_steps=2")
LAST = "checkpoints/step-00000005"
RANK = f"{LAST}/rank-00000.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    files = make_files(tmp_path_factory.mktemp("files"))
    (files / "other").mkdir()
    for shard in range(3):
        samples = {}
        for image in range(shard * 8, shard * 8 + 8):
            content = {"image_id": image, "captions": ["a", "b"], "caption_ids": [10 * image, 10 * image + 1]}
            samples[f"{image:012d}"] = {"jpg": noise_jpeg(image, (40, 36)), "json": json.dumps(content).encode()}
        write_tar(files / "other" / f"train-{shard:06d}.tar", samples)
    shutil.copytree(files, files / "pictures")
    with tarfile.open(files / "train-000000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    samples = {}
    for name, content in members.items():
        stem, _, kind = name.partition(".")
        samples.setdefault(stem, {})[kind] = content if kind == "json" else noise_jpeg(99, (40, 36))
    write_tar(files / "pictures" / "train-000000.tar", samples)
    return files


def in_turn(files: str, folder: str, works: tuple[str, ...]) -> dict[str, Any]:
    """Functions of this module by name, in one process group: starting one is what takes time."""
    return {name: globals()[name](files, f"{folder}/{name}") for name in works}


@pytest.fixture(scope="module")
def alone(files, tmp_path_factory):
    """What one process found."""
    folder = tmp_path_factory.mktemp("alone")
    works = ("damaged", "other_runs", "going_on", "other_data")
    return run_ranks(1, in_turn, str(files), str(folder), works)


@pytest.fixture(scope="module")
def together(files, tmp_path_factory):
    """What two processes found."""
    folder = tmp_path_factory.mktemp("together")
    return run_ranks(2, in_turn, str(files), str(folder), ("not_finite", "full_disk", "kill_some"))


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps_saved(run: Path) -> list[int]:
    return [int(path.name[5:]) for path in sorted((run / "checkpoints").glob("step-*"))]


# --- how a folder is damaged; each is given the run's folder ---


def flip_a_bit(run: Path) -> None:
    data = bytearray((run / RANK).read_bytes())
    data[-1000] ^= 4
    (run / RANK).write_bytes(data)


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], **origin: Any) -> None:
    """As if a run had written other values: checksums are right."""
    file = TensorFile(folder / RANK)
    tensors = load_file(folder / RANK)
    change(tensors)
    file.origin.pop("identity")
    write_tensors(tensors, folder / RANK, {**file.origin, **origin}, file.layout)


def nan_in_a_master(run: Path) -> None:
    change_tensors(run, lambda tensors: tensors["0/master"][:1].fill_(float("nan")))


def infinite_state(run: Path) -> None:
    change_tensors(run, lambda tensors: tensors["0/exp_avg_sq"].view(-1)[:1].fill_(float("inf")))


def no_layout(run: Path) -> None:
    tensors, origin = load_file(run / RANK), TensorFile(run / RANK).origin
    write_tensors(tensors, run / RANK, {key: origin[key] for key in ("run", "step", "rank")})


def state_says(**values: Any) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        state = json.loads((run / LAST / "state.json").read_text())
        (run / LAST / "state.json").write_text(json.dumps({**state, **values}))

    return damage


def writes(name: str, data: bytes) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        (run / name).write_bytes(data)

    return damage


def other_step(run: Path) -> None:
    shutil.copy(run / "checkpoints/step-00000004/rank-00000.safetensors", run / RANK)


def other_run(run: Path) -> None:
    change_tensors(run, lambda tensors: None, run="0123456789abcdef")


def other_locked(run: Path) -> None:
    locked = run / "checkpoints/locked.safetensors"
    tensors = load_file(locked)
    next(iter(tensors.values())).add_(1)
    write_tensors(tensors, locked, {"run": "", "content": "locked"})


def garbage_between_rows(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_bytes().splitlines()
    (run / "metrics.jsonl").write_bytes(b"\n".join([lines[0], b"\xff\x00{garbage", *lines[1:]]) + b"\n")


# Name, damage, words of the line; None: the run goes on from the newest whole checkpoint and its log has the words.
REFUSED: list[tuple[str, Callable[[Path], None], list[str]]] = [
    ("bit flip", flip_a_bit, ["rank-00000.safetensors", "damaged", "another checkpoint: step-00000004"]),
    ("nan master", nan_in_a_master, ["rank-00000.safetensors", "0/master", "not finite", "another checkpoint"]),
    ("no layout", no_layout, ["rank-00000.safetensors", "layout", "another checkpoint"]),
    (
        "other step",
        other_step,
        ["rank-00000.safetensors", "is of step 4, its checkpoint of step 5", "another checkpoint"],
    ),
    ("other run", other_run, ["rank-00000.safetensors", "is of run 0123456789abcdef"]),
    ("other locked", other_locked, ["locked.safetensors", "is of identity"]),
    ("broken rows", garbage_between_rows, ["metrics.jsonl", "line 2", "remove that line"]),
]
GOES_ON: list[tuple[str, Callable[[Path], None], list[str]]] = [
    ("latest lost", lambda run: (run / "latest").unlink(), ["latest is lost or unreadable", "step-00000005"]),
    ("latest binary", writes("latest", b"\xff\xfe\x00" * 90), ["latest is lost or unreadable", "step-00000005"]),
    ("latest elsewhere", writes("latest", b"../../etc/passwd\n"), ["lost or unreadable"]),
    ("latest names nothing", writes("latest", b"checkpoints/step-00000099\n"), ["step-00000099, which is not whole"]),
    ("step is text", state_says(step="five"), ["step-00000005, which is not whole", "step-00000004"]),
    ("step is true", state_says(step=True), ["step-00000004"]),
    ("best is a list", state_says(best=[1]), ["step-00000004"]),
    ("world of none", state_says(world_size=0), ["step-00000004"]),
    ("unknown key", state_says(colour="red"), ["step-00000004"]),
    ("binary state", writes(f"{LAST}/state.json", b"\xff\x00"), ["step-00000004"]),
    ("deep state", writes(f"{LAST}/state.json", b"[" * 100_000), ["step-00000004"]),
    ("torn last row", lambda run: (run / "metrics.jsonl").open("a").write('{"step": 9, "lr": {"a": 1}'), []),
]


def damaged(files: str, folder: str) -> dict[str, Any]:
    """What the start of a run says of each damage, or where it goes on; nothing in the folder is changed by it."""
    from convclip.config import load_recipe
    from convclip.engine.run_folder import open_run_folder
    from convclip.engine.zero.ds_config import load_ds_config, resolve_ds_config
    from tests.engine.small_run import arguments

    run, again = Path(folder, "run"), Path(folder, "again")
    train_here(files, str(run), 2, SMALL)
    recipe = load_recipe(run / "recipe.yaml")
    config = resolve_ds_config(load_ds_config(arguments(Path(files), run)[5]), recipe, 1)
    found: dict[str, Any] = {"saved": steps_saved(run)}

    def damage(change: Callable[[Path], None]) -> None:
        shutil.rmtree(again, ignore_errors=True)
        shutil.copytree(run, again)
        change(again)

    for name, change, _ in [*REFUSED, *GOES_ON]:
        damage(change)
        before = {path: path.read_bytes() for path in again.rglob("*") if path.is_file()}
        try:
            start = open_run_folder(again, recipe, config, "auto")
            assert start.checkpoint is not None
            read_weights(start.checkpoint)
            file = TensorFile(start.checkpoint / "rank-00000.safetensors", read_state(start.checkpoint).origin(0))
            assert all(file.get(key) is not None for key in file.keys)
            found[name] = (start.checkpoint.name, "; ".join(start.notes))
        except UserError as error:
            found[name] = str(error)
        assert before == {path: path.read_bytes() for path in again.rglob("*") if path.is_file()}, name
    # Whole runs: refused without a change though only the optimizer's state is damaged, and gone on with and told.
    damage(infinite_state)
    before = {path: path.read_bytes() for path in again.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as caught:
        train_here(files, str(again), 2, SMALL, resume="auto")
    found["state"] = str(caught.value)
    own = ("train.log", "tensorboard")
    found["changed"] = [str(p) for p, x in before.items() if p.read_bytes() != x and not any(n in str(p) for n in own)]
    damage(GOES_ON[1][1])
    train_here(files, str(again), 2, SMALL, resume="auto")
    found["log"], found["latest"] = (again / "train.log").read_text(), (again / "latest").read_text()
    for name, values in (("format", {"format": 3}), ("type", {"stage": None})):
        damage(state_says(**values))
        with pytest.raises(UserError) as caught:
            open_run_folder(again, recipe, config, str(again / LAST))
        found[name] = str(caught.value)
    for path in (again / "checkpoints").glob("step-*/state.json"):
        path.unlink()
    with pytest.raises(UserError) as caught:
        open_run_folder(again, recipe, config, "auto")
    found["none"] = str(caught.value)
    return found


def test_damage_is_one_line_or_told_in_the_log(alone):
    found = alone["damaged"]
    assert found["saved"] == [2, 3, 4, 5]
    for name, _, words in REFUSED:
        assert isinstance(found[name], str) and "\n" not in found[name], (name, found[name])
        assert all(word in found[name] for word in words), (name, found[name])
    for name, _, words in GOES_ON:
        assert isinstance(found[name], tuple), (name, found[name])
        assert all(word in " ".join(found[name]) for word in words), (name, found[name])
    assert "0/exp_avg_sq that are not finite" in found["state"] and not found["changed"]
    assert (
        "latest is lost or unreadable: going on from step-00000005" in found["log"] and found["latest"] == f"{LAST}\n"
    )
    assert "has checkpoint format 3" in found["format"]
    assert "its stage is a NoneType" in found["type"] and "another checkpoint: step-00000004" in found["type"]
    assert "no checkpoint that is whole" in found["none"]


def other_runs(files: str, folder: str) -> dict[str, Any]:
    """Runs beside, in and after other runs: messages, and whether weights are what they should be."""
    first, second, clean = (Path(folder, name) for name in ("first", "second", "clean"))
    found: dict[str, Any] = {}

    def line(*arguments: Any, **options: Any) -> str:
        with pytest.raises(UserError) as caught:
            train_here(files, *arguments, **options)
        return str(caught.value)

    train_here(files, str(first), 2, SMALL)
    # A run that was stopped before its first checkpoint leaves its locked weights and its rows.
    second.mkdir()
    (second / "checkpoints").mkdir()
    shutil.copy(first / "checkpoints/locked.safetensors", second / "checkpoints")
    shutil.copy(first / "metrics.jsonl", second)
    other = (*SMALL, "seed=7")
    train_here(files, str(clean), 2, other)
    train_here(files, str(second), 2, other)
    found["stale locked"] = all(torch.equal(v, weights_of(second)[k]) for k, v in weights_of(clean).items())
    found["rows"] = [row["step"] for row in rows(second / "metrics.jsonl") if "event" not in row]
    before = {path: path.read_bytes() for path in second.rglob("*") if path.is_file()}
    found["into another"] = line(str(second), 2, SMALL, str(first / LAST))
    found["untouched"] = all(path.read_bytes() == data for path, data in before.items())
    # Taken up in a new folder: the same weights, and a run of its own.
    fork = Path(folder, "fork")
    train_here(files, str(fork), 2, SMALL, str(first / "checkpoints/step-00000002"))
    found["fork"] = all(torch.equal(v, weights_of(fork)[k]) for k, v in weights_of(first).items())
    found["ids"] = len({read_state(run / LAST).run for run in (first, fork)})
    # The recipe is checked wherever the path starts, and without recipe.yaml too.
    here = os.getcwd()
    os.chdir(first / "checkpoints")
    found["relative"] = line(str(first), 2, (*SMALL, "optim.lr=0.5"), "step-00000004")
    (first / "recipe.yaml").rename(first / "away.yaml")
    found["no recipe.yaml"] = line(str(first), 2, (*SMALL, "optim.lr=0.5"), "step-00000004")
    os.chdir(here)
    return found


def test_a_run_never_mixes_with_another(alone):
    found = alone["other_runs"]
    assert found["stale locked"] and found["rows"] == [1, 2, 3, 4, 5]
    assert "holds another run" in found["into another"] and "name a new folder" in found["into another"]
    assert found["untouched"]
    assert found["fork"] and found["ids"] == 2
    for name in ("relative", "no recipe.yaml"):
        assert "optim.lr was 0.001, is 0.5" in found[name], found[name]


def going_on(files: str, folder: str) -> dict[str, Any]:
    """Older checkpoints, other data, lost evaluations, saves that are due, and values that are not finite."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from convclip.config import load_recipe
    from convclip.engine.stages.schedule import LearningRates
    from convclip.engine.trainer import Trainer

    run, found = Path(folder, "run"), {}
    train_here(files, str(run), 2, SMALL)
    expected, evaluations = weights_of(run), rows(run / "eval.jsonl")
    # Back to an older checkpoint, killed before its first save: `auto` goes on from the older one.
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "fit", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        train_here(files, str(run), 2, SMALL, str(run / "checkpoints/step-00000003"))
    found["older"] = ((run / "latest").read_text(), steps_saved(run))
    train_here(files, str(run), 2, SMALL, "auto")
    found["steps"] = [(row["step"], row.get("event")) for row in rows(run / "metrics.jsonl")]
    found["again"] = all(torch.equal(weights_of(run)[key], value) for key, value in expected.items())
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    found["board"] = [event.step for event in board.Scalars("train/loss")]
    # A finished run, in a copy, with more steps: its lr goes on as that of a run which had them from the start.
    longer = Path(folder, "longer")
    shutil.copytree(run, longer)
    train_here(files, str(longer), 2, (*SMALL, "max_steps=7"), "auto")
    found["longer"] = rows(longer / "metrics.jsonl"), (longer / "train.log").read_text()
    recipe = load_recipe(longer / "recipe.yaml")
    found["lr"] = [LearningRates(recipe, 7, {}).at(step, "any", 1.0) for step in (5, 6)]
    # The store that the run has filled, by its name.
    filled = Path(folder, "filled")
    train_here(files, str(filled), 2, (*SMALL, "features=fill", "max_steps=2"))
    train_here(files, str(filled), 2, (*SMALL, f"features={filled / 'features.h5'}", "max_steps=3"), "auto")
    found["filled"] = steps_saved(filled)
    # An evaluation whose row was lost, and one that only now is asked for.
    (run / "eval.jsonl").write_text(json.dumps(evaluations[0]) + "\n")
    train_here(files, str(run), 2, SMALL, "auto")
    found["evaluations"] = rows(run / "eval.jsonl") == evaluations
    later = Path(folder, "later")
    train_here(files, str(later), 2, (*SMALL, "evaluation.every_epochs=0"))
    found["no best"] = (later / "best").exists()
    train_here(files, str(later), 2, SMALL, "auto")
    found["late best"] = ((later / "best").read_text(), rows(later / "eval.jsonl") == evaluations[1:])
    for every in ((0, 0), (2, 2), (2, 4), (0, 4)):
        place = Path(folder, f"every{every}")
        options = (f"checkpoint.every_epochs={every[0]}", f"checkpoint.every_steps={every[1]}", "max_steps=8")
        train_here(files, str(place), 2, ("batch.global=8", "evaluation.every_epochs=0", *options))
        found[every] = steps_saved(place)
    return found


def test_a_run_goes_on_from_where_it_is_told(alone):
    found = alone["going_on"]
    assert found["older"] == ("checkpoints/step-00000003\n", [2, 3, 4, 5])
    assert found["steps"] == [(1, None), (2, None), (3, None), (3, "unfreeze"), (4, None), (5, None)]
    assert found["again"] and found["board"] == [1, 2, 3, 4, 5]
    steps, log = found["longer"]
    later = [row for row in steps if row["step"] > 5 and "event" not in row]
    assert [row["step"] for row in steps if "event" not in row] == [1, 2, 3, 4, 5, 6, 7]
    assert [max(row["lr"].values()) for row in later] == pytest.approx(found["lr"])
    assert "7 steps in place of 5" in log
    assert found["filled"] == [2, 3]
    assert found["evaluations"] is True
    assert found["no best"] is False and found["late best"] == (f"{LAST}\n", True)
    # Three steps an epoch, eight steps: whichever is due, and the last.
    assert found[0, 0] == [8] and found[2, 2] == [2, 4, 6, 8] and found[2, 4] == [4, 6, 8] and found[0, 4] == [4, 8]


def other_data(files: str, folder: str) -> dict[str, Any]:
    from convclip.config import load_recipe
    from convclip.run import train_recipe
    from tests.engine.small_run import arguments

    run, found = Path(folder, "run"), {}
    train_here(files, str(run), 2, (*SMALL, "max_steps=3"))
    given = arguments(Path(files), run, ds_config="zero2_fp32")
    for name, pattern in (
        ("fewer", "train-{000000..000001}.tar"),
        ("same shape", "other/train-{000000..000002}.tar"),
        ("pictures", "pictures/train-{000000..000002}.tar"),
    ):
        data = [f"data.train={files}/{pattern}", f"data.val={given[9]}"]
        recipe = load_recipe(given[1], [*SMALL, "max_steps=3", *data])
        before = (run / "recipe.yaml").read_text()
        with pytest.raises(UserError) as caught:
            train_recipe(recipe, given[5], run, "auto")
        found[name] = (str(caught.value), (run / "recipe.yaml").read_text() == before)
        done = train_recipe(recipe, given[5], run, "auto", resume_other_data=True)
        found[name, "accepted"] = (done["steps"], (run / "train.log").read_text())
    return found


def test_other_training_data_are_refused_or_accepted_by_a_flag(alone):
    found = alone["other_data"]
    for name, words in (
        ("fewer", "steps per epoch 3, now 2"),
        ("same shape", "captions of a sample"),
        ("pictures", "images of a sample"),
    ):
        line, untouched = found[name]
        assert words in line and "--resume_other_data" in line and "\n" not in line and untouched, line
        assert "other training data than before" in found[name, "accepted"][1]


def not_finite(files: str, folder: str) -> list[Any]:
    """An engine whose optimizer state is infinite, of one rank alone; what a save says, and what is left."""
    from convclip.distributed import rank
    from convclip.engine.zero.checkpoint import remove_old, save_checkpoint, save_locked
    from convclip.engine.zero.masters import master_shards
    from tests.engine.small_engine import SmallModel, deepspeed_run, ds_config

    place = Path(folder) / "checkpoints"
    locked = save_locked(SmallModel(), {"third.weight", "third.bias", "logit_scale"}, place)
    _, engine = deepspeed_run(ds_config(2, world=2), steps=3)
    save_checkpoint(engine, place, RunState(3, 0, 2, 2, "fp32", locked=locked))
    if rank() == 1:
        master_shards(engine)[0].flat[:1].fill_(float("inf"))
    with pytest.raises(UserError) as caught:
        save_checkpoint(engine, place, RunState(4, 0, 2, 2, "fp32", locked=locked))
    remove_old(Path(folder), 1)
    return [
        str(caught.value),
        sorted(path.name for path in place.iterdir()),
        len(read_weights(place / "step-00000003")),
    ]


def test_values_that_are_not_finite_are_never_saved(together):
    line, left, count = together["not_finite"]
    assert "not finite" in line and "stopped at step 4" in line and "third" in line
    assert left == ["locked.safetensors", "step-00000003"] and count == 7


def full_disk(files: str, folder: str) -> dict[str, list[str]]:
    """Rank 0 cannot write: what each rank says."""
    from convclip.distributed import gather_objects, is_main
    from convclip.engine import meters
    from convclip.engine.zero import checkpoint

    def full(*_: Any, **__: Any) -> None:
        raise CannotWrite("PLACE cannot be written: No space left on device")

    found = {}
    for name, module, function in (("locked", checkpoint, "write_tensors"), ("row", meters, "append_line")):
        with pytest.MonkeyPatch.context() as patch:
            if is_main():
                patch.setattr(module, function, full)
            with pytest.raises(UserError) as caught:
                train_here(files, f"{folder}/{name}", 1, SMALL)
        found[name] = gather_objects(str(caught.value))
    return found


def kill_some(files: str, folder: str) -> dict[str, Any]:
    """A sample of the crash points of a run of two ranks; all of one rank's are in test_crash_points."""
    return kill_everywhere(files, folder, 1, 3)


def test_a_kill_of_two_ranks_changes_nothing(together):
    found = together["kill_some"]
    assert found["points"] == 3 and not found["wrong"], found["wrong"]


def test_a_full_disk_is_one_line_on_all_ranks(together):
    found = together["full_disk"]
    assert found == dict.fromkeys(("locked", "row"), ["PLACE cannot be written: No space left on device"] * 2)


FIXTURE = Path(__file__).parent.parent / "fixtures" / "0.1.0" / "run"


def test_a_reader_finds_the_checkpoint_that_a_run_moved_on_to(tmp_path, monkeypatch):
    """The first one goes after its path was found and before it is read, as where a run saves."""
    run = tmp_path / "run"
    shutil.copytree(FIXTURE, run)
    (run / "best").unlink()
    (run / "latest").write_text("checkpoints/step-00000003\n")
    load, loaded = checkpoint_weights.load_weights, []

    def slow(model: Any, path: Path, ema: bool = False) -> None:
        if path.name == "step-00000003":
            (run / "latest").write_text("checkpoints/step-00000009\n")
            shutil.rmtree(path)
            read_weights(path)
        loaded.append(read_weights(path))

    monkeypatch.setattr(checkpoint_weights, "load_weights", slow)
    path, state = load_from(torch.nn.Linear(1, 1), run)
    assert path.name == "step-00000009" and state.step == 9 and len(loaded) == 1
    monkeypatch.setattr(checkpoint_weights, "load_weights", load)
    shutil.rmtree(path)
    with pytest.raises(UserError, match="is not a convclip checkpoint"):
        load_from(torch.nn.Linear(1, 1), run)


def test_a_pointer_that_names_nothing_is_named(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(FIXTURE, run)
    (run / "best").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"best does not name a checkpoint: give one of .*step-00000003, step-00000009"):
        checkpoint_path(run)


def test_an_evaluation_that_cannot_be_written_fails_before_the_work(tmp_path, monkeypatch):
    from convclip import run

    monkeypatch.setattr(run, "open_task", lambda recipe: pytest.fail("the work has begun"))
    (tmp_path / "file").touch()
    (tmp_path / "taken" / "eval.jsonl").mkdir(parents=True)
    for place in (tmp_path / "file" / "below", tmp_path / "taken"):
        with pytest.raises(UserError, match=f"--output_dir {place} cannot be written"):
            run.evaluate_checkpoint(FIXTURE, "nowhere", place)
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(UserError, match=f"--output_dir {tmp_path} is a run's folder"):
        run.evaluate_checkpoint(FIXTURE, "nowhere", tmp_path)
