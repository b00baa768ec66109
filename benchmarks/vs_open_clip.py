"""A training step of convclip beside one of open_clip_train, on CPU: samples/s and peak memory.

    python benchmarks/vs_open_clip.py [--images /data/flickr8k] [--batch 16] [--threads 1] [--rounds 3] [--quick]

The model on both sides is convnextv2_tiny with an attention pool (open_clip: timm_pool abs_attn), its trunk locked, and
CLIP's text tower 512 wide; random weights. convclip runs as users run it (`deepspeed launch/train.py`), open_clip_train
as `open_clip_train.main` behind a line that adds the model's configuration. Both read one CSV with one batch size,
thread count and number of data workers, log every step and save nothing. Runs take turns, each in its own processes; a
ratio is the median over rounds. Rates come from each run's own log after its first steps, memory is the training
process's VmHWM at the last step (data workers and launcher apart). CPU time is that of the training process too: with
one thread it stands for the rate on a machine that others use as well. open_clip_train needs pandas: name another
Python that has it with --open_clip_python where this one has not.
"""

from __future__ import annotations

import argparse
import collections
import csv
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from data_stream import make_pictures

from convclip.config import load_recipe
from convclip.data.coco import read_coco

REPOSITORY = Path(__file__).resolve().parent.parent
RECIPE = "tiny_cliptext_unfreeze"
# What convclip's precision is compared with. pure_bf16 computes alike (weights and activations in bf16) but has no
# fp32 masters and Adam state; amp_bf16 has those, and computes from fp32 weights by autocast.
PRECISIONS = {"fp32": ["fp32"], "bf16": ["pure_bf16", "amp_bf16"]}
OPEN_CLIP = "import sys, open_clip; from open_clip_train.main import main; open_clip.add_model_config(sys.argv[1]); "
OPEN_CLIP += "main(sys.argv[2:])"
OUR_STEP = re.compile(r" step (\d+)/\d+ epoch ")
THEIR_STEP = re.compile(r"Train Epoch: .* ([0-9.e+]+)/s, ")
MODEL = {
    "embed_dim": 512,
    "vision_cfg": {
        "timm_model_name": "convnextv2_tiny",
        "timm_model_pretrained": False,
        "timm_pool": "abs_attn",
        "timm_proj": "",
        "image_size": 224,
    },
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
}


@dataclass
class Figures:
    """One run: samples/s, and of its training process CPU seconds per sample; peak memory in MiB."""

    rate: float
    cpu: float
    memory: float
    workers: float
    launcher: float

    def __str__(self) -> str:
        return (
            f"{self.rate:.2f} samples/s, {self.cpu * 1000:.0f} ms CPU per sample, peak {self.memory:.0f} MiB "
            f"(data workers' own {self.workers:.0f} MiB, launcher {self.launcher:.0f} MiB)"
        )


@dataclass
class Setting:
    """What all runs share."""

    table: Path
    scratch: Path
    batch: int
    steps: int
    skip: int
    threads: int
    workers: int
    zero: int
    open_clip_python: str


def write_table(path: Path, images: Path | None, rows: int, long_captions: bool) -> None:
    """A CSV of `rows` (filepath, title): images of a COCO layout, or pictures made here; captions of usual length."""
    if images is not None:
        entries = read_coco(images / "annotations" / "captions_train.json")
        pairs = [(images / "train" / entry.file_name, entry.captions[0]) for entry in entries]
    else:
        make_pictures(path.parent)
        generator = np.random.default_rng(0)
        words = ["a", "man", "dog", "red", "on", "the", "board", "street", "with", "two", "small", "riding"]
        files = sorted(path.parent.glob("*.jpg"))
        lengths = generator.integers(8, 15, len(files))
        pairs = [(file, " ".join(generator.choice(words, k))) for file, k in zip(files, lengths, strict=True)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("filepath", "title"))
        for picture, caption in itertools.islice(itertools.cycle(pairs), rows):
            writer.writerow((picture, " ".join([caption] * 12) if long_captions else caption))


