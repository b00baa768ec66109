"""Video distillation at full model size: teacher stored or live, student trained, locked, or from its own store.

    python benchmarks/video_distill.py [--data ../shared/data/msrvtt] [--clips 48] [--batch 8] [--frames 12]
        [--steps 5] [--threads 2] [--quick]

Student convnext_base with TeachCLIP's head at 224 px, teacher X-CLIP ViT-B/32, both of random weights, fp32; real clips
and captions. Every way to train runs in a process of its own: the recipe's own loader, inputs, losses, AdamW, no
DeepSpeed. Rates are medians over steps after the first; CPU time is the process's own, which other work on the machine
disturbs less than wall time. Memory is the peak of the process (resident, or the accelerator's). --quick: 2 pairs of
3 frames and one step, to see that it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from convclip.config import load_recipe
from convclip.schema import Recipe
from convclip.video.decode import read_clip
from convclip.video.frame_store import FrameStore
from convclip.video.msrvtt import find_videos, read_video_ids
from convclip.video.xclip_teacher import XClipSize, XClipTeacher

REPOSITORY = Path(__file__).resolve().parent.parent
# name: (locked, teacher, the student's own features)
MODES = {
    "trained, teacher live": (False, "teacher.safetensors", False),
    "trained, teacher stored": (False, "teacher.h5", False),
    "locked, teacher live": (True, "teacher.safetensors", False),
    "locked, teacher stored": (True, "teacher.h5", False),
    "locked, all stored": (True, "teacher.h5", True),
}
GOALS = [
    ("trained: teacher stored / live", "trained, teacher stored", "trained, teacher live", 1.07),
    ("locked: teacher stored / live", "locked, teacher stored", "locked, teacher live", 1.22),
    ("locked: all stored / live", "locked, all stored", "locked, teacher live", 100),
]


def settings(folder: Path, options: argparse.Namespace) -> list[str]:
    """Recipe values that all runs share: random weights, these clips."""
    return [
        "model.pretrained=null",
        "video.temporal_init=identity",
        "data.workers=0",
        "evaluation.batch=24",
        f"video.annotations={options.data / 'Annotations' / 'MSRVTT_data.json'}",
        f"video.frame_store={folder / 'frames'}",
        f"video.frames={options.frames}",
    ]


def recipe_of(folder: Path, options: argparse.Namespace, mode: str) -> Recipe:
    """The released recipe for a way to train."""
    locked, teacher, _ = MODES[mode]
    data = [f"data.train={folder / 'clips.csv'}", f"batch.global={options.batch}"]
    values = [*settings(folder, options), *data, f"video.teachers=[{folder / teacher}]"]
    return load_recipe("teachclip_msrvtt7k_frozen" if locked else "teachclip_msrvtt7k", values)


def run_mode(mode: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Train some steps; seconds of a step (wall and CPU) and peak memory in GiB."""
    from convclip.devices import current_device, memory_gib
    from convclip.engine.stages.groups import training_stages
    from convclip.models.dual_tower import INPUT
    from convclip.run import open_task

    torch.set_num_threads(options.threads)
    device, recipe = current_device(), recipe_of(folder, options, mode)
    store = folder / "towers.h5" if MODES[mode][2] else None
    task = open_task(recipe)
    model = task.initial_model()[0]
    loader, source, objective = task.open(model, device, torch.float32, store)
    model = model.to(device)
    trainable = training_stages(model, recipe)[0].trainable
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    model.train()
    reads = source.reads(INPUT, trainable, 0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=True)
    wall, cpu = [], []
    steps = 1 + options.steps * (20 if store else 1)
    batches = (batch for epoch in range(10**6) for batch in loader.epoch(epoch, pixels=reads.pixels, text=reads.text))
    for _ in range(steps):
        started, used = time.perf_counter(), time.process_time()
        inputs = source.inputs(next(batches), 0, reads)
        loss = objective(model(*inputs.model_inputs()), [inputs], 0)["total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        wall.append(time.perf_counter() - started)
        cpu.append(time.process_time() - used)
    return {
        "wall": statistics.median(wall[1:]),
        "cpu": statistics.median(cpu[1:]),
        "gib": memory_gib(),
    }


def prepare(folder: Path, options: argparse.Namespace) -> None:
    """Clips decoded once, a random teacher, its features, and those of the student's locked towers."""
    names = read_video_ids(options.data / "Annotations" / "MSRVTT_train.7k.csv")[: options.clips]
    (folder / "clips.csv").write_text("\n".join(["video_id", *names]) + "\n")
    videos = find_videos(options.data / "VideoData", names)
    shards = tool("make_shards.py", "--kind", "video", "--videos", options.data / "VideoData", "--workers", 1)
    shards("--split_csv", folder / "clips.csv", "--output_dir", folder / "frames", "--frames", options.frames)
    started = time.perf_counter()
    decoded = sum(len(read_clip(path, 224, options.frames).frames) for path in videos.values())
    live = decoded / (time.perf_counter() - started)
    store = FrameStore(folder / "frames")
    started = time.perf_counter()
    read = sum(store[name][1] for name in store)
    stored = read / (time.perf_counter() - started)
    print(f"frames/s: live decoding {live:.0f}, frame store {stored:.0f}, ratio {stored / live:.1f}", flush=True)
    torch.manual_seed(0)
    teacher = XClipTeacher(XClipSize(frames=options.frames))
    save_file({n: v.contiguous() for n, v in teacher.state_dict().items()}, folder / "teacher.safetensors")
    size = sum(p.numel() for p in teacher.parameters()) * 4 / 2**30
    print(f"teacher: {size:.2f} GiB of fp32 parameters", flush=True)
    del teacher
    given = [f"--set={value}" for value in settings(folder, options)]
    extract = tool("extract_features.py", "--recipe", "teachclip_msrvtt7k_frozen", "--train_data", folder / "clips.csv")
    extract("--kind", "xclip", "--teacher", folder / "teacher.safetensors", "--output", folder / "teacher.h5", *given)
    extract("--kind", "towers", "--output", folder / "towers.h5", *given)


def tool(script: str, *first: object) -> Callable[..., None]:
    """A function that runs a tool of this repository with more arguments, quietly."""

    def call(*arguments: object) -> None:
        command = [sys.executable, str(REPOSITORY / "tools" / script), *map(str, [*first, *arguments])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        print("\n".join(line for line in done.stdout.splitlines() if "bytes" in line or "skipped" in line), flush=True)

    return call


def report(found: dict[str, dict[str, float]], batch: int) -> None:
    """The table, and the ratios beside their goals."""
    print(f"{'':<26}{'samples/s':>11}{'by CPU time':>13}{'peak GiB':>10}")
    for mode, row in found.items():
        print(f"{mode:<26}{batch / row['wall']:>11.3f}{batch / row['cpu']:>13.3f}{row['gib']:>10.2f}")
    for name, fast, slow, goal in GOALS:
        ratios = [found[slow][clock] / found[fast][clock] for clock in ("wall", "cpu")]
        memory = found[slow]["gib"] - found[fast]["gib"]
        print(f"{name:<32} {ratios[0]:.2f}x (CPU time {ratios[1]:.2f}x), goal {goal}x; {memory:+.2f} GiB saved")


def main() -> None:
    """Prepare in a temporary folder, then measure every mode in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data" / "msrvtt")
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--mode", choices=list(MODES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.clips, options.batch, options.frames, options.steps = 4, 2, 3, 1
    if options.mode:
        print(json.dumps(run_mode(options.mode, options.folder, options)))
        return
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), options)
        found = {}
        for mode in MODES:
            command = [sys.executable, *sys.argv, "--mode", mode, "--folder", name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stdout + done.stderr)
            found[mode] = json.loads(done.stdout.splitlines()[-1])
            print(f"{mode}: {found[mode]['wall']:.2f} s a step, {found[mode]['cpu']:.2f} s of CPU", flush=True)
        report(found, options.batch)


if __name__ == "__main__":
    main()
