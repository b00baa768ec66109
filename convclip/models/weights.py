"""Released weights into a DualTower: timm trunks, GPT-2, and open_clip checkpoints of both towers.

This file reads them and checks the fit; which name goes where is the tower's (`Tower.released_names`). A missing,
left-over or misshapen tensor is a UserError that names it. Only a logit bias and what a tower declares
(`Tower.may_be_new`: an image head, GPT-2's projection) may stay new.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from convclip import schema
from convclip.models.checkpoint_files import checksum
from convclip.models.clip_text import TOP_LEVEL_NAMES
from convclip.models.dual_tower import DualTower
from convclip.models.hf_folder import weight_files
from convclip.models.tower import Tower
from convclip.models.weight_files import (
    CONFIG_FILE,
    INDEX,
    compare_checksums,
    named_parts,
    parts_of,
    refuse_other_activation,
    refuse_torchscript,
)
from convclip.schema import UserError

HUB = "hf-hub:"
# In place of a file: the backbone's own release.
TIMM = "timm"
# Names under which weights lie in a folder or Hub repository, best first.
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin")
INDEX_FILES = tuple(f"{name}{INDEX}" for name in ("open_clip_model", "model"))
# Key of a safetensors file's metadata: JSON of a CRC-32 for each tensor.
CHECKSUMS = "checksums"

_NOT_WEIGHTS = ("attn_mask", "text.attn_mask", "input_resolution", "context_length", "vocab_size")

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
        found |= _fitting(model, _both_towers(model, _read_for(model, config.pretrained)), "", config.pretrained)
    if config.image.pretrained:
        source = config.image.pretrained
        raw = model.visual.timm_weights(config.image) if source == TIMM else read_weights(source)
        found |= _fitting(model, _one_tower("visual.", model.visual, raw), "visual.", source)
    if config.text.pretrained:
        source = config.text.pretrained
        found |= _fitting(model, _one_tower("text.", model.text, _read_for(model, source)), "text.", source)
    elif config.text.model and not config.pretrained:
        source = config.text.model
        found |= _fitting(model, _one_tower("text.", model.text, _from_parts(weight_files(source))), "text.", source)
    _copy(model, found)
    return LoadReport(new=[name for name in model.state_dict() if name not in found], loaded=len(found))


def load_exact(model: DualTower, source: str | Path) -> int:
    """Load a file that holds exactly this model (a DualTower's or open_clip's names); the number of tensors.

    Errors: UserError as `load_pretrained`, and for another head too.
    """
    raw = _ours(model, open_clip_names(_read_for(model, str(source))))
    tensors = _fitting(model, raw, "", str(source), whole=True)
    _copy(model, tensors)
    return len(tensors)


def read_weights(source: str) -> Tensors:
    """Tensors of a .safetensors or torch file, of an index of several (`*.safetensors.index.json`), a folder that holds
    one, or `hf-hub:owner/name`, on the CPU.

    A training checkpoint's `state_dict` is unwrapped, and DistributedDataParallel's `module.` dropped. Errors:
    UserError when there is no such file, it is damaged, or holds more than tensors.
    """
    return _tensors_of(_weight_file(source))


def _read_for(model: DualTower, source: str) -> Tensors:
    """`read_weights`, for a model whose text tower they are for. Errors: UserError for another activation too."""
    path = _weight_file(source)
    tensors = _tensors_of(path)
    if model.text.quick_gelu is not None:
        refuse_other_activation(path, tensors, model.text.quick_gelu)
    return tensors


def _tensors_of(path: Path) -> Tensors:
    if path.name.endswith(INDEX):
        return _from_parts(parts_of(path))
    refuse_torchscript(path)
    try:
        content = (
            _load_safetensors(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
        compare_checksums(path)
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


def _from_parts(parts: Mapping[Path, list[str]]) -> Tensors:
    """All tensors of files, each with the names of those that it must hold. Errors: UserError where it does not."""
    tensors: Tensors = {}
    for path, names in parts.items():
        held = _tensors_of(path)
        lost = [name for name in names if name.removeprefix("module.") not in held]
        if lost:
            raise UserError(f"{path}: lacks {_some(lost)}, which the index beside it says it holds: copy both again")
        tensors |= held
    return tensors


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


def metadata_of(source: str | Path) -> dict[str, str]:
    """What a .safetensors file or the one in a folder says of itself; {} for other files. Errors as `read_weights`."""
    path = _weight_file(str(source))
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path}: damaged, cut short or no weight file ({_first_line(error)})") from None


def _load_safetensors(path: Path) -> Tensors:
    """The tensors of a file; ValueError where it has checksums, as our exports do, and one differs."""
    with safe_open(path, framework="pt") as file:
        tensors: Tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        sums = json.loads((file.metadata() or {}).get(CHECKSUMS, "{}"))
    for name, tensor in tensors.items():
        if name in sums and sums[name] != checksum(tensor):
            raise ValueError(f"wrong checksum of {name}")
    return tensors


def open_clip_names(tensors: Tensors) -> Tensors:
    """An open_clip state_dict of either layout under DualTower's names, without what is no weight."""
    named = {f"text.{name}" if name.startswith(TOP_LEVEL_NAMES) else name: value for name, value in tensors.items()}
    return {name: value for name, value in named.items() if name not in _NOT_WEIGHTS}


