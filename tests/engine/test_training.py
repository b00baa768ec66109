"""Whole runs on small pictures: launchers, world sizes, kills, and the user's mistakes."""

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

import convclip
from convclip.models.checkpoint_weights import checkpoint_path, read_weights, step_of
from convclip.schema import UserError
from tests.conftest import FULL, REPOSITORY
from tests.engine.outcome import stop_after
from tests.engine.plain_average import wrong_averages
from tests.engine.small_run import arguments, make_files, train_alone, train_here, weights_of
from tests.processes import launch, run, run_launched, run_ranks, run_script
from tools import export, export_open_clip

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def launched(files, tmp_path_factory):
    """One run of two ranks under the deepspeed launcher; (completed process, its folder).

    It leaves no shared memory behind.
    """
    output, before = tmp_path_factory.mktemp("runs") / "two_ranks", shared_memory()
    done = run(launch(2, "launch/train.py", *arguments(files, output)))
    assert shared_memory() <= before
    return done, output


def shared_memory():
    """Names of DeepSpeed's buffers in shared memory."""
    return {path.name for path in Path("/dev/shm").glob("deepspeed_*")}


def test_two_ranks_under_the_deepspeed_launcher(launched):
    done, output = launched
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = rows(output / "metrics.jsonl")
    steps = [row for row in metrics if "event" not in row]
    assert [row["step"] for row in steps] == list(range(1, 25))
    assert all(
        {"loss", "lr", "logit_scale", "grad_norm", "samples_per_s", "data_share", "memory_gib"} <= row.keys()
        for row in steps
    )
    events = [row for row in metrics if row.get("event") == "unfreeze"]
    assert [(row["step"], row["tower"], row["opened"]) for row in events] == [
        (6, "text", "last 1 layers"),
        (12, "image", "last 2 groups"),
    ]
    evaluations = rows(output / "eval.jsonl")
    assert [row["epoch"] for row in evaluations] == [0, 1, 2, 3]
    assert {"i2t_r1", "t2i_r10"} <= evaluations[0]["standard"].keys() & evaluations[0]["rowwise"].keys()
    for name in ("recipe.yaml", "ds_config.json", "train.log", "latest", "best"):
        assert (output / name).is_file(), name
    assert "unfreeze text: last 1 layers" in done.stdout
    assert "next: deepspeed launch/evaluate.py" in done.stdout


def test_lr_of_a_new_group_is_scaled_and_old_groups_keep_theirs(launched):
    _, output = launched
    steps = [row for row in rows(output / "metrics.jsonl") if "event" not in row]
    before, after = steps[5]["lr"], steps[6]["lr"]
    assert set(before) < set(after)
    assert all(after["text.event0.decay"] == pytest.approx(0.1 * after[name]) for name in before)


def test_evaluation_by_its_own_command_finds_the_same_figures(launched, files, tmp_path):
    _, output = launched
    options = ["--checkpoint", str(output / "checkpoints" / "step-00000024"), "--output_dir", str(tmp_path)]
    done = run_launched(2, "launch/evaluate.py", *options, "--data", str(files / "val-000000.tar"))
    assert done.returncode == 0, done.stdout + done.stderr
    (found,), (*_, trained) = rows(tmp_path / "eval.jsonl"), rows(output / "eval.jsonl")
    assert found["standard"] == trained["standard"]
    assert found["val_loss"] == pytest.approx(trained["val_loss"], rel=1e-5)


def test_an_exported_run_embeds_the_same_in_open_clip(launched, files, tmp_path):
    import open_clip

    from convclip.config import load_recipe
    from convclip.models import build_model
    from convclip.models.checkpoint_weights import load_weights

    _, output = launched
    options = ["--checkpoint", str(output), "--output_dir", str(tmp_path / "export")]
    done = run_script("tools/export_open_clip.py", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'export'}")
    ours = build_model(load_recipe(output / "recipe.yaml").model).eval()
    load_weights(ours, output / (output / "best").read_text().strip())
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(theirs.eval().encode_image(images), ours.encode_image(images), atol=1e-5)


