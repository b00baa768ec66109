"""The sections of a recipe for the model and its data: towers, data, features, video."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from convclip.sections.base import MAX_PIXELS, Count, Depth, Positive, Section, Weight, Width
from convclip.sections.released import filled_in

Strength = Annotated[float, Field(ge=0, le=2)]
HueStrength = Annotated[float, Field(ge=0, le=0.5)]


class ImageTowerConfig(Section):
    """The image tower. `head` is what turns the backbone's feature map into an embedding.

    `attention_pool`: timm AttentionPool2d straight to the embedding width (open_clip's `abs_attn`).
    `attention_pool_linear`: the same, then a linear projection without bias.
    `average_linear`: average pool, norm, linear projection (open_clip's pretrained convnext_base_w).
    `mlp`: the same with two linear layers and a GELU between them (convnext_large_d).
    `none`: the backbone's own average pool and classifier, as wide as the embedding (MobileCLIP).
    open_clip's ResNets (RN50, RN101, …) have an attention pool of their own and take `attention_pool` only.
    """

    backbone: str = "convnextv2_tiny"
    head: Literal["attention_pool", "attention_pool_linear", "average_linear", "mlp", "none"] = "attention_pool"
    # Pixels of a side. The backbones halve an image five times.
    image_size: int = Field(224, ge=32, le=4096)
    drop_path: float = Field(0.0, ge=0, lt=1)
    # A weight file (.safetensors, .bin, .pt), `timm` for the backbone's released weights, or `hf-hub:owner/name`.
    pretrained: str | None = None
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[Positive, Positive, Positive] = (0.26862954, 0.26130258, 0.27577711)
    # How images are resized.
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"

    later: ClassVar[tuple[str, ...]] = ("interpolation",)


# The released sizes of each kind of text tower, where they differ from the fields' defaults.
RELEASED_SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"width": 768, "heads": 12, "vocab_size": 50257, "tokenizer": "gpt2"},
    # 1: what the encoder's own config.json says. A width of 1 would be no tower.
    "hf": {"width": 1, "heads": 1, "layers": 1, "vocab_size": 1, "tokenizer": "model"},
}
# Fields that only kind hf has.
HF_FIELDS = ("model", "config", "pool", "projection")


class TextTowerConfig(Section):
    """The text tower: `clip` is open_clip's text transformer, `gpt2` Hugging Face GPT2Model + MLP projection, `hf` the
    Hugging Face encoder `model`, whose config.json says its sizes.
    """

    kind: Literal["clip", "gpt2", "hf"] = "clip"
    width: Width = 512
    heads: Width = 8
    layers: Depth = 12
    context_length: Width = 77
    vocab_size: int = Field(49408, gt=0, le=2**24)
    # A weight file, or `hf-hub:owner/name`; None: a fresh tower, or the text part of `model.pretrained`.
    pretrained: str | None = None
    # `open_clip` is its byte-pair tokenizer, `model` that of `model`; anything else a Hugging Face tokenizer's folder
    # or name.
    tokenizer: str = "open_clip"
    # Of `clip`: QuickGELU is x * sigmoid(1.702 x), which OpenAI trained with.
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    # Of `clip`: false lets every token attend to every other, the padding to the context's length too (MobileCLIP).
    causal: bool = True
    # Kind hf: a folder of config.json, tokenizer and weights, or a name on the Hugging Face hub. Without one, `config`
    # says what to build, with random weights.
    model: str | None = Field(None, min_length=1)
    # Kind hf: config.json of `model`. A run reads it when it starts and keeps it: of a folder that has moved since only
    # the tokenizer is needed, by `tokenizer`.
    config: dict[str, Any] | None = None
    # Kind hf: what becomes of the last hidden states, and the way from the encoder's width to `embed_dim`. `mlp` is
    # width -> (width + embed_dim) / 2 -> embed_dim, GELU between; both are without bias.
    pool: Literal["mean", "cls", "last", "max"] = "mean"
    projection: Literal["linear", "mlp", "none"] = "mlp"

    later: ClassVar[tuple[str, ...]] = ("activation", "causal")

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_kind(cls, values: Any) -> Any:
        """A kind's released sizes are its defaults, so that a recipe only names the kind."""
        if isinstance(values, dict) and isinstance(values.get("kind"), str):
            return {**RELEASED_SIZES.get(values["kind"], {}), **values}
        return values

    @field_validator("model")
    @classmethod
    def _hub_name(cls, model: str | None) -> str | None:
        """`hf-hub:owner/name`, as other places of weights are written, is a hub name too."""
        return None if model is None else model.removeprefix("hf-hub:")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> TextTowerConfig:
        # An encoder's heads may be of another width, as T5's are.
        if self.kind != "hf" and self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self

    @model_validator(mode="after")
    def _fields_of_kind(self) -> TextTowerConfig:
        if self.kind == "hf":
            if self.model is None and self.config is None:
                raise ValueError("kind hf needs `model`: a folder of config.json, tokenizer and weights, or a hub name")
            if self.model is None and self.tokenizer == "model":
                raise ValueError("`tokenizer` is that of `model`, which is not set: set either")
        for kind, names in (("hf", HF_FIELDS), ("clip", ("activation", "causal"))):
            for name in names if self.kind != kind else ():
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"`{name}` goes with kind {kind}, this is kind {self.kind}: remove it")
        return self

    def _left_out(self, as_before: bool) -> tuple[str, ...]:
        """Only kind hf names its fields: what older recipes, exports and feature stores say of other kinds stays."""
        return (*super()._left_out(as_before), *(() if self.kind == "hf" else HF_FIELDS))


class Model(Section):
    """The dual tower. `pretrained` names one open_clip checkpoint that holds both towers.

    `open_clip` names one of open_clip's models: it gives every field of the towers that the recipe does not, and
    `pretrained` may then be one of its tags. Both are filled in when the recipe loads, and are not stored.
    """

    open_clip: str | None = Field(None, exclude=True)
    embed_dim: Width = 512
    image: ImageTowerConfig = ImageTowerConfig()
    text: TextTowerConfig = TextTowerConfig()
    pretrained: str | None = None
    # Of the logarithm: logits are multiplied by exp of it.
    init_logit_scale: float = Field(math.log(1 / 0.07), ge=-20, le=20)
    # The sigmoid loss's bias; SigLIP starts it at -10, and init_logit_scale at ln 10 = 2.303. None: the model has none.
    init_logit_bias: float | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_open_clip(cls, values: Any) -> Any:
        named = isinstance(values, dict) and values.get("open_clip") is not None
        return filled_in(values) if named else values


class Data(Section):
    """Where samples come from and how they are read."""

    train: str | None = Field(None, min_length=1)
    val: str | None = Field(None, min_length=1)
    format: Literal["auto", "shards", "csv"] = "auto"
    # all: pass k of an epoch uses each image's k-th caption (COCO: 591,753 rows); one: one caption per image and epoch.
    captions: Literal["all", "one"] = "all"
    csv_image_key: str = Field("filepath", min_length=1)
    csv_caption_key: str = Field("title", min_length=1)
    csv_separator: str = Field(",", min_length=1)
    # The share of its area that a training image's crop has.
    crop_scale: tuple[float, float] = (0.9, 1.0)
    # How often a rectangle of a training image, 2 % to a third of it, becomes noise.
    random_erasing: float = Field(0.0, ge=0, le=1)
    # How far brightness, contrast and saturation (factors around 1) and hue (a share of the circle) of a training image
    # may move, and how often they do.
    color_jitter: tuple[Strength, Strength, Strength, HueStrength] = (0.0, 0.0, 0.0, 0.0)
    color_jitter_probability: float = Field(1.0, gt=0, le=1)
    workers: int = Field(4, ge=0, le=1024)
    # Samples are shuffled within this many shards at a time, so that reading stays local on slow disks.
    shuffle_shards: Count = 64
    max_broken_share: float = Field(0.01, ge=0, le=1)
    max_image_pixels: int = Field(MAX_PIXELS, gt=0, le=2**40)
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

    @model_validator(mode="after")
    def _probability_of_something(self) -> Data:
        if self.color_jitter_probability != 1 and not any(self.color_jitter):
            raise ValueError("color_jitter_probability goes with color_jitter, which is all 0: set it, or remove both")
        return self

    @property
    def augments(self) -> bool:
        """Whether training images are changed beside their crop."""
        return bool(self.random_erasing or any(self.color_jitter))


class Features(Section):
    """Work of frozen parts: `live` does it every step, `fill` does it once before the first step and stores it in the
    run's folder, `store` reads a file of tools/extract_features.py. A recipe may write the mode alone, or a path.

    With `views`, image crops are one of so many per image (1: the evaluation crop) in every mode, so that live and
    stored runs see the same; without it, a live run draws a new crop each time.
    """

    mode: Literal["live", "fill", "store"] = "live"
    store: str | None = None
    views: Count | None = None

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, values: Any) -> Any:
        return cls.long_form(values)

    @classmethod
    def long_form(cls, values: Any) -> Any:
        """`live`, `fill` or a path as mode and store; it says nothing of the views."""
        if isinstance(values, str):
            mode = values if values in ("live", "fill") else "store"
            return {"mode": mode, "store": values if mode == "store" else None}
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


class Video(Section):
    """Video-text training (TeachCLIP): the data are MSR-VTT's CSVs, the model is a dual tower with a video head.

    A loss without its weight is off; `weights` are those of the ground truth, the coarse and the fine loss.
    """

    # MSR-VTT's JSON, for split CSVs without captions of their own; the folder that make_shards.py --kind video wrote.
    annotations: str | None = None
    frame_store: str | None = None
    frames: Depth = 12
    words: int = Field(32, gt=2, le=2**16)
    temporal_layers: Depth = 4
    # Where the temporal transformer starts: from the text tower's first blocks, or passing frames unchanged.
    temporal_init: Literal["text", "identity"] = "text"
    # False: padded frames count, as in the original.
    mask_padding: bool = True
    # Stores of extract_features.py --kind xclip (.h5), or X-CLIP checkpoints to run live; averaged.
    teachers: tuple[str, ...] = ()
    coarse: Literal["pearson", "ce"] = "pearson"
    weights: tuple[Weight, Weight, Weight] = (0.2, 1.0, 2.0)
