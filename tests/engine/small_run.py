"""A run small enough for tests: 24 random pictures in three shards, a tiny ConvNeXt and a two-layer text tower."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import torch

from tests.conftest import REPOSITORY
from tests.data.makers import noise_jpeg, write_tar
from tests.processes import run_script

RECIPE = """
epochs: 4
model:
  embed_dim: 16
  image: {backbone: test_convnext, image_size: 32}
  text: {width: 32, heads: 2, layers: 2, context_length: 12}
data: {workers: 0, captions: one}
batch: {global: 4}
optim: {lr: 1e-3, warmup_steps: 2, clip_grad_norm: 1.0}
freezing:
  lock: [image, text]
  unfreeze:
    - {epoch: 1, tower: text, layers: 1}
    - {epoch: 2, tower: image, groups: 2}
log_every: 1
checkpoint: {keep_last: 10}
"""
COLOURS = ("red", "green", "blue", "white")


def make_files(folder: Path) -> Path:
    """Write shards and the recipe; returns the folder."""
    import json

    for split, shards in (("train", 3), ("val", 1)):
        for shard in range(shards):
            samples = {}
            for image in range(shard * 8, shard * 8 + 8):
                captions = [f"a {COLOURS[k]} square number {image}" for k in range(2)]
                content = {"image_id": image, "captions": captions, "caption_ids": [10 * image, 10 * image + 1]}
                jpeg = noise_jpeg(image, (40, 36))
                samples[f"{image:012d}"] = {"jpg": jpeg, "json": json.dumps(content).encode()}
            write_tar(folder / f"{split}-{shard:06d}.tar", samples)
    (folder / "small.yaml").write_text(RECIPE)
    return folder


def arguments(files: Path, output: Path, *more: str, ds_config: str = "zero2_fp32") -> list[str]:
    """Command line of launch/train.py for the small run."""
    return [
        *("--recipe", str(files / "small.yaml"), "--output_dir", str(output)),
        *("--ds_config", str(REPOSITORY / "ds_configs" / f"{ds_config}.json")),
        *("--train_data", str(files / "train-{000000..000002}.tar"), "--val_data", str(files / "val-000000.tar")),
        *more,
    ]


def train_alone(*arguments: str) -> subprocess.CompletedProcess:
    """launch/train.py by itself: one process."""
    return run_script("launch/train.py", *arguments)


def train_here(
    files: str,
    output: str,
    stage: int | str,
    overrides: tuple[str, ...] = (),
    resume: str = "never",
    guard: Any = None,
) -> Any:
    """Train in this process group by the Python entry point; the summary. `stage` may be a ds_config's path."""
    from convclip.config import load_recipe
    from convclip.run import train_recipe

    given = arguments(Path(files), Path(output), ds_config=f"zero{stage}_fp32")
    ds_config = stage if isinstance(stage, str) else given[5]
    data = [f"data.train={given[7]}", f"data.val={given[9]}"]
    recipe = load_recipe(given[1], [*overrides, *data])
    return train_recipe(recipe, ds_config, Path(output), resume, guard=guard)


def weights_of(run_folder: Path) -> dict[str, torch.Tensor]:
    """Full fp32 weights of a run's latest checkpoint."""
    from convclip.models.checkpoint_weights import read_weights

    return read_weights(run_folder / (run_folder / "latest").read_text().strip())
