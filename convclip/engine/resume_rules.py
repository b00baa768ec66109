"""What a run that goes on may change, and what its log says of that: recipe, ranks, ZeRO stage, precision, length.

One table says of every field of a recipe whether another value gives another result (tests/engine/test_resume_rules.py
holds it against the schema). Files alone are read, and no DeepSpeed is needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from convclip.config import first_problem, load_recipe
from convclip.devices import PRECISIONS
from convclip.documents import parse_yaml
from convclip.engine.stages.schedule import lr_at, peak_lr, warmup_steps
from convclip.models.checkpoint_weights import RunState, read_state
from convclip.schema import Recipe, UserError

# By what a checkpoint's state says.
PRECISION_NAMES = {str(dtype): name for name, dtype in PRECISIONS.items()}
FP16 = str(PRECISIONS["fp16"])
# Fields that a run which goes on may change, and why that does not change what it computes.
FREE = {
    "name": "a name",
    "description": "words",
    "rows_per_epoch": "for the plan without data",
    "model.text.model": "a place: what it holds is in the checkpoint, and its configuration in model.text.config",
    "model.init_logit_scale": "where training began",
    "data.train": "a place: what it holds is compared",
    "data.val": "what is evaluated",
    "data.format": "how a place is read: what it holds is compared",
    "data.csv_image_key": "how a place is read: what it holds is compared",
    "data.csv_caption_key": "how a place is read: what it holds is compared",
    "data.csv_separator": "how a place is read: what it holds is compared",
    "data.workers": "they only read",
    "data.max_broken_share": "when to stop",
    "data.allow_pipe": "a permission",
    "data.cache_folder": "a place",
    "video.annotations": "a place: what it holds is compared",
    "video.frame_store": "a place: what it holds is compared",
    "batch.keep_frozen_gib": "memory for time",
    "loss.tile": "memory for time",
    "activation_checkpointing": "memory for time",
    "optim.ema_decay": "the weights are the same with any; the log says what becomes of the average",
    "evaluation": "what is reported",
    "checkpoint": "what is saved",
    "log_every": "what is reported",
    "max_bad_steps": "when to stop",
    "stop": "when to stop",
}
# Fields that change what is computed, in a way that may be wanted: the log says how.
TOLD = {
    "batch.micro": "rows run at a time: the loss is the same, but drop path and dropout draw otherwise, and batch "
    "norms that take a batch's statistics take them over other rows",
    "epochs": "the length of the run: the lr goes on as in a run that had this length from its start",
    "max_steps": "the length of the run: the lr goes on as in a run that had this length from its start",
}
# Free where both recipes compute what is frozen live: a store is of the weights that training began with.
FREE_WHEN_LIVE = {
    "model.pretrained": "where training began",
    "model.image.pretrained": "where training began",
    "model.text.pretrained": "where training began",
}
# In place of `features.mode` and `features.store`, which are free: a store is verified to hold what live towers would
# compute, as long as each image has as many views.
VIEWS = "features.views"
FEATURES = ("features.mode", "features.store", "features.views")
# Every other value gives another run: a recipe that differs here is refused.
FIXED = {
    "seed": "order, crops and draws",
    "model": "the network, and what it is fed",
    "data.captions": "the rows",
    "data.crop_scale": "augmentation",
    "data.random_erasing": "augmentation",
    "data.color_jitter": "augmentation",
    "data.color_jitter_probability": "augmentation",
    "data.shuffle_shards": "the order of rows",
    "data.max_image_pixels": "which images count as broken, and are replaced",
    "batch.global": "the rows of a step",
    "batch.accumulation": "the rows that a contrastive loss compares",
    "batch.sync_batch_norm": "the statistics of batch norms",
    "optim": "the updates",
    "freezing": "what trains when",
    "loss": "the loss",
    "teacher": "the loss",
    "head_alignment": "the loss",
    "video": "the network, and what it is fed",
    "features.views": "the crops of an image",
}


def saved_recipe(checkpoint: Path, state: RunState) -> Recipe:
    """The recipe that a checkpoint holds, or, of format 1, the one in its run's folder. Errors: UserError."""
    source = _source_of(checkpoint, state)
    if state.recipe:
        try:
            return Recipe.model_validate(parse_yaml(state.recipe, source))
        except ValidationError as error:
            raise UserError(f"{source}: {first_problem(error, Recipe)}") from None
    if not Path(source).is_file():
        raise UserError(f"cannot resume, {source} is gone, and with it what {checkpoint} was trained by: put it back")
    return load_recipe(source)


def refuse_changed_recipe(checkpoint: Path, state: RunState, saved: Recipe, recipe: Recipe) -> None:
    """UserError where `recipe` has another value than the `saved` one of `checkpoint` in a field that is not free."""
    then, now = _compared(saved), _compared(recipe)
    free: list[str] = [*FREE, *TOLD]
    if {saved.features.mode, recipe.features.mode} == {"live"}:
        free += FREE_WHEN_LIVE
    if not state.batch_norm:
        # A run of before there was one may need it to go on alike: the staged engine says so.
        free.append("freezing.batch_norm")
    different = [
        f"{key} was {then.get(key)}, is {now.get(key)}{_why(key)}"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key) and not any(key == f or key.startswith(f + ".") for f in free)
    ]
    if different:
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise UserError(
            f"cannot resume, the recipe differs from {_source_of(checkpoint, state)}: {'; '.join(different[:3])}{more}"
        )