def _both_towers(model: DualTower, raw: Tensors) -> Tensors:
    """open_clip tensors under our names; without what the image tower has no use for, a head of another kind."""
    tensors = open_clip_names(raw)
    taken = model.visual.released_names(tensors)
    return _ours(model, {n: value for n, value in tensors.items() if not n.startswith("visual.") or n in taken})


def _ours(model: DualTower, tensors: Tensors) -> Tensors:
    """The names of the image tower's tensors here, where open_clip has others."""
    images = [name for name in tensors if name.startswith("visual.")]
    named = {name: f"visual.{own}" for name, own in model.visual.released_names(images).items()} if images else {}
    return {named.get(name, name): value for name, value in tensors.items()}


def _one_tower(part: str, tower: Tower, raw: Tensors) -> Tensors:
    """One tower's tensors under our names, from its own release or a whole checkpoint."""
    weights = {name: value for name, value in raw.items() if name not in _NOT_WEIGHTS}
    return {part + own: weights[name] for name, own in tower.released_names(weights).items()}


def _fitting(model: DualTower, tensors: Tensors, part: str, source: str, whole: bool = False) -> Tensors:
    """`tensors`, if they are what the names of `model` that start with `part` need; else a UserError.

    `whole`: no parameter may be left without weights.
    """
    needed = {name: value.shape for name, value in model.state_dict().items() if name.startswith(part)}
    declared = () if whole else _may_be_new(model)
    # A part may be new as a whole, never in pieces.
    may_be_new = tuple(new for new in declared if not any(name.startswith(new) for name in tensors))
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


def _may_be_new(model: DualTower) -> list[str]:
    visual = [f"visual.{new}" for new in model.visual.may_be_new]
    return [*visual, *(f"text.{new}" for new in model.text.may_be_new), "logit_bias"]


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
        held = [path / name for name in (*WEIGHT_FILES, *INDEX_FILES) if (path / name).is_file()]
        if not held:
            raise UserError(f"{path}: the folder holds none of {', '.join(WEIGHT_FILES)}")
        return held[0]
    if not path.is_file():
        raise UserError(
            f"{source}: no such weight file; give a path, a folder, {HUB}owner/name, or a tag of model.open_clip"
        )
    return path


def _from_hub(source: str) -> Path:
    """The weight file of `hf-hub:owner/name`, downloaded once; its open_clip config comes along where there is one."""
    repository = source.removeprefix(HUB).strip("/")
    offline = False
    for name in (*WEIGHT_FILES, *INDEX_FILES):
        try:
            path = Path(hf_hub_download(repository, name))
            for part in named_parts(path) if name.endswith(INDEX) else ():
                hf_hub_download(repository, part)
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


def _some(names: list[str]) -> str:
    """The first four of `names`, and how many there are more."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
