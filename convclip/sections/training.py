"""The sections of a recipe for training: batch, optimiser, freezing, losses, evaluation, checkpoints."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from convclip.sections.base import Count, Decay, Part, Positive, Section, Steps, UserError

# lr of a layer group as a share of the lr of the group above it.
LayerDecay = Annotated[float, Field(gt=0, le=1)]

# Rows of an optimizer step: a hundred times the largest batch that anybody reports.
LARGEST_BATCH = 2**24


class BatchConfig(Section):
    """Batch arithmetic: micro batch x accumulation x world = global batch.

    With `accumulation` k, each of k micro batches has a contrastive loss of its own. With `micro` set, the step is
    chunked (GradCache): one loss over the whole global batch, towers run `micro` samples at a time.
    """

    global_: int = Field(384, alias="global", gt=0)
    accumulation: Count = 1
    micro: Count | None = None
    # GiB beyond the inputs in which a chunked step caches the outputs of locked layers, instead of running them twice.
    keep_frozen_gib: float = Field(4.0, ge=0)
    # Batch norms take a step's statistics over all ranks (accelerators only); without it over a rank's own rows.
    sync_batch_norm: bool = False

    @model_validator(mode="after")
    def _fits_a_machine(self) -> BatchConfig:
        if self.global_ > LARGEST_BATCH:
            raise ValueError(
                f"global {self.global_:,} would be a loss over {self.global_:,} x {self.global_:,} logits, "
                f"{4 * self.global_**2 / 2**40:,.0f} TiB: at most {LARGEST_BATCH:,}"
            )
        return self

    @model_validator(mode="after")
    def _one_way(self) -> BatchConfig:
        if self.micro is not None and self.accumulation != 1:
            raise ValueError(
                "micro (one loss over chunks) and accumulation (a loss per micro batch) exclude each other"
            )
        return self

    @property
    def rows_of_a_loss(self) -> int:
        """Rows, of all ranks, that one contrastive loss compares."""
        return self.global_ if self.micro is not None else self.global_ // self.accumulation

    def per_rank(self, world: int) -> tuple[int, int]:
        """(micro batch, micro batches per optimizer step) of one rank; UserError when `world` does not divide."""
        per_step = self.global_ // world
        micro = self.micro or max(1, per_step // self.accumulation)
        count = per_step // micro
        if micro * count * world != self.global_ or (self.micro is None and count != self.accumulation):
            split = f"micro {self.micro}" if self.micro else f"accumulation {self.accumulation}"
            raise UserError(
                f"batch.global {self.global_} is not divisible by {split} x world {world}: change one of them"
            )
        return micro, count


class Optim(Section):
    """AdamW and its schedule: linear warm-up counted in steps, then cosine to zero."""

    lr: float = Field(5e-4, gt=0)
    betas: tuple[Decay, Decay] = (0.9, 0.98)
    eps: float = Field(1e-6, gt=0)
    weight_decay: float = Field(0.2, ge=0)
    warmup_steps: Steps = 0
    # A share of all steps; used when warmup_steps is 0. A warm-up that would not end before the run does is shortened.
    warmup_share: float = Field(0.0, ge=0, lt=1)
    clip_grad_norm: float | None = Field(None, gt=0)
    # Of the logarithm, as init_logit_scale; the clamp keeps it between 0 and this.
    max_logit_scale: float = Field(math.log(100), gt=0, le=20)
    # lr of a part of the model as a multiple of `lr`.
    part_lr_scale: dict[Part, Positive] = Field({})
    # Layer-wise decay, as of BEiT and timm: lr of a tower's layer group n below its head is multiplied by decay^n, the
    # head's is not. A number counts for both towers, {image: 0.75} for one; 1 is none.
    layer_decay: dict[Literal["image", "text"], LayerDecay] = Field({})
    # lr follows the global batch: multiplied by (global / reference_batch), or its square root.
    scale_lr_with_batch: Literal["none", "linear", "sqrt"] = "none"
    reference_batch: Count = 384
    # Share of itself that the moving average of the weights keeps at each update (0.999: half of it is of the last 693
    # updates); it is evaluated beside the weights and saved with them. None: there is no average.
    ema_decay: float | None = Field(None, gt=0, lt=1)

    @field_validator("layer_decay", mode="before")
    @classmethod
    def _of_both_towers(cls, decay: Any) -> Any:
        if isinstance(decay, int | float) and not isinstance(decay, bool):
            return {"image": decay, "text": decay}
        if decay is not None and not isinstance(decay, dict):
            raise ValueError("it is a number above 0 and up to 1, or one of each tower, as in {image: 0.75, text: 0.9}")
        return decay or {}


class Unfreeze(Section):
    """One unfreeze event: before `step` or the first of `epoch`, the last n groups or layers, or all, of a tower."""

    tower: Literal["image", "text"]
    epoch: Steps | None = None
    step: Steps | None = None
    groups: Count | None = None
    layers: Count | None = None
    all: bool = False
    lr_scale: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _one_time_one_amount(self) -> Unfreeze:
        if (self.epoch is None) == (self.step is None):
            raise ValueError("an unfreeze event needs exactly one of epoch and step")
        if (self.groups is not None) + (self.layers is not None) + self.all != 1:
            raise ValueError("an unfreeze event needs exactly one of groups, layers and all")
        return self


class Freezing(Section):
    """Which towers start locked and when their layers start to train."""

    lock: tuple[Literal["image", "text"], ...] = ()
    unfreeze: tuple[Unfreeze, ...] = ()
    new_lr_scale: float = Field(0.1, gt=0)
    # Linear warm-up of a newly unfrozen group, in steps after its event; shortened as optim.warmup_steps is.
    new_warmup_steps: Steps = 0
    # Batch norms of the towers' layers: `batch` takes a step's statistics and follows them, `frozen` keeps the running
    # statistics as they are (weight and bias train all the same). None: frozen for the towers that `lock` names.
    batch_norm: Literal["frozen", "batch"] | None = None

    @property
    def still_norms(self) -> tuple[Literal["image", "text"], ...]:
        """The towers whose batch norms keep their running statistics."""
        return {"frozen": ("image", "text"), "batch": (), None: self.lock}[self.batch_norm]

    @model_validator(mode="after")
    def _events_match_locks(self) -> Freezing:
        for event in self.unfreeze:
            if event.tower not in self.lock:
                raise ValueError(f"an event unfreezes the {event.tower} tower, which lock does not name")
        return self


class TeacherConfig(Section):
    """Distillation from a frozen dual tower: cross-entropy between teacher and student logits, both ways."""

    # An open_clip model name, `local-dir:…` / `hf-hub:…`, or one of our exports.
    model: str = "convnext_base_w"
    pretrained: str | None = None
    weight: float = Field(1.0, ge=0)
    temperature: float = Field(1.0, gt=0)
    end_step: Count | None = None


class HeadAlignment(Section):
    """The pretrained average-pool + linear head, frozen, as a reference on the same feature map."""

    kind: Literal["cosine", "mse"] = "cosine"
    weight: float = Field(1.0, ge=0)
    end_step: Count | None = None


class Loss(Section):
    """The contrastive loss: CLIP's `softmax` or SigLIP's `sigmoid`, which wants `model.init_logit_bias`.

    `tile` bounds the block of logits held at a time; None holds all of a rank's rows.
    """

    kind: Literal["softmax", "sigmoid"] = "softmax"
    tile: Count | None = None
    # Rows of one image are never each other's negatives.
    mask_same_image: bool = False


class EvaluationConfig(Section):
    """Retrieval evaluation in training: every so many epochs, and after the last."""

    every_epochs: Steps = 1
    batch: int = Field(128, gt=0, le=2**20)


class StopConfig(Section):
    """When a run ends before its last step, with a checkpoint, and what its exit code says then."""

    # Since the process started; by default Slurm's SLURM_JOB_END_TIME, where that is set. The checkpoint is written
    # before it.
    time_limit_minutes: float | None = Field(None, gt=0, le=10**7)
    # After a planned stop (a signal, the time limit): what the site takes for "queue it again".
    exit_code: int = Field(0, ge=0, lt=126)
    # A run with several ranks ends where one is silent, or none moves on, for so many seconds; 0: it waits.
    watchdog_s: float = Field(120.0, ge=0, le=10**6)


class Checkpoint(Section):
    """When to save: `keep_last` newest are kept, and `best` by mean standard R@1."""

    every_epochs: Steps = 1
    every_steps: Steps = 0
    keep_last: Count = 2