def test_a_run_with_the_sigmoid_loss(files, tmp_path):
    more = ["--set", "loss.kind=sigmoid", "--set", "model.init_logit_bias=-10", "--set", "model.init_logit_scale=2.303"]
    done = train_alone(*arguments(files, tmp_path / "run", *more, "--set", "epochs=2", "--set", "optim.lr=0.01"))
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [row for row in rows(tmp_path / "run" / "metrics.jsonl") if "event" not in row]
    assert steps[0]["logit_bias"] == -10 and steps[-1]["logit_bias"] != -10
    # Four pairs, each about -log sigmoid(-10 + 10 cos).
    assert 5 < steps[0]["loss"] < 15 and steps[-1]["loss"] < steps[0]["loss"]


def worlds_in_stages(files, folder, stages):
    return {stage: train_here(files, f"{folder}/{stage}", stage, ("max_steps=14",))["steps"] for stage in stages}


def test_two_ranks_equal_one_with_the_same_global_batch(files, tmp_path):
    # ZeRO 1 and 2 are one optimizer of DeepSpeed.
    stages = {1: range(4) if FULL else (0, 1, 3), 2: range(4) if FULL else (0, 2, 3)}
    for world in (1, 2):
        run_ranks(world, worlds_in_stages, str(files), str(tmp_path / f"world{world}"), stages[world])
    reference = weights_of(tmp_path / "world1" / "0")
    for world in (1, 2):
        for stage in stages[world]:
            found = weights_of(tmp_path / f"world{world}" / str(stage))
            worst = max((found[name] - value).abs().max().item() for name, value in reference.items())
            assert worst <= 1e-5, f"world {world} stage {stage}: {worst}"


def with_a_trial_of_the_last_stage(files, folder):
    """A run as on an accelerator, which tries its largest stage before the first, with a moving average.

    The average evaluated by itself; and the notes of resumes with another decay and without any.
    """
    from convclip.run import evaluate_checkpoint

    every_step = ("checkpoint.every_steps=1", "checkpoint.keep_last=100")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("convclip.engine.trainer.on_accelerator", lambda: True)
        train_here(files, folder, 2, ("optim.ema_decay=0.7", *every_step))
    last = f"{folder}/checkpoints/step-00000024"
    figures = evaluate_checkpoint(last, f"{files}/val-000000.tar", f"{folder}/evaluated", ema=True)
    for decay in ("0.9", "null"):
        resumed = (f"optim.ema_decay={decay}", "evaluation.every_epochs=0", *every_step)
        train_here(files, f"{folder}-{decay}", 2, resumed, resume=f"{folder}/checkpoints/step-00000022")
    again = f"{folder}-null/checkpoints/step-00000023"
    train_here(files, f"{folder}-again", 2, ("optim.ema_decay=0.6", *every_step), resume=again)
    return figures


@pytest.fixture(scope="module")
def averaged(files, tmp_path_factory):
    """(the run with a trial and a moving average, figures of the average)."""
    run_folder = tmp_path_factory.mktemp("averaged") / "run"
    return run_folder, run_ranks(2, with_a_trial_of_the_last_stage, str(files), str(run_folder))


def test_a_trial_of_the_last_stage_changes_nothing(averaged, launched):
    expected, found = weights_of(launched[1]), weights_of(averaged[0])
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    log = (averaged[0] / "train.log").read_text()
    assert log.index("a full step fits") < log.index("step 1/24")
    assert "estimated" in log


def test_a_moving_average_is_a_plain_one_and_changes_nothing_else(averaged, launched):
    run_folder, figures = averaged
    assert not wrong_averages(run_folder)
    without, found = rows(launched[1] / "eval.jsonl"), rows(run_folder / "eval.jsonl")
    assert [{key: value for key, value in row.items() if key != "ema"} for row in found] == without
    # The table has both, and the average by itself scores what it scored in the run.
    assert (run_folder / "train.log").read_text().count("the moving average of the weights (optim.ema_decay 0.7)") == 4
    assert found[-1]["ema"]["val_loss"] != found[-1]["val_loss"]
    assert figures["standard"] == found[-1]["ema"]["standard"]
    assert figures["val_loss"] == pytest.approx(found[-1]["ema"]["val_loss"], rel=1e-5)
    (by_itself,) = rows(run_folder / "evaluated" / "eval.jsonl")
    assert by_itself["weights"] == "ema"


