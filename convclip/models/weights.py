"""Released weights into a DualTower: timm trunks, GPT-2, and open_clip checkpoints of both towers.

What a file holds must fit: a missing, left-over or misshapen tensor is a UserError that names it. Only these may stay
new: the image head where the file has none or another kind, GPT-2's projection, and a logit bias.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from safetensors.torch import load_file
from torch import Tensor

from convclip import schema
from convclip.models.dual_tower import DualTower
from convclip.models.image_tower import build_trunk, resnet_sizes
from convclip.schema import UserError

HUB = "hf-hub:"
# Names under which weights lie in a folder or Hub repository, best first.
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin")
CONFIG_FILE = "open_clip_config.json"

# open_clip's CLIP hangs the text tower on the model itself; its CustomTextCLIP, and we, under `text.`.
_TOP_LEVEL_TEXT = ("text_projection", "positional_embedding", "token_embedding.", "transformer.", "ln_final.")
_NOT_WEIGHTS = ("attn_mask", "text.attn_mask", "input_resolution", "context_length", "vocab_size")
_GPT2_NOT_WEIGHTS = re.compile(r"(h\.\d+\.attn\.(bias|masked_bias)|lm_head\.weight)$")

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class LoadReport:
    """What loading did: names of the parameters and buffers that stayed random, and the number of tensors loaded."""

    new: list[str]
    loaded: int


def load_pretrained(model: DualTower, config: schema.Model) -> LoadReport:
    """Load what `config` names into `model`: `pretrained` (both towers), then each tower's own.

    Errors: UserError in one line when a file cannot be had or read, or does not fit.
    """
    found: Tensors = {}
    if config.pretrained:
        found |= _fitting(model, _open_clip_tensors(model, read_weights(config.pretrained)), "", config.pretrained)
    if config.image.pretrained:
        tensors = _image_tensors(model, config.image)
        found |= _fitting(model, tensors, "visual.", config.image.pretrained)
    if config.text.pretrained:
        tensors = _text_tensors(model, config.text)
        found |= _fitting(model, tensors, "text.", config.text.pretrained)
    _copy(model, found)
    return LoadReport(new=[name for name in model.state_dict() if name not in found], loaded=len(found))


def load_exact(model: DualTower, source: str | Path) -> int:
    """Load a file that holds exactly this model (a DualTower's or open_clip's names); the number of tensors.

    Errors: UserError as `load_pretrained`, and for another head too.
    """
    tensors = _fitting(model, open_clip_names(read_weights(str(source))), "", str(source), may_be_new=())
    _copy(model, tensors)
    return len(tensors)


def read_weights(source: str) -> Tensors:
    """Tensors of a .safetensors or torch file, a folder that holds one, or `hf-hub:owner/name`, on the CPU.

    A training checkpoint's `state_dict` is unwrapped, and DistributedDataParallel's `module.` dropped. Errors:
    UserError when there is no such file, it is damaged, holds more than tensors, or was trained with QuickGELU.
    """
    path = _weight_file(source)
    _refuse_quick_gelu(path)
    try:
        content = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # the readers raise whatever the damaged bytes lead them to
        if "weights only" in str(error).lower().replace("_", " "):
            raise UserError(f"{path}: holds more than tensors, so it is not loaded: save its state_dict") from None
        raise UserError(f"{path}: damaged, cut short or no weight file ({_first_line(error)})") from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path}: no state_dict: expected names with a tensor each")
    _check_tensors(path, content)
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def _check_tensors(path: Path, content: dict[Any, Tensor]) -> None:
    """UserError for tensors that cannot be a model's weights."""
    if not content:
        raise UserError(f"{path}: holds no tensors")
    for name, tensor in content.items():
        if not isinstance(name, str):
            raise UserError(f"{path}: no state_dict: the key {name!r} is no name")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            raise UserError(f"{path}: {name} is a sparse, quantised or empty (meta) tensor: save dense ones")
        # A causal mask holds minus infinity, and is no weight.
        weight = tensor.is_floating_point() and name.removeprefix("module.") not in _NOT_WEIGHTS
        if weight and not torch.isfinite(tensor.float()).all():
            raise UserError(f"{path}: {name} holds NaN or infinity, so the weights are of a run that broke")


def open_clip_names(tensors: Tensors) -> Tensors:
    """An open_clip state_dict of either layout under DualTower's names, without what is no weight."""
    named = {f"text.{name}" if name.startswith(_TOP_LEVEL_TEXT) else name: value for name, value in tensors.items()}
    return {name: value for name, value in named.items() if name not in _NOT_WEIGHTS}


def _open_clip_tensors(model: DualTower, tensors: Tensors) -> Tensors:
    """open_clip tensors under our names; without the image head where the model's is of another kind."""
    tensors = open_clip_names(tensors)
    if _head_parts(tensors) != _head_parts(model.state_dict()):
        tensors = {name: value for name, value in tensors.items() if not name.startswith("visual.head.")}
    return tensors


def _head_parts(names: Iterable[str]) -> set[str]:
    """Modules of a timm tower's head: pool, proj, mlp; empty for a ResNet's."""
    return {name.split(".")[2] for name in names if name.startswith("visual.head.")}


