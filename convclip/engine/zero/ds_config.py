"""The DeepSpeed configuration: ZeRO, precision, communication and offload; the recipe owns everything else.

Values that both could hold are "auto" in the file, as Hugging Face users write it, and are filled from the recipe.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from convclip.config import UserError
from convclip.schema import Recipe

# Sections that would train something else than the recipe says.
RECIPE_OWNS = {"optimizer": "optim", "scheduler": "optim"}


def load_ds_config(path: str | Path) -> dict[str, Any]:
    """Read a ds_config JSON file; UserError names the file when it cannot be read."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"--ds_config {path}: cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"--ds_config {path}: a ds_config is a JSON object")
    return values


def resolve_ds_config(values: dict[str, Any], recipe: Recipe, world: int) -> dict[str, Any]:
    """Fill "auto" values from `recipe` and refuse a ds_config that contradicts it, naming both values."""
    for section, owner in RECIPE_OWNS.items():
        if section in values:
            raise UserError(f"ds_config has a section {section!r}: the recipe's {owner} owns it, remove the section")
    micro, accumulation = recipe.batch.per_rank(world)
    wanted = {
        "train_batch_size": ("batch.global", recipe.batch.global_),
        "train_micro_batch_size_per_gpu": ("micro batch", micro),
        "gradient_accumulation_steps": ("batch.accumulation", accumulation),
        "gradient_clipping": ("optim.clip_grad_norm", recipe.optim.clip_grad_norm or 0.0),
    }
    resolved = json.loads(json.dumps(values))
    for key, (field, value) in wanted.items():
        given = resolved.get(key, "auto")
        if given not in ("auto", value):
            raise UserError(f'ds_config {key} is {given} but the recipe\'s {field} is {value}: write "auto" for {key}')
        resolved[key] = value
    resolved.setdefault("steps_per_print", 10**9)
    resolved.setdefault("zero_force_ds_cpu_optimizer", False)
    _check_precision(resolved)
    return resolved


def precision(ds_config: dict[str, Any]) -> torch.dtype:
    """dtype of the model's weights and activations under `ds_config`."""
    if ds_config.get("fp16", {}).get("enabled"):
        return torch.float16
    return torch.bfloat16 if ds_config.get("bf16", {}).get("enabled") else torch.float32


def zero_stage(ds_config: dict[str, Any]) -> int:
    """ZeRO stage of `ds_config`."""
    return ds_config.get("zero_optimization", {}).get("stage", 0)


def _check_precision(ds_config: dict[str, Any]) -> None:
    if precision(ds_config) == torch.float16:
        if zero_stage(ds_config) == 0:
            raise UserError("ds_config has fp16 with ZeRO stage 0, which DeepSpeed computes wrongly: use stage 1")
        if not get_accelerator().is_fp16_supported():
            name = get_accelerator().device_name()
            raise UserError(
                f"ds_config asks for fp16, which the device ({name}) does not support: use a bf16 or fp32 one"
            )
    if precision(ds_config) == torch.bfloat16 and not get_accelerator().is_bf16_supported():
        name = get_accelerator().device_name()
        raise UserError(f"ds_config asks for bf16, which the device ({name}) does not support: use an fp16 or fp32 one")
