"""The recipe schema: every field of an experiment with its default, meaning and unit.

The schema holds the defaults, so a recipe states only what makes its experiment different. The sections are in
`convclip.sections`; the whole recipe, and which task uses which of its fields, is here. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, model_validator

from convclip.documents import dump_yaml
from convclip.sections.base import AS_BEFORE, MAX_PIXELS, Decay, Part, Positive, Section, UserError, Weight
from convclip.sections.model_and_data import Data, Features, ImageTowerConfig, Model, TextTowerConfig, Video
from convclip.sections.released import RELEASED, model_rows, stands_for
from convclip.sections.training import (
    BatchConfig,
    Checkpoint,
    EvaluationConfig,
    Freezing,
    HeadAlignment,
    Loss,
    Optim,
    StopConfig,
    TeacherConfig,
    Unfreeze,
)

__all__ = [
    "AS_BEFORE",
    "MAX_PIXELS",
    "RELEASED",
    "TASK_FIELDS",
    "BatchConfig",
    "Checkpoint",
    "Data",
    "Decay",
    "EvaluationConfig",
    "Features",
    "Freezing",
    "HeadAlignment",
    "ImageTowerConfig",
    "Loss",
    "Model",
    "Optim",
    "Part",
    "Positive",
    "Recipe",
    "Section",
    "StopConfig",
    "TaskName",
    "TeacherConfig",
    "TextTowerConfig",
    "Unfreeze",
    "UserError",
    "Video",
    "Weight",
    "model_rows",
    "stands_for",
]

TaskName = Literal["image_text", "video"]

_EVERY_TASK = (
    *("name", "description", "seed", "epochs", "max_steps", "rows_per_epoch", "log_every", "max_bad_steps"),
    *("model", "freezing", "evaluation", "checkpoint", "stop", "activation_checkpointing"),
    *("data.train", "data.val", "data.captions", "data.workers", "data.max_broken_share"),
    *("batch.global", "batch.accumulation", "features.mode", "features.store"),
    *("optim.lr", "optim.betas", "optim.eps", "optim.weight_decay", "optim.warmup_steps", "optim.warmup_share"),
    *("optim.clip_grad_norm", "optim.max_logit_scale", "optim.scale_lr_with_batch", "optim.reference_batch"),
    *("optim.layer_decay", "optim.ema_decay"),
    *("optim.part_lr_scale.image", "optim.part_lr_scale.text", "optim.part_lr_scale.logit_scale"),
)
# What each task reads of a recipe; a section's name stands for all of its fields. Whatever else differs from its
# default is refused, so a new section or field is no task's until it stands here.
TASK_FIELDS: dict[TaskName, tuple[str, ...]] = {
    "image_text": (
        *_EVERY_TASK,
        *("data", "batch", "loss", "teacher", "head_alignment", "features", "optim.part_lr_scale.logit_bias"),
    ),
    "video": (*_EVERY_TASK, "video", "optim.part_lr_scale.temporal", "optim.part_lr_scale.aggregation"),
}


class Recipe(Section):
    """One experiment, whole."""

    name: str = Field(min_length=1)
    description: str = ""
    # A rank's generators start from seed + rank.
    seed: int = Field(0, ge=0, lt=2**63)
    epochs: int = Field(gt=0, le=10**6)
    # Stop after this many steps; the schedule then ends there too.
    max_steps: int | None = Field(None, gt=0, le=10**12)
    model: Model = Model()
    data: Data = Data()
    batch: BatchConfig = BatchConfig()
    optim: Optim = Optim()
    freezing: Freezing = Freezing()
    loss: Loss = Loss()
    teacher: TeacherConfig | None = None
    head_alignment: HeadAlignment | None = None
    video: Video | None = None
    features: Features = Features()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: Checkpoint = Checkpoint()
    stop: StopConfig = StopConfig()
    activation_checkpointing: bool = False
    log_every: int = Field(10, gt=0, le=10**9)
    # Stop after this many steps in a row without a finite loss.
    max_bad_steps: int = Field(10, gt=0, le=10**9)
    # Rows of one epoch and expected training images, for --plan without data (COCO train2017: 591,753 captions).
    rows_per_epoch: int | None = Field(None, gt=0, le=10**12)

    @property
    def task(self) -> TaskName:
        """The kind of training: the only place that looks whether there is a video section."""
        return "image_text" if self.video is None else "video"

    @property
    def video_settings(self) -> Video:
        """The section that every recipe of the video task has. ValueError for a recipe of another task."""
        if self.video is None:
            raise ValueError(f"recipe {self.name} is not for videos")
        return self.video

    @model_validator(mode="after")
    def _sigmoid_has_a_bias(self) -> Recipe:
        if (self.loss.kind == "sigmoid") != (self.model.init_logit_bias is not None):
            raise ValueError(
                "loss.kind sigmoid and model.init_logit_bias (SigLIP: -10) go together: set both or neither"
            )
        return self

    @model_validator(mode="after")
    def _a_loss_compares_rows(self) -> Recipe:
        batch = self.batch
        if batch.rows_of_a_loss < 2:
            raise ValueError(
                f"batch.global {batch.global_} / batch.accumulation {batch.accumulation} = {batch.rows_of_a_loss} row "
                "for each contrastive loss, which then is 0 in every step: 2 or more are needed"
            )
        return self

    @model_validator(mode="after")
    def _one_view_is_not_augmented(self) -> Recipe:
        if self.data.augments and self.features.view_count == 1:
            raise ValueError(
                "data.random_erasing and data.color_jitter change nothing where an image has one view, the evaluation "
                "crop: set features.views to 2 or more, or remove them"
            )
        return self

    @model_validator(mode="after")
    def _task_uses_every_field(self) -> Recipe:
        used = TASK_FIELDS[self.task]
        for place in _changed(self):
            if not any(place == name or place.startswith(f"{name}.") for name in used):
                task = self.task.replace("_", "-")
                raise ValueError(f"{place} cannot be used with {task} training, which does not read it: remove it")
        return self

    def to_yaml(self) -> str:
        """The resolved recipe as YAML; `load_recipe` reads it back unchanged."""
        return dump_yaml(self.model_dump(mode="json", by_alias=True))


def _changed(section: Section, prefix: str = "") -> Iterator[str]:
    """Dotted names of the fields that differ from their defaults, the items of a mapping one by one."""
    for name, field in type(section).model_fields.items():
        value: Any = getattr(section, name)
        default: Any = field.get_default(call_default_factory=True)
        place = f"{prefix}{field.alias or name}"
        if value == default:
            continue
        if isinstance(value, Section) and isinstance(default, Section):
            yield from _changed(value, f"{place}.")
        elif isinstance(value, dict):
            yield from (f"{place}.{key}" for key in value)
        else:
            yield place