def _image_tensors(model: DualTower, config: schema.ImageTowerConfig) -> Tensors:
    """The image tower's tensors from timm's release, a timm file, or the image part of an open_clip checkpoint."""
    source = config.pretrained or ""
    if source == "timm":
        if resnet_sizes(config.backbone):
            raise UserError(f"model.image.pretrained: timm has no {config.backbone}; name an open_clip checkpoint")
        try:
            return _under("visual.trunk.", build_trunk(config, pretrained=True).state_dict())
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"model.image.pretrained: timm's weights of {config.backbone} cannot be had ({_first_line(error)}); "
                "where there is no network, name a downloaded file"
            ) from None
    raw = read_weights(source)
    if any(name.startswith("visual.") for name in raw):
        tensors = _open_clip_tensors(model, raw)
        return {name: value for name, value in tensors.items() if name.startswith("visual.")}
    classifier = getattr(getattr(model.visual, "trunk", None), "default_cfg", {}).get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    trunk = {name: v for name, v in raw.items() if not name.startswith(tuple(f"{head}." for head in heads))}
    return _under("visual.trunk.", trunk)


def _text_tensors(model: DualTower, config: schema.TextTowerConfig) -> Tensors:
    """The text tower's tensors from the text part of a whole checkpoint, or from a GPT-2 file."""
    raw = read_weights(config.pretrained or "")
    if config.kind == "clip" or any(name.startswith("text.") for name in raw):
        return {name: value for name, value in open_clip_names(raw).items() if name.startswith("text.")}
    bare = {name.removeprefix("transformer."): value for name, value in raw.items()}
    return _under("text.transformer.", {name: v for name, v in bare.items() if not _GPT2_NOT_WEIGHTS.match(name)})


def _fitting(
    model: DualTower,
    tensors: Tensors,
    part: str,
    source: str,
    may_be_new: tuple[str, ...] = ("visual.head.", "text.proj.", "logit_bias"),
) -> Tensors:
    """`tensors`, if they are what the names of `model` that start with `part` need; else a UserError."""
    needed = {name: value.shape for name, value in model.state_dict().items() if name.startswith(part)}
    # A part may be new as a whole, never in pieces.
    may_be_new = tuple(new for new in may_be_new if not any(name.startswith(new) for name in tensors))
    left_over = [name for name in tensors if name not in needed]
    missing = [name for name in needed if name not in tensors and not name.startswith(may_be_new)]
    if left_over or missing:
        complaints = [f"holds {_some(left_over)} that the model has no place for"] if left_over else []
        complaints += [f"lacks {_some(missing)}"] if missing else []
        raise UserError(f"{source}: {' and '.join(complaints)}: it is of another model than the recipe's")
    for name, tensor in tensors.items():
        if tensor.shape != needed[name] and not tensor.numel() == needed[name].numel() == 1:
            raise UserError(f"{source}: {name} has shape {tuple(tensor.shape)}, the model's is {tuple(needed[name])}")
    return tensors


@torch.no_grad()
def _copy(model: DualTower, tensors: Tensors) -> None:
    state = model.state_dict()
    for name, tensor in tensors.items():
        state[name].copy_(tensor.reshape(state[name].shape))


def _weight_file(source: str) -> Path:
    if source.startswith(HUB):
        return _from_hub(source)
    path = Path(source)
    if path.is_dir():
        held = [path / name for name in WEIGHT_FILES if (path / name).is_file()]
        if not held:
            raise UserError(f"{path}: the folder holds none of {', '.join(WEIGHT_FILES)}")
        return held[0]
    if not path.is_file():
        raise UserError(f"{source}: no such weight file; give a path, a folder, or {HUB}owner/name")
    return path


def _from_hub(source: str) -> Path:
    """The weight file of `hf-hub:owner/name`, downloaded once; its open_clip config comes along where there is one."""
    repository = source.removeprefix(HUB).strip("/")
    offline = False
    for name in WEIGHT_FILES:
        try:
            path = Path(hf_hub_download(repository, name))
            if name.startswith("open_clip"):
                hf_hub_download(repository, CONFIG_FILE)
            return path
        except LocalEntryNotFoundError:
            offline = True
        except RemoteEntryNotFoundError:
            continue
        except Exception as error:  # network, permission and name errors of several libraries
            raise UserError(f"{source}: cannot be downloaded ({_first_line(error)})") from None
    if offline:
        raise UserError(f"{source}: not downloaded before and no network now; name a downloaded file instead")
    raise UserError(f"{source}: the repository holds none of {', '.join(WEIGHT_FILES)}")


def _refuse_quick_gelu(path: Path) -> None:
    """The text tower has the exact GELU; weights trained with the quick one would load and be quietly wrong."""
    config = path.parent / CONFIG_FILE
    if not config.is_file() or not path.name.startswith("open_clip"):
        return
    try:
        quick = json.loads(config.read_text(encoding="utf-8"))["model_cfg"].get("quick_gelu", False)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{config}: no valid open_clip configuration; repair it, or move the weights away") from None
    if quick:
        raise UserError(f"{path}: trained with QuickGELU, which convclip's text tower does not have")


def _under(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: value for name, value in tensors.items()}


def _some(names: list[str]) -> str:
    """The first four of `names`, and how many there are more."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
