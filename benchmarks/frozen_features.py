"""base_absattn_distill_frozen at full model size: from the feature store, live, and by open_clip_train.

    python benchmarks/frozen_features.py [--images /data/flickr8k] [--count 32] [--batch 32] [--live_steps 3]

Student convnext_base at 224 px with a new attention pool, teacher convnext_base_w at its own 256 px, both from one
checkpoint of random weights that the script writes; real pictures and captions in a CSV file. All runs are fp32,
ZeRO 2, one process, and share thread count and batch. Extraction is timed from the first picture to the finished file,
without building the models. Rates are medians over steps after the first, the split is of the trainer's own steps; CPU
time of a step is the process's own, which other work on the machine disturbs less than wall time. --skip_live leaves
out what takes longest. A live teacher counts as read.
open_clip_train runs as itself behind a line that adds the model's configuration; its teacher sees the student's 224 px,
which is less work. It needs pandas: name a Python that has it with --open_clip_python, else it is left out.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import open_clip
import torch

from convclip import run as engine_run
from convclip.config import load_recipe
from convclip.data.coco import read_coco
from convclip.engine.inputs import ImageTextSource
from convclip.engine.objective import ImageTextObjective
from convclip.engine.stored.extraction import Extraction
from convclip.engine.task import ImageTextTask
from convclip.engine.trainer import Trainer
from convclip.engine.zero.launcher import start_processes
from convclip.schema import Recipe

REPOSITORY = Path(__file__).resolve().parent.parent
RECIPE, TEACHER = "base_absattn_distill_frozen", "convnext_base_w"
DS_CONFIG = REPOSITORY / "ds_configs" / "zero2_fp32.json"
SPLIT = ("read", "towers", "loss", "backward", "optimizer")
THEIR_STEP = re.compile(r"Train Epoch: .* ([0-9.e+]+)/s, ")
OPEN_CLIP = "import sys, open_clip; from open_clip_train.main import main; open_clip.add_model_config(sys.argv[1]); "
OPEN_CLIP += "main(sys.argv[2:])"
STUDENT = {
    "embed_dim": 640,
    "vision_cfg": {
        "timm_model_name": "convnext_base",
        "timm_model_pretrained": False,
        "timm_pool": "abs_attn",
        "timm_proj": "",
        "image_size": 224,
    },
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 640, "heads": 10, "layers": 12},
}

spent: dict[str, list[float]] = defaultdict(list)


def timed(name: str, function: Callable) -> Callable:
    """`function`, its seconds added to `spent`, and its CPU seconds under `<name> cpu`."""

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        start, cpu = time.perf_counter(), time.process_time()
        result = function(*arguments, **named)
        spent[name].append(time.perf_counter() - start)
        spent[f"{name} cpu"].append(time.process_time() - cpu)
        return result

    return call


def watch_steps() -> None:
    """Time the parts of the trainer's steps. `towers` live are both whole towers, from the store the head alone."""
    ImageTextSource.inputs = timed("read", ImageTextSource.inputs)
    ImageTextObjective.__call__ = timed("loss", ImageTextObjective.__call__)
    engine = deepspeed.DeepSpeedEngine
    engine.forward, engine.backward = timed("towers", engine.forward), timed("backward", engine.backward)
    engine.step = timed("optimizer", engine.step)
    Trainer._train_step = timed("step", Trainer._train_step)
    Extraction.compute = rows_only(Extraction.compute)


def rows_only(compute: Callable) -> Callable:
    """`Extraction.compute` with the seconds from its first call to its last batch in `spent`."""

    def call(*arguments: Any) -> Iterator:
        start = time.perf_counter()
        yield from compute(*arguments)
        spent["extraction"].append(time.perf_counter() - start)

    return call


def write_table(path: Path, images: Path, count: int) -> int:
    """A CSV of (filepath, title) of the first `count` pictures with all their captions; number of rows."""
    entries = read_coco(images / "annotations" / "captions_train.json")
    rows = []
    for entry in entries:
        picture = images / "train" / entry.file_name
        if picture.is_file() and count:
            rows += [(picture, caption) for caption in entry.captions]
            count -= 1
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("filepath", "title"), *rows])
    return len(rows)