def our_command(setting: Setting, precision: str, folder: Path) -> list[str]:
    """convclip through the deepspeed launcher."""
    overrides = {
        "model.image.pretrained": "null",
        "freezing.unfreeze": "[]",
        "optim.warmup_steps": 0,
        "epochs": 1,
        "batch.global": setting.batch,
        "data.workers": setting.workers,
        "log_every": 1,
        "checkpoint.every_epochs": 0,
    }
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "1", "launch/train.py"]
    config = f"ds_configs/zero{setting.zero}_{precision}.json"
    names = ["--ds_config", config, "--recipe", RECIPE, "--train_data", str(setting.table), "--output_dir", str(folder)]
    return [*launcher, *names, *(part for key, value in overrides.items() for part in ("--set", f"{key}={value}"))]


def their_command(setting: Setting, precision: str, folder: Path) -> list[str]:
    """open_clip_train with the recipe's optimizer and normalisation."""
    recipe = load_recipe(RECIPE)
    model = folder / "convclip-bench.json"
    folder.mkdir()
    model.write_text(json.dumps(MODEL))
    options = {
        "model": model.stem,
        "device": "cpu",
        "precision": precision,
        "train-data": setting.table,
        "dataset-type": "csv",
        "csv-separator": ",",
        "batch-size": setting.batch,
        "workers": setting.workers,
        "epochs": 1,
        "lr": recipe.optim.lr,
        "beta1": recipe.optim.betas[0],
        "beta2": recipe.optim.betas[1],
        "eps": recipe.optim.eps,
        "wd": recipe.optim.weight_decay,
        "warmup": 0,
        "log-every-n-steps": 1,
        "logs": "none",
    }
    flags = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    flags += ["--image-mean", *map(str, recipe.model.image.mean), "--image-std", *map(str, recipe.model.image.std)]
    return [setting.open_clip_python, "-c", OPEN_CLIP, str(model), *flags, "--lock-image"]


def run(command: list[str], cwd: Path, step: re.Pattern[str], setting: Setting) -> tuple[Figures, list[str]]:
    """Run to the end and measure at its steps' log lines; (figures without a rate, what the step lines captured)."""
    env = {**os.environ, "OMP_NUM_THREADS": str(setting.threads), "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    env |= {"HF_HUB_OFFLINE": "1", "PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}
    child = subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    captured: list[str] = []
    tail: collections.deque[str] = collections.deque(maxlen=25)
    started, workers, figures = 0.0, 0.0, None
    assert child.stdout is not None
    for line in child.stdout:
        tail.append(line)
        found = step.search(line)
        if not found:
            continue
        captured.append(found[1])
        if len(captured) == setting.skip:
            process = trainer(child.pid)
            # While they still decode; near the end they are gone.
            started, workers = cpu_seconds(process), private(process.children(recursive=True))
        if len(captured) == setting.steps:
            cpu = (cpu_seconds(process) - started) / (setting.batch * (setting.steps - setting.skip))
            launcher = sum(peak(member) for member in family(child.pid) if member in process.parents())
            figures = Figures(0.0, cpu, peak(process), workers, launcher)
    if child.wait() or figures is None:
        sys.exit(f"exit code {child.returncode} after {len(captured)} steps:\n{' '.join(command)}\n{''.join(tail)}")
    return figures, captured


def trainer(root: int) -> psutil.Process:
    """The training process: the largest of the family; its parents are launchers, its children data workers."""
    return max(family(root), key=peak)


def family(root: int) -> list[psutil.Process]:
    """A process and all its descendants."""
    process = psutil.Process(root)
    return [process, *process.children(recursive=True)]


def cpu_seconds(process: psutil.Process) -> float:
    """User and system time of all its threads."""
    times = process.cpu_times()
    return times.user + times.system


def peak(process: psutil.Process) -> float:
    """VmHWM in MiB; 0 for a process that is gone."""
    try:
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
    except OSError:
        return 0.0
    return int(found[1]) / 1024 if found else 0.0


def private(processes: list[psutil.Process]) -> float:
    """MiB that the processes share with no other."""
    return sum(process.memory_full_info().uss for process in processes) / 2**20


