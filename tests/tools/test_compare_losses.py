"""Loss curves compared: what is read, how steps meet, what passes, what is said when it cannot be done."""

import json
import logging
import math
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from tools import compare_losses


def write_metrics(path, losses):
    """A metrics.jsonl with the other rows that stand in it."""
    rows = [{"event": "unfreeze", "step": 3, "epoch": 0}]
    rows += [{"step": step, "epoch": 0, "loss": loss, "loss_contrastive": loss} for step, loss in losses.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_open_clip(path, losses, epoch_steps=50, batch=64):
    """An out.log of open_clip_train, one line for each finished step in `losses`."""
    lines = ["2025-01-01,00:00:00 | INFO | Params:", "2025-01-01,00:00:00 | INFO |   batch_size: 64"]
    for step, loss in losses.items():
        epoch, count = divmod(step - 1, epoch_steps)
        samples, size = (count + 1) * batch, epoch_steps * batch + 17
        lines.append(
            f"2025-01-01,00:00:01 | INFO | Train Epoch: {epoch} [{samples:>5}/{size} ({100 * samples / size:.0f}%)] "
            "Data (t): 0.101 Batch (t): 0.512, 125.000/s, 125.000/s/gpu LR: 0.000010 Logit Scale: 14.300 "
            f"Contrastive_loss: {loss + 1:#.5g} (9.0) Loss: {loss:#.6g} ({loss:#.5g})"
        )
    path.write_text("\n".join(lines) + "\n")
    return path


def curve(steps, factor=1.0):
    return {step: factor * 4 * math.exp(-step / 80) for step in steps}


def run(reference, candidate, *options):
    return compare_losses.main([str(reference), str(candidate), *map(str, options)])


def printed(text):
    lines = [line.partition(": ") for line in text.splitlines()]
    return {name: float(value) for name, _, value in lines if name.endswith("Error")}


def test_equal_curves_pass(tmp_path, capsys):
    reference = write_open_clip(tmp_path / "out.log", curve(range(1, 120, 10)))
    candidate = write_metrics(tmp_path / "metrics.jsonl", curve(range(1, 120)))
    assert run(reference, candidate) == 0
    output = capsys.readouterr().out
    assert printed(output)["MeanRelativeError"] < 1e-5
    assert "compared at 12 steps, 1 to 111; 12 of them logged by both" in output
    assert output.splitlines()[-1].startswith("pass: ")


def test_errors_are_means_of_magnitudes_and_signed_ones_stand_beside(tmp_path, capsys):
    reference = write_metrics(tmp_path / "a.jsonl", {1: 2.0, 2: 4.0, 3: 5.0})
    candidate = write_metrics(tmp_path / "b.jsonl", {1: 1.0, 2: 6.0, 3: 5.0})
    assert run(reference, candidate) == 1
    assert printed(capsys.readouterr().out) == pytest.approx(
        {
            "MeanRelativeError": 1 / 3,
            "MeanAbsoluteError": 1.0,
            "SignedMeanRelativeError": 0.0,
            "SignedMeanAbsoluteError": 1 / 3,
        },
        abs=1e-5,
    )


@pytest.mark.parametrize(
    ("factor", "code"), [(1.049, 0), (0.951, 0), (1.051, 1), (0.949, 1), (0.1, 1), (float("nan"), 1)]
)
def test_the_limit_on_relative_error_holds_both_ways(tmp_path, factor, code):
    """A loss far below the reference's is no agreement either, though the seed's signed means pass it."""
    reference = write_metrics(tmp_path / "a.jsonl", curve(range(1, 30)))
    assert run(reference, write_metrics(tmp_path / "b.jsonl", curve(range(1, 30), factor))) == code


def test_a_small_absolute_error_is_enough(tmp_path):
    reference = write_metrics(tmp_path / "a.jsonl", {1: 0.001, 2: 0.0})
    assert run(reference, write_metrics(tmp_path / "b.jsonl", {1: 0.0012, 2: 0.0002})) == 0
    assert run(reference, write_metrics(tmp_path / "b.jsonl", {1: 0.0013, 2: 0.0002})) == 1


def test_steps_between_are_interpolated(tmp_path, capsys):
    """open_clip logs steps 1, 101, 201, …, a run of ours 100, 200, …"""
    straight = {step: 10 - step / 50 for step in range(1, 400)}
    reference = write_open_clip(tmp_path / "out.log", {step: straight[step] for step in (1, 101, 201, 301)}, 400)
    candidate = write_metrics(tmp_path / "b.jsonl", {step: straight[step] for step in (100, 200, 300)})
    assert run(reference, candidate) == 0
    output = capsys.readouterr().out
    assert printed(output)["MeanAbsoluteError"] < 1e-5
    assert "compared at 2 steps, 101 to 201; 0 of them logged by both" in output


def test_folders_and_resumed_runs(tmp_path):
    """Of a step logged twice the last counts; a line that is still being written does not."""
    folder = tmp_path / "run"
    folder.mkdir()
    path = write_metrics(folder / "metrics.jsonl", {1: 3.0, 2: 9.0})
    with path.open("a") as file:
        file.write('{"step": 2, "loss": 2.5}\n{"step": 3, "lo')
    assert compare_losses.read_losses(folder) == {1: 3.0, 2: 2.5}
    (tmp_path / "reference").mkdir()
    write_open_clip(tmp_path / "reference" / "out.log", {1: 3.0, 2: 2.5})
    assert compare_losses.read_losses(tmp_path / "reference") == {1: 3.0, 2: 2.5}


def test_reads_what_open_clip_train_writes(tmp_path, caplog):
    """Their own training loop on a model of one parameter, two epochs, logging every third step."""
    train = pytest.importorskip("open_clip_train.train")
    batches, batch, losses = 7, 4, []
    dataloader = [(torch.randn(batch, 3), torch.randn(batch, 3))] * batches
    data = SimpleNamespace(dataloader=Batches(dataloader, batches, batches * batch + 2), set_epoch=lambda epoch: None)
    model = OneParameter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    args = SimpleNamespace(
        device="cpu", precision="fp32", distill=False, accum_freq=1, skip_scheduler=False, grad_clip_norm=None,
        horovod=False, log_every_n_steps=3, world_size=1, batch_size=batch, rank=0, local_rank=0, wandb=False,
    )  # fmt: skip

    def loss(logit_scale, output_dict):
        losses.append(logit_scale.item())
        return {"contrastive_loss": logit_scale * 1.0}

    with caplog.at_level(logging.INFO):
        for epoch in range(2):
            train.train_one_epoch(model, {"train": data}, loss, epoch, optimizer, None, lambda step: None, None, args)
    (tmp_path / "out.log").write_text("\n".join(caplog.messages))
    found = compare_losses.read_losses(tmp_path / "out.log")
    assert list(found) == [1, 4, 7, 8, 11, 14]
    assert list(found.values()) == pytest.approx([losses[step - 1] for step in found], rel=1e-4)


class Batches(list):
    """A list of batches with what open_clip_train asks of a loader."""

    def __init__(self, batches, num_batches, num_samples):
        super().__init__(batches)
        self.num_batches, self.num_samples = num_batches, num_samples


class OneParameter(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.logit_scale = torch.nn.Parameter(torch.tensor(3.0))

    def forward(self, images, texts):
        return {"logit_scale": self.logit_scale.clone()}


def test_plot(tmp_path, monkeypatch, capsys):
    reference = write_metrics(tmp_path / "a.jsonl", curve(range(1, 100)))
    candidate = write_metrics(tmp_path / "b.jsonl", curve(range(1, 100), 1.02))
    assert run(reference, candidate, "--plot", tmp_path / "plot.png") == 0
    assert Image.open(tmp_path / "plot.png").size == (1080, 720)
    assert not list(tmp_path.glob("*.part"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    capsys.readouterr()
    assert run(reference, candidate, "--plot", tmp_path / "plot.png") == 2
    assert "--plot needs matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("", "has no logged loss"),
        ("some other log\n", "has no logged loss"),
        ('{"event": "unfreeze", "step": 3}\n', "has no logged loss"),
        ('{"step": 1, "loss": 2}\n{"step": 2, "lo\n{"step": 3, "loss": 2}\n', "line 2 is not an object"),
        ('{"step": 1, "loss": "high"}\n', "line 1 is not an object"),
        ("Train Epoch: 0 [ 640/900 (1%)] Loss: 1 (1)\nTrain Epoch: 0 [ 700/900 (2%)] Loss: 1 (1)\n", "start cut off"),
        ("Train Epoch: 0 [ 640/900 (1%)] Loss: high (1)\n", "loss 'high' is not a number"),
        ('{"step": 900, "loss": 2.0}\n', "no step in common: the reference has steps 900 to 900, the run 1 to 9"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, capsys, text, message):
    candidate = write_metrics(tmp_path / "run.jsonl", curve(range(1, 10)))
    if text is not None:
        (tmp_path / "reference").write_text(text)
    assert run(tmp_path / "reference", candidate) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("compare_losses: ") and error.count("\n") == 1


def test_an_empty_folder_says_what_it_lacks(tmp_path, capsys):
    assert run(tmp_path, tmp_path) == 2
    assert "holds neither metrics.jsonl nor out.log" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("losses", "first"),
    [
        (lambda step: 2 * curve([step])[step], "batch.global, for the losses differ from the first compared step 1 on"),
        (
            lambda step: curve([step])[step] * (1.2 if step > 60 else 1.0),
            "optim.lr and optim.warmup_steps, for the losses agree until step 60",
        ),
        (lambda step: math.nan if step > 40 else curve([step])[step], "optim.clip_grad_norm, the run's loss is not"),
    ],
)
def test_a_fail_says_what_to_look_at_first(tmp_path, capsys, losses, first):
    steps = range(1, 101)
    for name, values in (("reference", curve(steps)), ("run", {step: losses(step) for step in steps})):
        rows = [{"step": step, "loss": loss} for step, loss in values.items()]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8-sig")
    assert compare_losses.main([str(tmp_path / "reference"), str(tmp_path / "run")]) == 1
    advice = capsys.readouterr().out.splitlines()[-1]
    assert advice.startswith("look first at: ") and first in advice
    assert compare_losses.main([str(tmp_path / "reference"), str(tmp_path / "reference")]) == 0
    assert "look first" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["pipe", "x" * 5000])
def test_a_pipe_and_a_name_too_long_are_refused_at_once(tmp_path, name, capsys):
    os.mkfifo(tmp_path / "pipe")
    assert compare_losses.main([str(tmp_path / name), str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