def test_a_moving_average_is_switched_on_and_off_where_a_run_goes_on(averaged):
    run_folder, _ = averaged
    slower, off, again = (run_folder.with_name(f"run-{name}") for name in ("0.9", "null", "again"))
    assert "optim.ema_decay was 0.7, is 0.9 from step 22 on" in (slower / "train.log").read_text()
    expected = read_weights(run_folder / "checkpoints" / "step-00000022", ema=True)
    for step in (23, 24):
        weights = read_weights(slower / "checkpoints" / f"step-{step:08d}")
        expected = {name: 0.9 * old + 0.1 * weights[name] for name, old in expected.items()}
    found = read_weights(slower / "checkpoints" / "step-00000024", ema=True)
    assert all(torch.allclose(found[name], value, rtol=0, atol=1e-6) for name, value in expected.items())
    assert "optim.ema_decay was 0.7 and is off from now on" in (off / "train.log").read_text()
    last = [weights_of(folder) for folder in (slower, off, again)]
    assert all(torch.equal(weights[name], value) for weights in last for name, value in last[0].items())
    with pytest.raises(UserError, match=r"step-00000024 has no moving average .* leave --ema out"):
        read_weights(off / "checkpoints" / "step-00000024", ema=True)
    log = (again / "train.log").read_text()
    assert "optim.ema_decay is 0.6 from now on: the moving average starts from the weights of step 23" in log
    start, end = (
        read_weights(folder / "checkpoints" / f"step-000000{step}") for folder, step in ((off, 23), (again, 24))
    )
    found = read_weights(again / "checkpoints" / "step-00000024", ema=True)
    assert all(torch.allclose(found[name], 0.6 * start[name] + 0.4 * end[name], rtol=0, atol=1e-6) for name in found)


def test_a_moving_average_is_used_by_one_flag(averaged, files, tmp_path, capsys):
    run_folder, _ = averaged
    average = read_weights(checkpoint_path(run_folder), ema=True)
    clip = convclip.load(run_folder, "cpu", ema=True)
    assert all(torch.equal(value, average[name]) for name, value in clip.model.state_dict().items())
    assert not torch.equal(clip.model.text.text_projection, convclip.load(run_folder, "cpu").model.text.text_projection)
    folder = str(tmp_path / "export")
    assert export.main(["--checkpoint", str(run_folder), "--output_dir", folder, "--ema"]) == 0
    exported = convclip.load(folder, "cpu").model.state_dict()
    assert all(torch.equal(exported[name], average[name]) for name in exported)
    card = (tmp_path / "export" / "README.md").read_text()
    assert "moving average of the weights (optim.ema_decay 0.7)" in card
    best = step_of(checkpoint_path(run_folder))
    (row,) = [row for row in rows(run_folder / "eval.jsonl") if row["step"] == best]
    assert f"validation loss {row['ema']['val_loss']:.4f}" in card
    # Where there is none it is one line.
    for main in (export.main, export_open_clip.main):
        capsys.readouterr()
        without = str(run_folder.with_name("run-null") / "checkpoints" / "step-00000024")
        assert main(["--checkpoint", without, "--output_dir", str(tmp_path / "none"), "--ema"]) == 2
        assert "step-00000024 has no moving average" in capsys.readouterr().err and not (tmp_path / "none").exists()
    for source in (folder, "open_clip:RN50"):
        with pytest.raises(UserError, match="ema=True goes with a run or a checkpoint"):
            convclip.load(source, ema=True)


