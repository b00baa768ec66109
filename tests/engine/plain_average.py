"""The moving average of a run's weights by a plain loop over its checkpoints, one of which every step has left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convclip.config import load_recipe
from convclip.engine.task import ImageTextTask
from convclip.evaluation.embedding import Encode
from convclip.models.batch_norm import to_precision
from convclip.models.checkpoint_files import TensorFile
from convclip.models.checkpoint_weights import load_weights, read_state, read_weights, step_folders


def wrong_averages(run: Path) -> list[str]:
    """What differs between the averages in the checkpoints of `run` and a plain loop's; empty where nothing does.

    Where an update was skipped the weights of two steps are the same.
    """
    recipe, averages, wrong = load_recipe(run / "recipe.yaml"), {}, []
    decay = recipe.optim.ema_decay
    assert decay is not None
    folders = {read_state(path).step: path for path in step_folders(run)}
    # Where the run began, in full precision.
    before: dict[str, Tensor] = dict(ImageTextTask(recipe).initial_model()[0].state_dict())
    for step in range(1, max(folders) + 1):
        weights, state = read_weights(folders[step]), read_state(folders[step])
        trains = TensorFile(folders[step] / "rank-00000.safetensors", state.origin(0)).layout["shapes"]
        averages |= {name: before[name] for name in trains if name not in averages}
        if any(not torch.equal(weights[name], before[name]) for name in trains):
            averages = {name: decay * old + (1 - decay) * weights[name] for name, old in averages.items()}
        found = read_weights(folders[step], ema=True)
        for name, value in {**weights, **averages}.items():
            # Values near 2: the logit scale.
            if not torch.allclose(found[name], value, rtol=0, atol=1e-6):
                wrong.append(f"step {step} {name}: {(found[name] - value).abs().max().item()}")
        before = weights
    return wrong


def figures_of_average(run: Path, checkpoint: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Figures of a checkpoint's average on the run's validation data, by a model outside the engine; on all ranks."""
    task = ImageTextTask(load_recipe(run / "recipe.yaml"))
    model = task.build_model()
    load_weights(model, checkpoint, ema=True)
    encode: Encode = to_precision(model, dtype).eval()
    assert task.recipe.data.val is not None
    return task.evaluation(task.recipe.data.val).figures(encode, torch.device("cpu"), dtype)
