"""What lies around released weights: an index of several files, and whether they were trained with QuickGELU."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Collection
from pathlib import Path

from convclip.schema import UserError

CONFIG_FILE = "open_clip_config.json"
INDEX = ".safetensors.index.json"
MAX_INDEX_BYTES = 16 * 2**20
# Bytes read at a time where only their checksum is wanted.
_BLOCK = 2**22
# Beside its weights, a state_dict of OpenAI's has these numbers; all of OpenAI's models have QuickGELU.
OPENAI_NUMBERS = {"input_resolution", "context_length", "vocab_size"}
# open_clip's own releases say it in the file's name: rn50-quickgelu-yfcc15m-455df137.pt.
QUICK_GELU_RELEASE = re.compile(r"rn(50|101)-quickgelu-", re.IGNORECASE)


def named_parts(index: Path, endings: tuple[str, ...] = (".safetensors",)) -> dict[str, list[str]]:
    """The files that an index names, beside it, and the tensors that each must hold. Errors: UserError."""
    try:
        if index.stat().st_size > MAX_INDEX_BYTES:
            raise ValueError(f"more than {MAX_INDEX_BYTES // 2**20} MiB")
        weight_map = json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"]
        if not weight_map or not all(isinstance(part, str) for part in weight_map.values()):
            raise ValueError("no file for every tensor")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index}: no index of weight files ({type(error).__name__} {error}): copy it again") from None
    parts: dict[str, list[str]] = {}
    for name, part in weight_map.items():
        parts.setdefault(part, []).append(name)
    for part in parts:
        if Path(part).name != part or not part.endswith(endings):
            kind = " or ".join(endings)
            raise UserError(f"{index}: names {part[:80]!r}, which is no {kind} file beside it: copy it again")
    return parts


def parts_of(index: Path) -> dict[Path, list[str]]:
    """`named_parts` with their paths; all are there, else a UserError names the first that is not."""
    parts = {index.parent / part: names for part, names in named_parts(index).items()}
    missing = [path.name for path in parts if not path.is_file()]
    if missing:
        raise UserError(
            f"{index}: {len(missing)} of its {len(parts)} files are missing, the first is {missing[0]}: "
            "put them beside the index"
        )
    return parts


def compare_checksums(path: Path) -> None:
    """BadZipFile where a torch file's bytes differ from the checksums in it, which torch.load does not look at."""
    if path.suffix == ".safetensors" or not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        # torch can be told to leave the checksums out: they are 0 then.
        for record in (record for record in archive.infolist() if record.CRC):
            with archive.open(record) as file:
                while file.read(_BLOCK):
                    pass


def refuse_torchscript(path: Path) -> None:
    """UserError for a program, which torch.load would run; OpenAI's own files are of this kind."""
    try:
        with zipfile.ZipFile(path) as archive:
            is_program = any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile, ValueError):
        return  # Of another kind, or damaged: whoever reads it says so.
    if is_program:
        raise UserError(
            f"{path}: a TorchScript archive, as OpenAI's own files are: save its state_dict, or take the same weights "
            "from hf-hub:timm/resnet50_clip.openai"
        )


def refuse_other_activation(path: Path, names: Collection[str], quick_gelu: bool) -> None:
    """UserError where the weights at `path` say that they were trained with another activation than the model has.

    Such weights would load, and be quietly wrong. `names`: of the tensors in it; `quick_gelu`: the model's.
    """
    trained = _trained_with_quick_gelu(path, names)
    if trained is None or trained == quick_gelu:
        return
    was, has, wanted = ("QuickGELU", "GELU", "quick_gelu") if trained else ("GELU", "QuickGELU", "gelu")
    name = " (or a model.open_clip that ends in -quickgelu)" if trained else ""
    raise UserError(
        f"{path}: trained with {was}, but the model's text tower has {has}: set model.text.activation to {wanted}{name}"
    )


def _trained_with_quick_gelu(path: Path, names: Collection[str]) -> bool | None:
    """What an open_clip configuration beside the weights, their layout or their name says; None: nothing does."""
    config = path.parent / CONFIG_FILE
    if config.is_file() and path.name.startswith("open_clip"):
        try:
            return bool(json.loads(config.read_text(encoding="utf-8-sig"))["model_cfg"].get("quick_gelu", False))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{config}: no valid open_clip configuration; repair it, or move the weights away"
            ) from None
    return True if set(names) >= OPENAI_NUMBERS or QUICK_GELU_RELEASE.match(path.name) else None
