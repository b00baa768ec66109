"""Small runs with frozen towers for the tests of the feature store: a teacher, a pretrained model, live and stored."""

from __future__ import annotations

import json
import multiprocessing
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file

from tests.conftest import REPOSITORY
from tests.engine.small_run import make_files

# Both towers opened in steps: the image tower's first trained layer moves, the text tower ends being stored.
EVENTS = [
    {"epoch": 1, "tower": "text", "layers": 1},
    {"epoch": 1, "tower": "image", "groups": 2},
    {"epoch": 2, "tower": "image", "groups": 4},
]
OPEN_ALL = [{"epoch": 1, "tower": "image", "groups": 2}, {"epoch": 2, "tower": "image", "all": True}]


def write_open_clip(folder: Path, name: str, embed_dim: int, image_size: int, text: dict[str, int], seed: int) -> Path:
    """A random open_clip model with average pool and linear head, in a folder that `local-dir:` can name."""
    folder.mkdir()
    vision = {"image_size": image_size, "timm_model_name": "test_convnext", "timm_model_pretrained": False}
    vision |= {"timm_pool": "avg", "timm_proj": "linear"}
    text = {"vocab_size": 49408, "heads": 2, **text}
    config = {"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": text}
    preprocess = {"mean": [0.5] * 3, "std": [0.3] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    torch.manual_seed(seed)
    # Copies: safetensors refuses tensors that share memory.
    weights = {key: value.clone() for key, value in open_clip.create_model(name).state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    return folder


def make_frozen_files(folder: Path) -> Path:
    """Shards, recipe, `teacher` (another width, image size, mean and context) and `start` (the student's towers)."""
    make_files(folder)
    teacher = {"context_length": 16, "width": 32, "layers": 1}
    write_open_clip(folder / "teacher", "tiny-teacher", 24, 48, teacher, 3)
    student = {"context_length": 12, "width": 32, "layers": 2}
    write_open_clip(folder / "start", "tiny-start", 16, 32, student, 4)
    return folder


def overrides(files: Path, **values: Any) -> list[str]:
    """Overrides of the small recipe: a teacher, events, three epochs of three steps, nothing saved or evaluated."""
    start = files / "start" / "open_clip_model.safetensors"
    settings = {
        "data.train": str(files / "train-{000000..000002}.tar"),
        "teacher": {"model": f"local-dir:{files / 'teacher'}", "temperature": 2.0},
        "model.pretrained": str(start),
        "freezing": {"lock": ["image", "text"], "unfreeze": EVENTS},
        "batch.global": 8,
        "epochs": 3,
        "evaluation.every_epochs": 0,
        "checkpoint.every_epochs": 0,
        **{key.replace("__", "."): value for key, value in values.items()},
    }
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def make_recipe(files: Path, **values: Any) -> Any:
    """The small recipe with `overrides`; `batch__micro=2` sets batch.micro."""
    from convclip.config import load_recipe

    return load_recipe(files / "small.yaml", overrides(files, **values))


def train(files: Path, output: Path, config: str = "zero2_fp32", **values: Any) -> list[dict[str, Any]]:
    """Train in this process group; the rows of metrics.jsonl."""
    from convclip.run import train_recipe

    train_recipe(make_recipe(files, **values), REPOSITORY / "ds_configs" / f"{config}.json", output)
    return metrics(output)


def metrics(output: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl (written by the main rank)."""
    torch.distributed.barrier()
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def call_script(folder: Path, script: str, *given: str) -> subprocess.CompletedProcess:
    """Run a script as its own process, forked so that torch and deepspeed need not be imported again."""
    import convclip.run  # noqa: F401  (for all forks)

    process = multiprocessing.get_context("fork").Process(target=_script, args=(folder, script, given))
    process.start()
    process.join(300)
    process.kill()
    said = [(folder / name).read_text() for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess([script, *given], process.exitcode, *said)


def _script(folder: Path, script: str, given: tuple[str, ...]) -> None:
    sys.stdout, sys.stderr = ((folder / name).open("w", buffering=1) for name in ("stdout", "stderr"))
    sys.argv = [script, *given]
    runpy.run_path(str(REPOSITORY / script), run_name="__main__")