def measure_ours(setting: Setting, precision: str, folder: Path) -> Figures:
    """One run of convclip."""
    figures, _ = run(our_command(setting, precision, folder), REPOSITORY, OUR_STEP, setting)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figures.rate = statistics.harmonic_mean(row["samples_per_s"] for row in rows[setting.skip : setting.steps])
    return figures


def measure_theirs(setting: Setting, precision: str, folder: Path) -> Figures:
    """One run of open_clip_train."""
    figures, rates = run(their_command(setting, precision, folder), folder, THEIR_STEP, setting)
    figures.rate = statistics.harmonic_mean(map(float, rates[setting.skip : setting.steps]))
    return figures


def compare(setting: Setting, precision: str, rounds: int) -> None:
    """Runs in turns, then one line for each of open_clip_train's precisions."""
    ours: list[Figures] = []
    theirs: dict[str, list[Figures]] = {name: [] for name in PRECISIONS[precision]}
    for number in range(rounds):
        folder = setting.scratch / f"{precision}-{number}"
        ours.append(measure_ours(setting, precision, folder))
        print(f"  convclip {precision}: {ours[-1]}", flush=True)
        for name, figures in theirs.items():
            figures.append(measure_theirs(setting, name, folder.with_name(f"{name}-{number}-open_clip")))
            print(f"  open_clip_train {name}: {figures[-1]}", flush=True)
    for name, figures in theirs.items():
        report(f"{precision} against open_clip_train {name}", ours, figures)


def report(title: str, ours: list[Figures], theirs: list[Figures]) -> None:
    """The ratios beside their targets."""

    def line(field: str) -> tuple[float, float, float]:
        pairs = [(getattr(a, field), getattr(b, field)) for a, b in zip(ours, theirs, strict=True)]
        first, second = (statistics.median(column) for column in zip(*pairs, strict=True))
        return statistics.median(a / b for a, b in pairs), first, second

    rate, cpu, peaks = line("rate"), line("cpu"), line("memory")
    print(
        f"{title}: samples/s {rate[0]:.2f}x ({rate[1]:.2f} / {rate[2]:.2f}, target >= 1.0x), "
        f"peak memory {peaks[0]:.2f}x ({peaks[1]:.0f} / {peaks[2]:.0f} MiB, target <= 1.0x), "
        f"CPU time per sample {cpu[0]:.2f}x",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="folder with train/ and annotations/captions_train.json")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20, help="steps of a run")
    parser.add_argument("--skip", type=int, default=4, help="first steps that do not count")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--precision", choices=PRECISIONS, help="one instead of both")
    parser.add_argument("--zero", type=int, default=0, help="ZeRO stage; 0 and 2 have an fp32 and a bf16 ds_config")
    parser.add_argument("--long_captions", action="store_true", help="captions fill all 77 tokens: nothing to cut")
    parser.add_argument("--quick", action="store_true", help="one round of 8 steps")
    parser.add_argument("--open_clip_python", default=sys.executable, metavar="PYTHON")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.skip, args.rounds = 8, 3, 1
    if not 0 < args.skip < args.steps:
        parser.error("--skip must be at least 1 and less than --steps")
    check = subprocess.run([args.open_clip_python, "-c", "import open_clip_train.data"], capture_output=True, text=True)
    if check.returncode:
        parser.error(f"open_clip_train does not run ({check.stderr.strip().splitlines()[-1]}): see --open_clip_python")
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        table = scratch / "train.csv"
        # One step more than is measured, so that the process is there to be looked at.
        write_table(table, args.images, args.batch * (args.steps + 1), args.long_captions)
        shared = (args.batch, args.steps, args.skip, args.threads, args.workers, args.zero, args.open_clip_python)
        setting = Setting(table, scratch, *shared)
        print(f"torch {torch.__version__}, batch {args.batch}, {args.threads} threads, ZeRO {args.zero}")
        for precision in [args.precision] if args.precision else PRECISIONS:
            compare(setting, precision, args.rounds)


if __name__ == "__main__":
    main()
