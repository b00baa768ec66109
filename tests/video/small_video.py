"""A video run small enough for tests: 12 two-tone clips in a frame store, a tiny student, a tiny X-CLIP teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from safetensors.torch import save_file

from convclip.video.xclip_teacher import XClipSize, XClipTeacher

FRAMES, WORDS, SIDE = 4, 8, 32
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (240, 240, 240)}
RECIPE = """
epochs: 3
seed: 1
model:
  embed_dim: 64
  image: {backbone: test_convnext, head: average_linear, image_size: 32}
  text: {width: 64, heads: 2, layers: 2, context_length: 16}
data: {workers: 0}
batch: {global: 6}
optim: {lr: 1e-3, warmup_share: 0.1, clip_grad_norm: 1.0, part_lr_scale: {image: 0.1, text: 0.1, aggregation: 10}}
video: {frames: 4, words: 8, temporal_layers: 1, temporal_init: identity}
evaluation: {batch: 16}
log_every: 1
checkpoint: {keep_last: 10}
"""
SIZE = XClipSize(
    embed_dim=64,
    image_size=SIDE,
    patch_size=16,
    vision_width=64,
    vision_layers=1,
    text_width=64,
    text_layers=1,
    context_length=20,
    vocab_size=49408,
    temporal_layers=1,
    frame_positions=10,
    frames=FRAMES,
    words=WORDS,
)


def write_clip(path: Path, seconds: int, first: tuple[int, ...], second: tuple[int, ...]) -> None:
    """One frame a second: the upper half `first`, the lower half `second`."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=1)
        stream.width = stream.height = SIDE
        for _ in range(seconds):
            pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
            pixels[: SIDE // 2], pixels[SIDE // 2 :] = first, second
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode())


def make_files(folder: Path) -> Path:
    """Videos, annotations, split CSVs, recipe and a teacher's checkpoint; returns the folder."""
    (folder / "videos").mkdir()
    pairs = [(a, b) for a in COLOURS for b in COLOURS if a != b]
    sentences = []
    for number, (a, b) in enumerate(pairs):
        write_clip(folder / "videos" / f"video{number}.mp4", 1 + number % 6, COLOURS[a], COLOURS[b])
        for k, text in enumerate((f"{a} above {b}", f"{b} under a long and wide field of {a}")):
            sentences.append({"sen_id": 100 + 2 * number + k, "video_id": f"video{number}", "caption": text})
    (folder / "data.json").write_text(json.dumps({"videos": [], "sentences": sentences}))
    ids = [f"video{number}" for number in range(12)]
    (folder / "train.csv").write_text("\n".join(["video_id", *ids]))
    rows = [f"ret{number},msr{number},video{number},{a} above {b}" for number, (a, b) in enumerate(pairs[:9])]
    (folder / "test.csv").write_text("\n".join(["key,vid_key,video_id,sentence", *rows]))
    (folder / "small.yaml").write_text(RECIPE)
    torch.manual_seed(3)
    teacher = XClipTeacher(SIZE)
    tensors = {name: value.contiguous() for name, value in teacher.state_dict().items()}
    save_file(tensors, folder / "teacher.safetensors")
    return folder


def with_stores(folder: Path) -> Path:
    """As make_files, with the frame store and the teacher's features, made in this process."""
    from convclip.config import load_recipe
    from convclip.run import open_task
    from convclip.video.frame_store import FrameSettings, write_frame_store
    from convclip.video.msrvtt import find_videos

    make_files(folder)
    videos = find_videos(folder / "videos", [f"video{number}" for number in range(12)])
    write_frame_store(videos, folder / "frames", FrameSettings(SIDE, FRAMES))
    recipe = load_recipe(folder / "small.yaml", overrides(folder, teachers=False))
    open_task(recipe).extract_teacher(folder / "teacher.h5", str(folder / "teacher.safetensors"), "fp32")
    return folder


def overrides(folder: Path, teachers: bool = True, val: bool = True) -> list[str]:
    """--set values that name the data."""
    data = [
        f"data.train={folder / 'train.csv'}",
        f"video.annotations={folder / 'data.json'}",
        f"video.frame_store={folder / 'frames'}",
    ]
    data += [f"data.val={folder / 'test.csv'}"] if val else []
    return data + ([f"video.teachers=[{folder / 'teacher.h5'}]"] if teachers else [])


def train_here(
    files: str, output: str, more: tuple[str, ...] = (), stage: int = 0, resume: str = "never", guard: Any = None
) -> Any:
    """Train in this process group; the summary."""
    from convclip.config import load_recipe
    from convclip.run import train_recipe
    from tests.conftest import REPOSITORY

    recipe = load_recipe(Path(files) / "small.yaml", [*overrides(Path(files)), *more])
    ds_config = REPOSITORY / "ds_configs" / f"zero{stage}_fp32.json"
    return train_recipe(recipe, ds_config, Path(output), resume, guard=guard)
