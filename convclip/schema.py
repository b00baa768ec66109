"""The recipe schema: every field of an experiment with its default, meaning and unit.

The schema holds the defaults, so a recipe states only what makes its experiment different. Imports no torch.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator


class UserError(Exception):
    """A mistake of the user's: launch and tool scripts print its one line and exit with code 2."""


Positive = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0)]
Part = Literal["image", "text", "temporal", "aggregation", "logit_scale", "logit_bias"]


class Section(BaseModel):
    """A part of a recipe: unknown keys are refused and values cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)


class ImageTowerConfig(Section):
    """The image tower. `head` is what turns the backbone's feature map into an embedding.

    `attention_pool`: timm AttentionPool2d straight to the embedding width (open_clip's `abs_attn`).
    `attention_pool_linear`: the same, then a linear projection without bias.
    `average_linear`: average pool, norm, linear projection (open_clip's pretrained convnext_base_w).
    open_clip's ResNets (RN50, RN101, …) have an attention pool of their own and take `attention_pool` only.
    """

    backbone: str = "convnextv2_tiny"
    head: Literal["attention_pool", "attention_pool_linear", "average_linear"] = "attention_pool"
    image_size: int = Field(224, gt=0)
    drop_path: float = Field(0.0, ge=0, lt=1)
    # A weight file (.safetensors, .bin, .pt), `timm` for the backbone's released weights, or `hf-hub:owner/name`.
    pretrained: str | None = None
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[Positive, Positive, Positive] = (0.26862954, 0.26130258, 0.27577711)


# Where they differ from the fields' defaults: the sizes of each kind of text tower as it was released.
RELEASED_SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"width": 768, "heads": 12, "vocab_size": 50257, "tokenizer": "gpt2"},
}


class TextTowerConfig(Section):
    """The text tower: `clip` is open_clip's text transformer, `gpt2` Hugging Face GPT2Model + MLP projection."""

    kind: Literal["clip", "gpt2"] = "clip"
    width: int = Field(512, gt=0)
    heads: int = Field(8, gt=0)
    layers: int = Field(12, gt=0)
    context_length: int = Field(77, gt=0)
    vocab_size: int = Field(49408, gt=0)
    # A weight file, or `hf-hub:owner/name`; None: a fresh tower, or the text part of `model.pretrained`.
    pretrained: str | None = None
    # `open_clip` is its byte-pair tokenizer; anything else a Hugging Face tokenizer's folder or name.
    tokenizer: str = "open_clip"

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_kind(cls, values: Any) -> Any:
        """A kind's released sizes are its defaults, so that a recipe only names the kind."""
        if isinstance(values, dict) and isinstance(values.get("kind"), str):
            return {**RELEASED_SIZES.get(values["kind"], {}), **values}
        return values

    @model_validator(mode="after")
    def _heads_divide_width(self) -> TextTowerConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class Model(Section):
    """The dual tower. `pretrained` names one open_clip checkpoint that holds both towers."""

    embed_dim: int = Field(512, gt=0)
    image: ImageTowerConfig = ImageTowerConfig()
    text: TextTowerConfig = TextTowerConfig()
    pretrained: str | None = None
    init_logit_scale: float = math.log(1 / 0.07)
    # The sigmoid loss's bias; SigLIP starts it at -10, and init_logit_scale at ln 10 = 2.303. None: the model has none.
    init_logit_bias: float | None = None


class Data(Section):
    """Where samples come from and how they are read."""

    train: str | None = None
    val: str | None = None
    format: Literal["auto", "shards", "csv"] = "auto"
    # all: pass k of an epoch uses each image's k-th caption (COCO: 591,753 rows); one: one caption per image and epoch.
    captions: Literal["all", "one"] = "all"
    csv_image_key: str = "filepath"
    csv_caption_key: str = "title"
    csv_separator: str = ","
    crop_scale: tuple[float, float] = (0.9, 1.0)
    workers: int = Field(4, ge=0)
    # Samples are shuffled within this many shards at a time, so that reading stays local on slow disks.
    shuffle_shards: int = Field(64, gt=0)
    max_broken_share: float = Field(0.01, ge=0, le=1)
    max_image_pixels: int = Field(64_000_000, gt=0)
    # `pipe:` addresses run a shell command; they are refused unless this is set.
    allow_pipe: bool = False
    # Shards behind a URL are kept here after the first read.
    cache_folder: str | None = None

    @model_validator(mode="after")
    def _crop_is_a_range(self) -> Data:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale {[low, high]} is not a range of area shares: 0 < low <= high <= 1")
        return self


class BatchConfig(Section):
    """Batch arithmetic: micro batch x accumulation x world = global batch.

    With `accumulation` k, each of k micro batches has a contrastive loss of its own. With `micro` set, the step is
    chunked (GradCache): one loss over the whole global batch, towers run `micro` samples at a time.
    """

    global_: int = Field(384, alias="global", gt=0)
    accumulation: int = Field(1, gt=0)
    micro: int | None = Field(None, gt=0)
    # A chunked step keeps what the frozen parts of the towers gave, up to this much, instead of running them twice.
    keep_frozen_gib: float = Field(4.0, ge=0)

    @model_validator(mode="after")
    def _one_way(self) -> BatchConfig:
        if self.micro is not None and self.accumulation != 1:
            raise ValueError(
                "micro (one loss over chunks) and accumulation (a loss per micro batch) exclude each other"
            )
        return self

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
    warmup_steps: int = Field(0, ge=0)
    # A share of all steps; used when warmup_steps is 0.
    warmup_share: float = Field(0.0, ge=0, lt=1)
    clip_grad_norm: float | None = Field(None, gt=0)
    max_logit_scale: float = math.log(100)
    # lr of a part of the model as a multiple of `lr`.
    part_lr_scale: dict[Part, Positive] = {}
    # lr follows the global batch: multiplied by (global / reference_batch), or its square root.
    scale_lr_with_batch: Literal["none", "linear", "sqrt"] = "none"
    reference_batch: int = Field(384, gt=0)


class Unfreeze(Section):
    """One unfreeze event: before `step` or the first of `epoch`, the last n groups or layers, or all, of a tower."""

    tower: Literal["image", "text"]
    epoch: int | None = Field(None, ge=0)
    step: int | None = Field(None, ge=0)
    groups: int | None = Field(None, gt=0)
    layers: int | None = Field(None, gt=0)
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
    # Linear warm-up of a newly unfrozen group, in steps after its event.
    new_warmup_steps: int = Field(0, ge=0)

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
    end_step: int | None = Field(None, gt=0)


class HeadAlignment(Section):
    """The pretrained average-pool + linear head, frozen, as a reference on the same feature map."""

    kind: Literal["cosine", "mse"] = "cosine"
    weight: float = Field(1.0, ge=0)
    end_step: int | None = Field(None, gt=0)


class Video(Section):
    """Video-text training (TeachCLIP): the data are MSR-VTT's CSVs, the model is a dual tower with a video head.

    A loss without its weight is off; `weights` are those of the ground truth, the coarse and the fine loss.
    """

    # MSR-VTT's JSON, for split CSVs without captions of their own; the folder that make_shards.py --kind video wrote.
    annotations: str | None = None
    frame_store: str | None = None
    frames: int = Field(12, gt=0)
    words: int = Field(32, gt=2)
    temporal_layers: int = Field(4, gt=0)
    # Where the temporal transformer starts: from the text tower's first blocks, or passing frames unchanged.
    temporal_init: Literal["text", "identity"] = "text"
    # False: padded frames count, as in the original.
    mask_padding: bool = True
    # Stores of extract_features.py --kind xclip (.h5), or X-CLIP checkpoints to run live; averaged.
    teachers: tuple[str, ...] = ()
    coarse: Literal["pearson", "ce"] = "pearson"
    weights: tuple[Weight, Weight, Weight] = (0.2, 1.0, 2.0)


class Features(Section):
    """Work of frozen parts: `live` does it every step, `fill` does it once before the first step and stores it in the
    run's folder, `store` reads a file of tools/extract_features.py. A recipe may write the mode alone, or a path.

    With `views`, image crops are one of so many per image (1: the evaluation crop) in every mode, so that live and
    stored runs see the same; without it, a live run draws a new crop each time.
    """

    mode: Literal["live", "fill", "store"] = "live"
    store: str | None = None
    views: int | None = Field(None, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, values: Any) -> Any:
        if isinstance(values, str):
            return {"mode": values} if values in ("live", "fill") else {"mode": "store", "store": values}
        return values

    @model_validator(mode="after")
    def _store_has_a_path(self) -> Features:
        if (self.mode == "store") != (self.store is not None):
            raise ValueError("mode store needs store, the path of a feature file; the other modes take none")
        return self

    @property
    def view_count(self) -> int | None:
        """Views per image; None draws a crop per row."""
        return self.views or (None if self.mode == "live" else 1)


class Loss(Section):
    """The contrastive loss: CLIP's `softmax` or SigLIP's `sigmoid`, which wants `model.init_logit_bias`.

    `tile` bounds the block of logits held at a time; None holds all of a rank's rows.
    """

    kind: Literal["softmax", "sigmoid"] = "softmax"
    tile: int | None = Field(None, gt=0)
    # Rows of one image are never each other's negatives.
    mask_same_image: bool = False


class EvaluationConfig(Section):
    """Retrieval evaluation in training: every so many epochs, and after the last."""

    every_epochs: int = Field(1, ge=0)
    batch: int = Field(128, gt=0)


class Checkpoint(Section):
    """When to save: `keep_last` newest are kept, and `best` by mean standard R@1."""

    every_epochs: int = Field(1, ge=0)
    every_steps: int = Field(0, ge=0)
    keep_last: int = Field(2, gt=0)


class Recipe(Section):
    """One experiment, whole."""

    name: str
    description: str = ""
    seed: int = Field(0, ge=0)
    epochs: int = Field(gt=0)
    # Stop after this many steps; the schedule then ends there too.
    max_steps: int | None = Field(None, gt=0)
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
    activation_checkpointing: bool = False
    log_every: int = Field(10, gt=0)
    # Stop after this many steps in a row without a finite loss.
    max_bad_steps: int = Field(10, gt=0)
    # Rows of one epoch and expected training images, for --plan without data (COCO train2017: 591,753 captions).
    rows_per_epoch: int | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _sigmoid_has_a_bias(self) -> Recipe:
        if (self.loss.kind == "sigmoid") != (self.model.init_logit_bias is not None):
            raise ValueError(
                "loss.kind sigmoid and model.init_logit_bias (SigLIP: -10) go together: set both or neither"
            )
        return self

    @model_validator(mode="after")
    def _video_has_losses_of_its_own(self) -> Recipe:
        if self.video is None:
            return self
        for name, is_set in (
            ("teacher", self.teacher is not None),
            ("head_alignment", self.head_alignment is not None),
            ("batch.micro", self.batch.micro is not None),
            ("loss.kind", self.loss.kind != "softmax"),
            ("loss.mask_same_image", self.loss.mask_same_image),
            ("features.views", self.features.views is not None),
        ):
            if is_set:
                raise ValueError(f"{name} is for image-text training and cannot be used with video: remove it")
        return self

    def to_yaml(self) -> str:
        """The resolved recipe as YAML; `load_recipe` reads it back unchanged."""
        return yaml.safe_dump(self.model_dump(mode="json", by_alias=True), sort_keys=False)
