"""The DeepSpeed configuration: ZeRO, precision, communication and offload; the recipe owns everything else.

Values that both could hold are "auto" in the file, as Hugging Face users write it, and are filled from the recipe.
Reading a file imports neither torch nor deepspeed; what a run needs is checked by DeepSpeed's own models too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from convclip.config import UserError, one_line
from convclip.documents import parse_json, read_text
from convclip.engine.zero.ds_rules import check_structure
from convclip.schema import Recipe

if TYPE_CHECKING:
    import torch


def load_ds_config(path: str | Path) -> dict[str, Any]:
    """Read a ds_config JSON file, without what is switched off in it; UserError names the file and what is wrong."""
    source = f"--ds_config {path}"
    values = parse_json(read_text(path, source), source)
    if not isinstance(values, dict):
        raise UserError(f"{source}: a ds_config is a JSON object")
    return check_structure(values, source)


def resolve_ds_config(values: dict[str, Any], recipe: Recipe, world: int) -> dict[str, Any]:
    """Fill "auto" values from `recipe` and refuse a ds_config that contradicts it, naming both values."""
    resolved = json.loads(json.dumps(check_structure(values, "ds_config")))
    micro, count = recipe.batch.per_rank(world)
    chunked = recipe.batch.micro is not None
    wanted = {
        "train_batch_size": ("batch.global", recipe.batch.global_),
        "train_micro_batch_size_per_gpu": ("batch.micro" if chunked else "micro batch", micro),
        "gradient_accumulation_steps": ("number of chunks" if chunked else "batch.accumulation", count),
        "gradient_clipping": ("optim.clip_grad_norm", recipe.optim.clip_grad_norm or 0.0),
    }
    for key, (field, value) in wanted.items():
        given = resolved.get(key, "auto")
        if given not in ("auto", None, value):
            raise UserError(f'ds_config {key} is {given} but the recipe\'s {field} is {value}: write "auto" for {key}')
        resolved[key] = value
    resolved.setdefault("steps_per_print", 10**9)
    resolved.setdefault("zero_force_ds_cpu_optimizer", False)
    _check_with_deepspeed(resolved)
    _check_device(resolved)
    return resolved


def precision(ds_config: Mapping[str, Any]) -> torch.dtype:
    """dtype of the model's weights and activations under `ds_config`."""
    import torch

    if ds_config.get("fp16", {}).get("enabled"):
        return torch.float16
    return torch.bfloat16 if ds_config.get("bf16", {}).get("enabled") else torch.float32


def adapts_loss_scale(ds_config: Mapping[str, Any]) -> bool:
    """Whether fp16's loss scale finds its size by itself, which it does by skipping updates."""
    fp16 = ds_config.get("fp16", {})
    return bool(fp16.get("enabled")) and not fp16.get("loss_scale")


def zero_stage(ds_config: Mapping[str, Any]) -> int:
    """ZeRO stage of `ds_config`."""
    return ds_config.get("zero_optimization", {}).get("stage", 0)


def _check_with_deepspeed(ds_config: dict[str, Any]) -> None:
    """Have the installed DeepSpeed read its sections: another version may know other keys and ranges."""
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    models: dict[str, type[BaseModel]] = {
        "zero_optimization": DeepSpeedZeroConfig,
        "fp16": DeepSpeedFP16Config,
        "bf16": DeepSpeedBF16Config,
    }
    for name, model in models.items():
        try:
            model(**ds_config.get(name, {}))
        except ValidationError as error:
            problem = error.errors()[0]
            place = ".".join(map(str, (name, *problem["loc"])))
            raise UserError(one_line(f"ds_config {place}: DeepSpeed refuses it: {problem['msg']}")) from None
        except (AssertionError, ValueError) as error:
            raise UserError(one_line(f"ds_config {name}: DeepSpeed refuses it: {error}")) from None


def _check_device(ds_config: dict[str, Any]) -> None:
    import torch
    from deepspeed.accelerator import get_accelerator

    device, dtype = get_accelerator(), precision(ds_config)
    if dtype == torch.float16 and not device.is_fp16_supported():
        raise UserError(
            f"ds_config asks for fp16, which the device ({device.device_name()}) does not support: use a bf16 or fp32 "
            "one"
        )
    if dtype == torch.bfloat16 and not device.is_bf16_supported():
        raise UserError(
            f"ds_config asks for bf16, which the device ({device.device_name()}) does not support: use an fp16 or fp32 "
            "one"
        )