def test_a_killed_run_resumes_to_the_same_weights(files, tmp_path):
    slow = ["--set", "checkpoint.every_steps=4"]
    whole = train_alone(*arguments(files, tmp_path / "whole", *slow))
    assert whole.returncode == 0, whole.stdout + whole.stderr
    killed = tmp_path / "killed"
    command = [sys.executable, "launch/train.py", *arguments(files, killed, *slow)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (killed / "checkpoints" / "step-00000008").exists() and time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    again = train_alone(*arguments(files, killed, *slow, "--resume", "auto"))
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resumed from" in again.stdout
    expected, found = weights_of(tmp_path / "whole"), weights_of(killed)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    steps = [row["step"] for row in rows(killed / "metrics.jsonl") if "event" not in row]
    assert steps == list(range(1, 25))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--train_data", "nowhere/train-{000000..000003}.tar"], ["nowhere"]),
        (["--set", "batch.accumulation=3"], ["batch.global 4", "accumulation 3"]),
        (["--ds_config", "ds_configs/zero1_fp16.json"], ["fp16", "does not support"]),
        (["--resume", "nowhere/step-00000001"], ["nowhere/step-00000001", "not a convclip checkpoint"]),
        (["--set", "optim.lr=1e20", "--set", "max_bad_steps=2"], ["stopped at step", "2 steps in a row"]),
        (["--set", "batch.global=4000"], ["rows", "batch.global"]),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(files, tmp_path, more, words):
    done = train_alone(*arguments(files, tmp_path / "run", *more))
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert all(word in last for word in words), last


def test_a_folder_that_holds_another_run_is_kept(launched, files):
    _, output = launched
    before = (output / "metrics.jsonl").read_text()
    for more, words in [
        ([], ["holds another run", "--resume auto"]),
        (["--resume", "auto", "--set", "optim.lr=2e-3"], ["recipe differs", "optim.lr was 0.001, is 0.002"]),
    ]:
        done = train_alone(*arguments(files, output, *more))
        assert done.returncode == 2, done.stdout + done.stderr
        assert all(word in done.stderr for word in words), done.stderr
    assert (output / "metrics.jsonl").read_text() == before


def test_a_run_goes_on_with_another_number_of_ranks_and_another_ds_config(launched, files, tmp_path):
    """Two ranks of ZeRO 2, stopped at the second event, go on as one rank of ZeRO 3, chunked: the same run."""
    _, output = launched
    stopped = tmp_path / "run"
    stop_after(output, 12, stopped)
    more = ("--resume", "auto", "--set", "batch.micro=2")
    done = train_alone(*arguments(files, stopped, *more, ds_config="zero3_fp32"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed from 2 ranks of ZeRO 2 in fp32 on 1 rank of ZeRO 3 in fp32: order of rows" in done.stdout
    assert "batch.micro was not set, is 2" in done.stdout
    found, expected = rows(stopped / "metrics.jsonl"), rows(output / "metrics.jsonl")
    keys = ("step", "epoch", "event", "lr", "tower")
    assert [{k: row.get(k) for k in keys} for row in found] == [{k: row.get(k) for k in keys} for row in expected]
    losses = [[row["loss"] for row in each if "loss" in row] for each in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    state = json.loads((stopped / "checkpoints" / "step-00000024" / "state.json").read_text())
    assert (state["world_size"], state["zero_stage"]) == (1, 3)
    ours, theirs = weights_of(stopped), weights_of(output)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(value, theirs[name], atol=1e-4) for name, value in ours.items())


def test_ds_config_that_contradicts_the_recipe_is_refused(files, tmp_path):
    config = json.loads((REPOSITORY / "ds_configs" / "zero2_fp32.json").read_text())
    path = tmp_path / "wrong.json"
    for change, words in [
        ({"train_batch_size": 512}, ["train_batch_size is 512", "batch.global is 4"]),
        ({"optimizer": {"type": "Adam"}}, ["'optimizer'", "recipe's optim"]),
        ({"gradient_clipping": 3.0}, ["gradient_clipping is 3.0", "optim.clip_grad_norm is 1.0"]),
    ]:
        path.write_text(json.dumps({**config, **change}))
        done = train_alone(*arguments(files, tmp_path / "run", "--ds_config", str(path)))
        assert done.returncode == 2
        assert all(word in done.stderr for word in words), done.stderr
