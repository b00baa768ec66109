"""timm's convolutional backbones with one of five heads, under the names of open_clip's TimmModel.

Parameters are `trunk.*` and `head.*`, so weights travel both ways unchanged. Only the trunk's own classifier has
another name, `head.fc`: a head is never locked, the trunk is.
Shapes: B batch, C channels and H.W size of a feature map, D embed.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Collection, Iterable
from typing import Any, Protocol, cast

import timm
import torch
from torch import Tensor, nn

from convclip import schema
from convclip.models.attention_pool import TIMM_HEAD_WIDTH, AttentionPool
from convclip.models.efficientnet_names import BACKBONES, MARK, timm_names
from convclip.models.image_heads import CLASSIFIER, MLP, OWN, classifiers_of, mlp_head, own_head
from convclip.models.timm_units import TrunkUnits, timm_groups, trunk_units
from convclip.models.tower import ImageTower, Layer, Unit, names_under

# schema.ImageTowerConfig.head -> open_clip's (timm_pool, timm_proj)
_OPEN_CLIP_HEADS = {
    "attention_pool": ("abs_attn", ""),
    "attention_pool_linear": ("abs_attn", "linear"),
    "average_linear": ("", "linear"),
    MLP: ("", "mlp"),
    OWN: ("avg", None),
}


class _Trunk(Protocol):
    """What every timm backbone has beside what an nn.Module has; timm declares no class of it."""

    default_cfg: dict[str, Any]
    num_features: int

    def set_grad_checkpointing(self, enable: bool = True) -> None: ...


class TimmImage(ImageTower):
    """A timm backbone with a two-dimensional feature map and a head (`schema.ImageTowerConfig.head`).

    Layer groups are those of timm's `group_matcher`. Where it can be cut between them: `convclip.models.timm_units`.
    `channels_last` stays off: on CPU (one thread, convnextv2_tiny at 224 px, batch 8, forward and backward) it took
    0.94x the time in float32 and 1.08x in bfloat16, within noise of none at all. Try it where there is a GPU.
    """

    may_be_new = ("head.",)

    def __init__(self, config: schema.ImageTowerConfig, embed_dim: int):
        """Random weights. Errors: UserError when the backbone is unknown or has no feature map for the head."""
        super().__init__()
        self.trunk = build_trunk(config)
        self.head = _build_head(self.trunk, config, embed_dim)
        self._groups = timm_groups(self.trunk)
        self._found = _watched(config)

    @classmethod
    def build(cls, config: schema.ImageTowerConfig, embed_dim: int) -> TimmImage:
        """Random weights. Errors: UserError as `__init__`."""
        return cls(config, embed_dim)

    def units(self) -> list[Unit]:
        """One unit per layer group of most trunks; several groups in one where the trunk is no chain of modules."""
        return self._found.modules(self.trunk)

    def layers(self) -> list[Layer]:
        """timm's layer groups of the trunk; a ConvNeXt's last is its final norm."""
        return [tuple(self.trunk.get_parameter(name) for name in group) for group in self._groups]

    def embed_head(self) -> nn.Module:
        """`head`: attention pool, its projection, or the projection alone."""
        return self.head

    @property
    def cuts(self) -> list[int]:
        """From each unit to the next."""
        return list(self._found.cuts)

    @property
    def map_cut(self) -> int:
        """Before what the trunk runs on its last map with parameters: a ConvNeXt's final norm."""
        return self._found.map_cut

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Unit by unit; a trunk that is one unit uses timm's own checkpointing inside it."""
        if len(self._found.units) > 1:
            super().set_grad_checkpointing(enable)
        else:
            _as_timm(self.trunk).set_grad_checkpointing(enable)

    def released_names(self, names: Collection[str]) -> dict[str, str]:
        """The image part of an open_clip checkpoint, or a timm file without its classifier.

        Of an open_clip checkpoint the head is left out where it is of another kind.
        """
        classifiers = classifiers_of(self.trunk)
        part = names_under("visual.", names)
        if part:
            part = {name: _as_head(own, classifiers) for name, own in part.items()}
            same_head = _head_parts(part.values()) == _head_parts(name for name, _ in self.named_parameters())
            return {name: own for name, own in part.items() if same_head or not own.startswith("head.")}
        timms = self._timm_names(names)
        return {name: f"trunk.{timm}" for name, timm in timms.items() if not timm.startswith(classifiers)}

    def _timm_names(self, names: Collection[str]) -> dict[str, str]:
        """The names of a release of the trunk -> timm's, which most have."""
        architecture = str(_as_timm(self.trunk).default_cfg.get("architecture"))
        if MARK not in names or not architecture.startswith(BACKBONES):
            return {name: name for name in names}
        blocks = [name.removesuffix(".conv_dw") for name, _ in self.trunk.named_modules() if name.endswith(".conv_dw")]
        return timm_names(names, blocks)

    def timm_weights(self, config: schema.ImageTowerConfig) -> dict[str, Tensor]:
        """timm's release of the backbone under timm's names. Errors: UserError when it cannot be had."""
        try:
            return build_trunk(config, pretrained=True).state_dict()
        except (OSError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise schema.UserError(
                f"model.image.pretrained: timm's weights of {config.backbone} cannot be had ({reason}); "
                "where there is no network, name a downloaded file"
            ) from None

    def exported_name(self, name: str) -> str:
        """open_clip has the trunk's own classifier in the trunk."""
        own = f"head.{CLASSIFIER}."
        return f"trunk.{classifiers_of(self.trunk)[0]}{name.removeprefix(own)}" if name.startswith(own) else name

    def open_clip_config(self, config: schema.Model) -> dict[str, Any] | None:
        """open_clip's `vision_cfg` for its TimmModel; None for an attention pool of a width that it has none for."""
        image = config.image
        if image.head.startswith("attention_pool") and _width(self.trunk) % TIMM_HEAD_WIDTH:
            return None
        pool, projection = _OPEN_CLIP_HEADS[image.head]
        vision = {"timm_model_name": image.backbone, "timm_model_pretrained": False, "image_size": image.image_size}
        vision |= {"timm_pool": pool, "timm_proj": projection, "timm_drop": 0.0}
        if image.drop_path:
            vision["timm_drop_path"] = image.drop_path
        return vision


def build_trunk(config: schema.ImageTowerConfig, pretrained: bool = False) -> nn.Module:
    """The timm backbone without its classifier; without its pool too when the head is an attention pool.

    `pretrained` fetches timm's released weights. Errors: UserError when timm does not know the name, or the backbone's
    output is no map [B, C, H, W].
    """
    options: dict = {"num_classes": 0, "pretrained": pretrained}
    if config.head.startswith("attention_pool"):
        options["global_pool"] = ""
    if config.drop_path:
        options["drop_path_rate"] = config.drop_path
    if not timm.is_model(config.backbone):
        near = difflib.get_close_matches(config.backbone, timm.list_models(), n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise schema.UserError(f"model.image.backbone: timm and open_clip know no {config.backbone!r}{hint}")
    try:
        trunk = timm.create_model(config.backbone, **options)
    except TypeError as error:
        raise schema.UserError(f"model.image: {config.backbone} refuses an option: {error}") from None
    if _as_timm(trunk).default_cfg.get("pool_size") is None or getattr(trunk, "output_fmt", "NCHW") != "NCHW":
        raise schema.UserError(
            f"model.image.backbone: {config.backbone} gives no feature map [B, C, H, W]; use a convolutional one"
        )
    return trunk


@functools.lru_cache(maxsize=64)
def _watched(config: schema.ImageTowerConfig) -> TrunkUnits:
    """Where trunks of that configuration can be cut; watching one takes a tenth of a second to one second."""
    with torch.device("meta"):
        trunk = build_trunk(config)
    return trunk_units(trunk, timm_groups(trunk), config.image_size)


def _build_head(trunk: nn.Module, config: schema.ImageTowerConfig, embed_dim: int) -> nn.Sequential:
    about, kind = _as_timm(trunk), config.head
    width = _width(trunk)
    if kind == MLP:
        return mlp_head(width, embed_dim)
    if kind == OWN:
        return own_head(trunk, config.backbone, width, embed_dim)
    head = nn.Sequential()
    if kind != "average_linear":
        # The position table has timm's map size for the backbone, as open_clip's, whatever the image size: the pool
        # resamples it. (A table of image_size // 32 would not load into open_clip, nor its weights here.)
        head.add_module("pool", AttentionPool(width, about.default_cfg["pool_size"], embed_dim))
    if kind != "attention_pool":
        head.add_module("proj", nn.Linear(width if kind == "average_linear" else embed_dim, embed_dim, bias=False))
    return head


def _width(trunk: nn.Module) -> int:
    """Channels of the trunk's output."""
    return getattr(trunk, "head_hidden_size", None) or _as_timm(trunk).num_features


def _as_timm(trunk: nn.Module) -> _Trunk:
    return cast(_Trunk, trunk)


def _head_parts(names: Iterable[str]) -> set[str]:
    """The head's modules: pool, proj, mlp, fc."""
    return {name.split(".")[1] for name in names if name.startswith("head.")}


def _as_head(name: str, classifiers: tuple[str, ...]) -> str:
    """The name here of a tensor that open_clip has in the trunk's classifier; others as they are."""
    for classifier in classifiers:
        if name.startswith(f"trunk.{classifier}"):
            return f"head.{CLASSIFIER}.{name.removeprefix(f'trunk.{classifier}')}"
    return name
