"""A run's folder: what is in it before training, who may write into it, and which run a resume continues."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from convclip.config import UserError, load_recipe
from convclip.distributed import barrier, is_main, world_size
from convclip.engine.zero.ds_config import precision, zero_stage
from convclip.files import write_text, writing
from convclip.models.checkpoint_weights import read_state
from convclip.schema import Recipe

# Recipe fields that a resumed run may change: they do not change what is computed.
FREE_ON_RESUME = (
    "name",
    "description",
    "data.train",
    "data.val",
    "data.workers",
    "video.annotations",
    "video.frame_store",
    "data.cache_folder",
    "data.allow_pipe",
    "evaluation",
    "checkpoint",
    "log_every",
    "max_bad_steps",
    "activation_checkpointing",
)


def open_run_folder(folder: Path, recipe: Recipe, ds_config: dict[str, Any], resume: str) -> Path | None:
    """Prepare `folder` and return the checkpoint to resume from, or None for a new run.

    `resume` is `never` (a new run; the folder may not hold another), `auto` (go on from `latest` where there is one)
    or the path of a checkpoint. Errors: UserError when the folder holds a run that this would overwrite, or when the
    recipe, world size, ZeRO stage or precision differs from what is being resumed.
    """
    checkpoint = None
    if resume == "auto" and (folder / "latest").is_file():
        checkpoint = folder / (folder / "latest").read_text().strip()
    elif resume not in ("auto", "never"):
        checkpoint = Path(resume)
    if checkpoint is None and (folder / "latest").is_file():
        raise UserError(
            f"--output_dir {folder} holds another run: add --resume auto to go on with it, or name a new folder"
        )
    if checkpoint is not None:
        _refuse_other_recipe(checkpoint.parent.parent / "recipe.yaml", recipe)
        _refuse_other_engine(checkpoint, world_size(), zero_stage(ds_config), str(precision(ds_config)))
    if is_main():
        with writing(folder, "--output_dir"):
            folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "recipe.yaml", recipe.to_yaml(), "--output_dir")
        write_text(folder / "ds_config.json", json.dumps(ds_config, indent=2) + "\n", "--output_dir")
        for name in ("metrics.jsonl", "eval.jsonl"):
            _drop_after(folder / name, read_state(checkpoint).step if checkpoint else 0)
    barrier()
    return checkpoint


def _refuse_other_engine(checkpoint: Path, world: int, stage: int, dtype: str) -> None:
    state = read_state(checkpoint)
    for what, then, now in (
        ("world size", state.world_size, world),
        ("ZeRO stage", state.zero_stage, stage),
        ("precision", state.precision, dtype),
    ):
        if then != now:
            raise UserError(f"{checkpoint} was made with {what} {then}, this run has {now}: resume needs the same")


def _refuse_other_recipe(saved: Path, recipe: Recipe) -> None:
    if not saved.is_file():
        return
    then, now = (_flatten(r.model_dump(mode="json", by_alias=True)) for r in (load_recipe(saved), recipe))
    different = [
        f"{key} was {then.get(key)}, is {now.get(key)}"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key) and not any(key == f or key.startswith(f + ".") for f in FREE_ON_RESUME)
    ]
    if different:
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise UserError(f"cannot resume, the recipe differs from {saved}: {'; '.join(different[:3])}{more}")


def _flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested sections as `a.b: value`; lists are values."""
    if not isinstance(values, dict):
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flatten(value, f"{prefix}.{key}" if prefix else key))
    return flat


def _drop_after(path: Path, step: int) -> None:
    """Keep only the lines up to `step`: a resumed run writes the later ones again."""
    if path.is_file():
        lines = [
            line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step
        ]
        write_text(path, "".join(line + "\n" for line in lines))
