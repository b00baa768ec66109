"""Whole video runs on tiny clips: from stores and live, frozen, two ranks, resumed, and the user's mistakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from convclip.config import load_recipe
from convclip.features.reader import FeatureStore
from convclip.schema import UserError
from tests.conftest import FULL, REPOSITORY
from tests.engine.small_run import weights_of
from tests.processes import run_launched, run_ranks, run_script
from tests.video.small_video import overrides, train_here, with_stores

pytestmark = pytest.mark.launch
LOCKED = "freezing.lock=[image, text]"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("video")
    run_ranks(1, with_stores, folder)
    return folder


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(folder):
    return [row["loss"] for row in rows(folder / "metrics.jsonl") if "event" not in row]


def in_stages(files, folder, names):
    """Train the named variants one after the other; the losses of each."""
    variants = {
        "stored": (),
        "live": (f"video.teachers=[{files}/teacher.safetensors]",),
        "two": (f"video.teachers=[{files}/teacher.h5,{files}/teacher.safetensors]",),
        "ce": ("video.coarse=ce", "video.weights=[1, 10, 1]"),
        "alone": ("video.teachers=[]", "video.weights=[1, 0, 0]", "optim.ema_decay=0.5"),
        "accumulated": ("batch.accumulation=2",),
        "unfrozen": (LOCKED, "freezing.unfreeze=[{epoch: 1, tower: text, layers: 1}]", "features=fill"),
        "locked": (LOCKED,),
        "filled": (LOCKED, "features=fill"),
    }
    for name in names:
        train_here(str(files), f"{folder}/{name}", variants[name])
    return {name: losses(Path(folder) / name) for name in names}


@pytest.fixture(scope="module")
def found(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    names = ("stored", "live", "two", "ce", "alone", "accumulated", "unfrozen", "locked", "filled")
    return run_ranks(1, in_stages, files, str(folder), names), folder


def test_a_moving_average_is_scored_too(found):
    start, *evaluations = rows(found[1] / "alone" / "eval.jsonl")
    assert "ema" not in start and len(evaluations) == 3
    assert all(row["ema"]["standard"].keys() == row["standard"].keys() for row in evaluations)
    assert "the moving average of the weights (optim.ema_decay 0.5):" in (found[1] / "alone" / "train.log").read_text()


def test_a_run_learns_and_reports_recalls_and_parts(found):
    values, folder = found
    assert len(values["stored"]) == 12 and sum(values["stored"][-4:]) < sum(values["stored"][:4])
    start, *evaluations = rows(folder / "stored" / "eval.jsonl")
    assert start["step"] == 0 and {"mean_pool", "standard"} <= start.keys()
    assert start["standard"] == start["mean_pool"], "an identity start pools as the mean pool does"
    assert [row["epoch"] for row in evaluations] == [0, 1, 2]
    keys = {f"{way}_{what}" for way in ("t2v", "v2t") for what in ("r1", "r5", "r10", "median_rank", "mean_rank")}
    assert keys == evaluations[0]["standard"].keys()
    step = rows(folder / "stored" / "metrics.jsonl")[0]
    parts = [step[f"loss_{name}"] for name in ("ground_truth", "coarse", "fine")]
    assert step["loss"] == pytest.approx(0.2 * parts[0] + parts[1] + 2 * parts[2], rel=1e-5)
    assert "zero-shot mean pool" in (folder / "stored" / "train.log").read_text()


def test_the_stored_teacher_is_the_live_one(found):
    values, _ = found
    assert values["live"] == pytest.approx(values["stored"], rel=1e-4)
    assert values["two"] == pytest.approx(values["stored"], rel=1e-4), "the mean of a teacher and itself"
    assert values["ce"] != pytest.approx(values["stored"], rel=1e-2)


def test_a_locked_run_from_its_own_features_is_the_live_one(found):
    values, folder = found
    assert values["filled"] == pytest.approx(values["locked"], rel=1e-4)
    store = FeatureStore(folder / "filled" / "features.h5")
    assert set(store.arrays) == {"student_frames", "student_n_frames", "student_text", "caption_crc32"}


def test_an_unfreeze_event_opens_a_tower_of_a_filled_run(found):
    values, folder = found
    assert values["unfrozen"][:4] == pytest.approx(values["locked"][:4], rel=1e-4)
    (event,) = [row for row in rows(folder / "unfrozen" / "metrics.jsonl") if row.get("event") == "unfreeze"]
    assert (event["step"], event["tower"]) == (4, "text")
    assert len(values["unfrozen"]) == 12


def locked_without_towers(files, folder):
    """Train from the store with towers that raise and a frame store that is not there."""
    from convclip.models.dual_tower import DualTower

    def refuse(self, *arguments, **options):
        raise AssertionError("a tower ran")

    store = f"{folder}/filled/features.h5"
    DualTower.encode_image = DualTower.encode_text = refuse
    more = (LOCKED, f"features={store}", "video.frame_store=nowhere", "data.val=null")
    train_here(str(files), f"{folder}/bare", more)
    return losses(Path(folder) / "bare")


def test_a_locked_run_reads_no_frame_and_runs_no_tower(files, found, tmp_path):
    values, folder = found
    bare = run_ranks(1, locked_without_towers, files, str(folder))
    assert bare == pytest.approx(values["filled"], rel=1e-6)


def train_variants(files, folder, stages):
    """Two micro batches in a step, ZeRO 0, 2 and 3; and a frozen run from a store that these ranks fill."""
    for stage in stages:
        train_here(str(files), f"{folder}/{stage}", (), stage)
    train_here(str(files), f"{folder}/filled", (LOCKED, "features=fill"))


def test_two_ranks_equal_one(files, tmp_path):
    together = [0, 2, 3] if FULL else [0, 3]
    for world, stages in ((1, [0]), (2, together)):
        run_ranks(world, train_variants, files, str(tmp_path / f"world{world}"), stages)
    for name in (*map(str, together), "filled"):
        alone, both = tmp_path / "world1" / ("filled" if name == "filled" else "0"), tmp_path / "world2" / name
        reference, found = weights_of(alone), weights_of(both)
        worst = max((found[key] - value).abs().max().item() for key, value in reference.items())
        assert worst <= 2e-5, f"{name}: {worst}"
        one, two = (rows(folder / "eval.jsonl") for folder in (alone, both))
        assert [row["standard"] for row in one] == [row["standard"] for row in two]


def resume_in_the_middle(files, folder):
    """Stop after 7 of 12 steps by an error, then go on."""
    from convclip.engine.trainer import Trainer

    train_step, more = Trainer._train_step, ("checkpoint.every_steps=7",)

    def stop(self, *arguments):
        if self.state.step == 8:
            raise KeyboardInterrupt
        return train_step(self, *arguments)

    Trainer._train_step = stop
    try:
        train_here(str(files), f"{folder}/stopped", more)
    except KeyboardInterrupt:
        Trainer._train_step = train_step
    train_here(str(files), f"{folder}/stopped", more, resume="auto")
    train_here(str(files), f"{folder}/whole", more)
    return True


def test_a_stopped_run_resumes_to_the_same_weights(files, tmp_path):
    run_ranks(1, resume_in_the_middle, files, str(tmp_path))
    expected, found = weights_of(tmp_path / "whole"), weights_of(tmp_path / "stopped")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def resumed_with_other_captions(files, folder):
    """A run gone on with after one caption was exchanged for another: the message."""
    annotations = json.loads((files / "data.json").read_text())
    annotations["sentences"][3]["caption"] = "as many captions, and this one is another"
    changed = Path(folder) / "changed.json"
    changed.write_text(json.dumps(annotations))
    live = f"video.teachers=[{files}/teacher.safetensors]"
    train_here(str(files), f"{folder}/run", (live, "max_steps=1"))
    with pytest.raises(UserError) as caught:
        train_here(str(files), f"{folder}/run", (live, "max_steps=1", f"video.annotations={changed}"), resume="auto")
    return str(caught.value)


def test_other_captions_of_the_same_number_are_noticed_on_a_resume(files, tmp_path):
    line = run_ranks(1, resumed_with_other_captions, files, str(tmp_path))
    assert "videos and captions (checksum)" in line and "--resume_other_data" in line, line


def test_two_ranks_extract_train_and_evaluate(files, tmp_path):
    given = ["--recipe", str(files / "small.yaml"), "--train_data", str(files / "train.csv")]
    sets = [part for value in overrides(files, teachers=False)[1:3] for part in ("--set", value)]
    store, output = tmp_path / "teacher.h5", tmp_path / "run"
    teacher = ["--kind", "xclip", "--teacher", str(files / "teacher.safetensors"), "--output", str(store)]
    done = run_launched(2, "tools/extract_features.py", *teacher, *given, *sets)
    assert done.returncode == 0, done.stdout + done.stderr
    estimated = int(done.stdout.split(" bytes)")[0].split("(")[-1])
    alone, joined = FeatureStore(files / "teacher.h5"), FeatureStore(store)
    assert (files / "teacher.h5").stat().st_size == pytest.approx(estimated, abs=8192)
    for name in alone.arrays:
        ids = alone.ids(name)
        torch.testing.assert_close(joined.read(name, ids), alone.read(name, ids), rtol=1e-2, atol=1e-3)
    more = ["--val_data", str(files / "test.csv"), "--output_dir", str(output), "--set", f"video.teachers=[{store}]"]
    more += ["--ds_config", str(REPOSITORY / "ds_configs" / "zero2_fp32.json")]
    done = run_script("launch/train.py", *given, *sets, *more, world=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "best T2V R@1" in done.stdout
    more = ["--data", str(files / "test.csv"), "--output_dir", str(tmp_path / "evaluated")]
    checkpoint = str(output / "checkpoints" / "step-00000012")
    done = run_script("launch/evaluate.py", "--checkpoint", checkpoint, *more, world=2)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,), (*_, trained) = rows(tmp_path / "evaluated" / "eval.jsonl"), rows(output / "eval.jsonl")
    assert found["standard"] == trained["standard"]


def test_a_killed_extraction_goes_on_to_the_same_store(files, tmp_path):
    store = tmp_path / "teacher.h5"
    sets = [part for value in overrides(files, teachers=False)[1:3] for part in ("--set", value)]
    command = [sys.executable, "tools/extract_features.py", "--kind", "xclip", "--recipe", str(files / "small.yaml")]
    command += ["--teacher", str(files / "teacher.safetensors"), "--train_data", str(files / "train.csv"), *sets]
    command += ["--output", str(store), "--set", "evaluation.batch=4"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*.part")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not store.exists()
    done = run_script(*command[1:])
    assert done.returncode == 0, done.stdout + done.stderr
    alone, again = FeatureStore(files / "teacher.h5"), FeatureStore(store)
    for name in alone.arrays:
        ids = alone.ids(name)
        torch.testing.assert_close(again.read(name, ids), alone.read(name, ids), rtol=1e-2, atol=1e-3)


def refusals(files, folder):
    """The message that each mistake gets."""
    annotations = json.loads((files / "data.json").read_text())
    annotations["sentences"][0]["caption"] = "another caption"
    changed = Path(folder) / "changed.json"
    changed.write_text(json.dumps(annotations))
    mistakes = {
        "no teacher": ("video.teachers=[]",),
        "frames": ("video.frames=5",),
        "words": ("video.words=9",),
        "no frames": ("video.frame_store=null",),
        "missing store": ("video.teachers=[nowhere.h5]",),
        "captions": (f"video.annotations={changed}",),
        "live size": (f"video.teachers=[{files}/teacher.safetensors]", "video.words=9"),
        "other towers": (LOCKED, f"features={folder}/other.h5", "seed=7"),
        "not locked": ("features=fill",),
        "no data": (LOCKED, "features=fill", "data.train=null"),
    }
    train_here(str(files), f"{folder}/first", (LOCKED, "features=fill", "max_steps=1"))
    (Path(folder) / "first" / "features.h5").rename(f"{folder}/other.h5")
    messages = {}
    for name, more in mistakes.items():
        try:
            train_here(str(files), f"{folder}/{name}", more)
        except UserError as error:
            messages[name] = str(error)
    return messages


def test_mistakes_are_named(files, tmp_path):
    messages = run_ranks(1, refusals, files, str(tmp_path))
    expected = {
        "no teacher": ["video.teachers is not set", "--kind xclip"],
        "frames": ["frames 4", "5"],
        "words": ["words", "8", "9"],
        "no frames": ["video.frame_store is not set"],
        "missing store": ["nowhere.h5", "no such feature store"],
        "captions": ["1 captions differ", "'100'"],
        "live size": ["teacher.safetensors", "(4, 32, 8)", "(4, 32, 9)"],
        "other towers": ["other.h5: made with other weights", "seed"],
        "not locked": ["no tower is locked"],
        "no data": ["data.train is not set", "--train_data"],
    }
    for name, words in expected.items():
        message = messages.get(name, "nothing was refused")
        assert "\n" not in message and all(word in message for word in words), f"{name}: {message}"


def test_image_settings_are_refused_in_a_video_recipe(files):
    for value in ("teacher={}", "batch.micro=2", "features={mode: live, views: 1}"):
        with pytest.raises(UserError, match="cannot be used with video"):
            load_recipe(files / "small.yaml", [value])