def make_recipe(folder: Path, batch: int, steps: int, *more: str) -> Recipe:
    """The recipe on the benchmark's data and weights."""
    weights = folder / "teacher.pt"
    overrides = [f"model.pretrained={weights}", f"data.train={folder / 'train.csv'}", f"batch.global={batch}"]
    overrides += [f"max_steps={steps}", "data.workers=1", "log_every=1", "checkpoint.every_epochs=0"]
    overrides += ["optim.warmup_steps=0", "evaluation.batch=16"]
    if not any(override.startswith("teacher=") for override in more):
        overrides.append(f"teacher.pretrained={weights}")
    return load_recipe(RECIPE, [*overrides, *more])


def measure(recipe: Recipe, folder: Path) -> dict[str, float]:
    """Train; medians over the steps after the first: seconds of a step and of its parts, samples/s."""
    spent.clear()
    engine_run.train_recipe(recipe, DS_CONFIG, folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figures = {name: statistics.median(spent[name][1:]) for name in SPLIT}
    figures["step"] = statistics.median(row["step_seconds"] for row in rows[1:])
    figures["cpu"] = statistics.median(spent["step cpu"][1:])
    figures["rate"] = recipe.batch.global_ / figures["step"]
    figures["loss_value"] = rows[1]["loss"]
    return figures


def describe(name: str, figures: dict[str, float]) -> None:
    """One line with the split."""
    parts = ", ".join(f"{part} {1000 * figures[part]:.1f}" for part in SPLIT)
    print(
        f"{name}: {figures['rate']:.2f} samples/s, step {1000 * figures['step']:.1f} ms ({parts} ms), "
        f"CPU time {1000 * figures['cpu']:.1f} ms, "
        f"loss of step 2 {figures['loss_value']:.6f}",
        flush=True,
    )


def measure_open_clip(python: str, folder: Path, batch: int, steps: int) -> float | None:
    """Samples/s of open_clip_train on the same work; None where it does not run."""
    model = folder / "convclip-student.json"
    model.write_text(json.dumps(STUDENT))
    options = {"model": model.stem, "device": "cpu", "precision": "fp32", "train-data": folder / "train.csv"}
    options |= {"dataset-type": "csv", "csv-separator": ",", "batch-size": batch, "workers": 1, "epochs": 1}
    options |= {"lr": 5e-4, "warmup": 0, "log-every-n-steps": 1, "logs": "none", "distill-model": TEACHER}
    options |= {"distill-pretrained": folder / "teacher.pt"}
    flags = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    command = [
        python,
        "-c",
        OPEN_CLIP,
        str(model),
        *flags,
        "--lock-image",
        "--lock-text",
        "--lock-text-freeze-layer-norm",
    ]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    child = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert child.stdout is not None
    rates: list[float] = []
    tail: list[str] = []
    for line in child.stdout:
        tail = [*tail[-9:], line]
        if found := THEIR_STEP.search(line):
            rates.append(float(found[1]))
        if len(rates) == steps:
            child.kill()
            break
    child.wait()
    if len(rates) < 2:
        print(f"open_clip_train did not run: {''.join(tail)}", flush=True)
        return None
    return statistics.median(rates[1:])


def take_step(trainer: Trainer, batches: Iterator) -> None:
    """One step of a trainer whose `fit` is left out."""
    trainer._train_step(batches)
    trainer.state.step += 1


def compare_steps(folder: Path, store: Path, batch: int, steps: int) -> tuple[float, float]:
    """Steps of the student with its teacher from the store over steps without one, in turn: wall and CPU time."""
    trainers: list[Trainer] = []
    teachers: tuple[list[str], ...] = ([], ["teacher=null"])
    # Each run is built and its trainer kept; its steps are taken here.
    with mock.patch.object(Trainer, "fit", lambda trainer: trainers.append(trainer)):
        for number, teacher in enumerate(teachers):
            recipe = make_recipe(folder, batch, steps, f"features={store}", "data.workers=0", *teacher)
            engine_run.train_recipe(recipe, DS_CONFIG, folder / f"pair{number}")
    streams = [trainer._batches() for trainer in trainers]
    for trainer, stream in zip(trainers, streams, strict=True):
        take_step(trainer, stream)
    spent.clear()
    for number in range(steps):
        # Who goes first changes, so that neither always finds the caches as the other left them.
        for which in (0, 1) if number % 2 else (1, 0):
            spent.pop("step", None), spent.pop("step cpu", None)
            take_step(trainers[which], streams[which])
            for name in ("step", "step cpu"):
                spent[f"{which} {name}"] += spent[name]
    wall, cpu = (
        statistics.median(spent[f"0 {name}"]) / statistics.median(spent[f"1 {name}"]) for name in ("step", "step cpu")
    )
    return wall, cpu


def compare(folder: Path, arguments: argparse.Namespace, rows: int) -> None:
    """Extraction, runs from the store, live, open_clip_train; figures beside their targets."""
    batch, store = arguments.batch, folder / "store.h5"
    views = "features.views=1"
    spent.clear()
    ImageTextTask(make_recipe(folder, batch, 1, views)).extract(store, torch.float32)
    extraction = sum(spent["extraction"])
    print(f"extraction: {extraction:.1f} s, {store.stat().st_size / 2**20:.1f} MiB", flush=True)
    stored = measure(make_recipe(folder, batch, arguments.steps, f"features={store}"), folder / "stored")
    describe("  from the store", stored)
    wall, cpu = compare_steps(folder, store, batch, arguments.steps)
    print(f"step, teacher from the store against student alone: {wall:.3f}x in wall time, {cpu:.3f}x in CPU time "
          "(target <= 1.03x)", flush=True)  # fmt: skip
    if not arguments.skip_live:
        compare_live(folder, arguments, rows, extraction, stored)


def compare_live(folder: Path, arguments: argparse.Namespace, rows: int, extraction: float, stored: dict) -> None:
    """The same work live and by open_clip_train against the runs from the store."""
    batch = arguments.batch
    live = measure(make_recipe(folder, batch, arguments.live_steps, "features.views=1"), folder / "live")
    describe("  live", live)
    theirs = measure_open_clip(arguments.open_clip_python, folder, batch, arguments.live_steps)
    rate = stored["rate"]
    print(f"step live against from the store: {live['cpu'] / stored['cpu']:.1f}x in CPU time")
    print(f"store against live: {rate / live['rate']:.1f}x ({rate:.2f} / {live['rate']:.3f} samples/s, target >= 25x)")
    if theirs is not None:
        print(f"store against open_clip_train: {rate / theirs:.1f}x ({rate:.2f} / {theirs:.3f} samples/s)")
    epoch_live, epoch_stored = rows / live["rate"], rows / rate
    epochs = extraction / (epoch_live - epoch_stored)
    print(
        f"extraction pays off after {epochs:.2f} epochs: {extraction:.1f} s once and {epoch_stored:.1f} s an epoch "
        f"against {epoch_live:.1f} s (target <= 2)"
    )


def main() -> None:
    """Write weights and table, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="with train/ and annotations/captions_train.json")
    parser.add_argument("--count", type=int, default=32, help="pictures, each with all its captions")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20, help="steps of a run from the store")
    parser.add_argument("--live_steps", type=int, default=3)
    parser.add_argument("--skip_live", action="store_true")
    parser.add_argument("--open_clip_python", default=sys.executable, metavar="PYTHON")
    arguments = parser.parse_args()
    start_processes()
    watch_steps()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        torch.manual_seed(0)
        torch.save(open_clip.create_model(TEACHER, pretrained=None).state_dict(), folder / "teacher.pt")
        rows = write_table(folder / "train.csv", arguments.images, arguments.count)
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.count} pictures, {rows} rows")
        compare(folder, arguments, rows)


if __name__ == "__main__":
    main()