def about_recipe(saved: Recipe, recipe: Recipe, step: int) -> list[str]:
    """What the log says of changed fields that are free, but not without effect."""
    lines = _about_average(saved.optim.ema_decay, recipe.optim.ema_decay, step)
    before, after = saved.batch.micro, recipe.batch.micro
    if before != after:
        lines.append(f"batch.micro was {_word(before)}, is {_word(after)}: {TOLD['batch.micro']}")
    return lines


def about_engine(then: RunState, now: RunState) -> list[str]:
    """What the log says of another number of ranks, ZeRO stage or precision; nothing where all are the same."""
    if (then.world_size, then.zero_stage, then.precision) == (now.world_size, now.zero_stage, now.precision):
        return []
    differs = []
    if then.world_size != now.world_size:
        differs += [
            "order of rows and global batch are the same; drop path and dropout draw anew, by seed, rank and step",
            "batch norms that take a batch's statistics take them over a rank's rows, which are others now",
        ]
    if then.precision != now.precision:
        differs.append("masters, moments and average are fp32 in both, the towers compute and round as now")
    if then.precision != now.precision == FP16:
        differs.append("the loss scale of fp16 begins anew")
    more = f": {'; '.join(differs)}" if differs else ""
    return [f"resumed from {_engine(then)} on {_engine(now)}{more}"]


def about_length(saved: Recipe, recipe: Recipe, step: int, steps_per_epoch: int) -> list[str]:
    """What the log says of another length of the run. UserError where the run is longer than that already."""
    before, after = (_total(which, steps_per_epoch) for which in (saved, recipe))
    lengths = [f"epochs {which.epochs}, max_steps {_word(which.max_steps)}" for which in (saved, recipe)]
    if lengths[0] == lengths[1]:
        return []
    if after < step:
        raise UserError(
            f"cannot resume at step {step}: with {lengths[1]} the run ends at step {after} already; raise them, or "
            "resume from an earlier checkpoint in a new --output_dir"
        )
    rates = [
        lr_at(step, total, warmup_steps(which, total), peak_lr(which)) if step < total else 0.0
        for which, total in ((saved, before), (recipe, after))
    ]
    return [
        f"{lengths[0]} is now {lengths[1]}: {after} steps in place of {before}, and the lr goes on as in a run that "
        f"had this length from its start, from {rates[0]:.3g} to {rates[1]:.3g} at step {step}"
    ]


def planned_resume(checkpoint: Path, recipe: Recipe, engine: RunState | None) -> list[str]:
    """What `--plan --resume` says: where a run would go on from, and what it would log.

    `engine` has its number of ranks, ZeRO stage and precision, where they are known. Errors: UserError where it would
    be refused for its recipe.
    """
    state = read_state(checkpoint)
    saved = saved_recipe(checkpoint, state)
    refuse_changed_recipe(checkpoint, state, saved, recipe)
    lines = [f"goes on from {checkpoint}: {state.step} steps done, in stage {state.stage}"]
    lines += [*about_recipe(saved, recipe, state.step), *(about_engine(state, engine) if engine else [])]
    # A checkpoint of 0.1.0 does not say.
    steps_per_epoch = state.data.get("steps per epoch")
    return lines + (about_length(saved, recipe, state.step, steps_per_epoch) if steps_per_epoch else [])


def _source_of(checkpoint: Path, state: RunState) -> str:
    """Where the recipe of a checkpoint is, in words."""
    return f"the recipe in {checkpoint}" if state.recipe else str(checkpoint.parent.parent / "recipe.yaml")


def _total(recipe: Recipe, steps_per_epoch: int) -> int:
    epochs = steps_per_epoch * recipe.epochs
    return min(epochs, recipe.max_steps or epochs)


def _about_average(then: float | None, now: float | None, step: int) -> list[str]:
    """What a change of optim.ema_decay does to a run that goes on: its weights are the same with any."""
    if then == now:
        return []
    if then is None:
        return [f"optim.ema_decay is {now:g} from now on: the moving average starts from the weights of step {step}"]
    if now is None:
        return [f"optim.ema_decay was {then:g} and is off from now on: later checkpoints have no moving average"]
    return [f"optim.ema_decay was {then:g}, is {now:g} from step {step} on: the moving average goes on with it"]


def _engine(state: RunState) -> str:
    ranks = "rank" if state.world_size == 1 else "ranks"
    name = PRECISION_NAMES.get(state.precision, state.precision)
    return f"{state.world_size} {ranks} of ZeRO {state.zero_stage} in {name}"


def _why(key: str) -> str:
    """What a field changes that no run may which goes on."""
    found = next((what for name, what in FIXED.items() if key == name or key.startswith(f"{name}.")), "")
    return f" (changes {found})" if found else ""


def _word(value: int | None) -> str:
    return "not set" if value is None else str(value)


def _compared(recipe: Recipe) -> dict[str, Any]:
    """The recipe's fields by name, `features` as the views that an image has."""
    values = _flatten(recipe.model_dump(mode="json", by_alias=True))
    kept = {key: value for key, value in values.items() if key not in FEATURES}
    return {**kept, VIEWS: recipe.features.view_count}


def _flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested sections as `a.b: value`; lists are values."""
    if not isinstance(values, dict):
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flatten(value, f"{prefix}.{key}" if prefix else key))
    return flat
