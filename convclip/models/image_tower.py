"""Image towers: a convolutional trunk and the head that turns its last feature map into an embedding.

Parameter names are open_clip's (`trunk.*` and `head.*` of its TimmModel, its ModifiedResNet's own for RN50, …), so
weights travel both ways unchanged. Shapes: B batch, C channels and H.W size of a feature map, D embed.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Sequence

import open_clip
import timm
import torch
from open_clip.modified_resnet import ModifiedResNet
from timm.models import group_parameters
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from convclip import schema
from convclip.models.attention_pool import AttentionPool

Unit = tuple[nn.Module, ...]


class CuttableTower(nn.Module):
    """An image tower that can run in two parts, so that what is locked below a cut need not run again.

    A cut is a *boundary*: the number of layer groups, counted from the input, that lie below it. 0 is the images
    themselves, `groups` the whole trunk. A subclass says how many `groups` there are and lists its `units()`.
    """

    groups: int
    # Layout of activations only: DeepSpeed refuses channels_last weights. See `ImageTower` for what it is worth.
    channels_last: bool = False
    checkpointing: bool = False

    def units(self) -> list[Unit]:
        """The trunk from input to output as modules to run in turn, one tuple per layer group."""
        raise NotImplementedError

    def embed_head(self) -> nn.Module:
        """The module that turns the trunk's output into an embedding; never locked."""
        raise NotImplementedError

    @property
    def boundaries(self) -> list[int]:
        """Boundaries at which this tower can be cut, ascending."""
        return list(range(self.groups + 1))

    @property
    def map_boundary(self) -> int:
        """The boundary at which `feature_map` stands: what follows is the final norm, if any, and the head."""
        return self.groups

    def forward_prefix(self, images: Tensor, boundary: int) -> Tensor:
        """Images [B, 3, H, W] (float) -> the activation that enters layer group `boundary`, [B, C, H', W']."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        images = images.to(dtype=next(self.parameters()).dtype).contiguous(memory_format=layout)
        return self._run(self.units()[: self._unit_index(boundary)], images)

    def forward_between(self, features: Tensor, boundary: int, stop: int) -> Tensor:
        """What enters layer group `boundary` -> what enters layer group `stop`; boundary 0 takes images."""
        if boundary == 0:
            return self.forward_prefix(features, stop)
        return self._run(self.units()[self._unit_index(boundary) : self._unit_index(stop)], features)

    def forward_from(self, features: Tensor, boundary: int) -> Tensor:
        """What `forward_prefix` gave at `boundary` -> embeddings [B, D], not normalised."""
        return self.embed_head()(self._run(self.units()[self._unit_index(boundary) :], features))

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] (float, mean and std taken out) -> embeddings [B, D], not normalised."""
        return self.forward_from(self.forward_prefix(images, 0), 0)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each unit's activations in the backward pass instead of keeping them."""
        self.checkpointing = enable

    def _unit_index(self, boundary: int) -> int:
        if boundary not in self.boundaries:
            raise ValueError(f"this tower cannot be cut at layer group {boundary}; it can at {self.boundaries}")
        return self.boundaries.index(boundary)

    def _run(self, units: Sequence[Unit], x: Tensor) -> Tensor:
        recompute = self.checkpointing and torch.is_grad_enabled()
        for unit in units:
            if recompute and (x.requires_grad or any(p.requires_grad for module in unit for p in module.parameters())):
                x = checkpoint(_run_unit, unit, x, use_reentrant=False, context_fn=lambda u=unit: _contexts(u))
            else:
                x = _run_unit(unit, x)
        return x


class ImageTower(CuttableTower):
    """A timm backbone with a two-dimensional feature map and one of three heads (`schema.ImageTowerConfig.head`).

    ConvNeXt trunks can be cut at every layer group of timm's `group_matcher`; others only at 0 and at their end.
    `channels_last` stays off: on CPU (one thread, convnextv2_tiny at 224 px, batch 8, forward and backward) it took
    0.94x the time in float32 and 1.08x in bfloat16, within noise of none at all. Try it where there is a GPU.
    """

    def __init__(self, config: schema.ImageTowerConfig, embed_dim: int):
        """Random weights. Errors: UserError when the backbone is unknown or has no feature map for the head."""
        super().__init__()
        self.trunk = build_trunk(config)
        self.head = _build_head(self.trunk, config.head, embed_dim)
        self.groups = len(group_parameters(self.trunk, self.trunk.group_matcher()))
        self._is_cuttable = isinstance(self.trunk, ConvNeXt) and len(_convnext_units(self.trunk)) == self.groups

    def units(self) -> list[Unit]:
        """One unit per layer group of a ConvNeXt; the whole trunk as one for every other backbone."""
        return _convnext_units(self.trunk) if self._is_cuttable else [(self.trunk,)]

    def embed_head(self) -> nn.Module:
        """`head`: attention pool, its projection, or the projection alone."""
        return self.head

    @property
    def boundaries(self) -> list[int]:
        """Every layer group for a ConvNeXt, else [0, groups]."""
        return super().boundaries if self._is_cuttable else [0, self.groups]

    @property
    def map_boundary(self) -> int:
        """Before a ConvNeXt's final norm, which is its last layer group."""
        return self.groups - 1 if self._is_cuttable else self.groups

    def feature_map(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> the trunk's last map [B, C, H', W'], before the trunk's own final norm and pool."""
        if self._is_cuttable:
            return self.forward_prefix(images, self.groups - 1)
        return self.trunk.forward_features(self.forward_prefix(images, 0))

    def embed_map(self, features: Tensor) -> Tensor:
        """What `feature_map` gave -> embeddings [B, D]: the trunk's final norm (and pool), then the head."""
        if self._is_cuttable:
            return self.forward_from(features, self.groups - 1)
        return self.head(self.trunk.forward_head(features))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As `CuttableTower`; a trunk that is one unit uses timm's own checkpointing inside it."""
        if self._is_cuttable:
            super().set_grad_checkpointing(enable)
        else:
            self.trunk.set_grad_checkpointing(enable)


class ResNetTower(CuttableTower, ModifiedResNet):
    """open_clip's ResNet with its own attention pool: RN50, RN101, RN50x4, … Cut at the stem and its four stages.

    `channels_last` is on: on CPU a ResNet-50 step takes 0.88x the time in float32 and 0.78x in bfloat16.
    """

    groups = 5
    channels_last = True

    def units(self) -> list[Unit]:
        """The stem and the four stages."""
        names = ("conv1", "bn1", "act1", "conv2", "bn2", "act2", "conv3", "bn3", "act3", "avgpool")
        stem = tuple(getattr(self, name) for name in names)
        return [stem, (self.layer1,), (self.layer2,), (self.layer3,), (self.layer4,)]

    def embed_head(self) -> nn.Module:
        """The attention pool with its output projection."""
        return self.attnpool

    def feature_map(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> the last stage's map [B, C, H/32, W/32]."""
        return self.forward_prefix(images, self.groups)

    def embed_map(self, features: Tensor) -> Tensor:
        """What `feature_map` gave -> embeddings [B, D]."""
        return self.forward_from(features, self.groups)


def build_image_tower(config: schema.ImageTowerConfig, embed_dim: int) -> ImageTower | ResNetTower:
    """The tower that `config` describes, with random weights; works under `torch.device("meta")`."""
    sizes = resnet_sizes(config.backbone)
    if sizes is None:
        return ImageTower(config, embed_dim)
    if config.head != "attention_pool":
        raise schema.UserError(
            f"model.image.head: {config.backbone} has a pool of its own; set attention_pool instead of {config.head}"
        )
    if config.image_size % 32 or config.drop_path:
        raise schema.UserError(f"model.image: {config.backbone} needs an image_size that 32 divides, and drop_path 0")
    heads = sizes["width"] * 32 // sizes.get("head_width", 64)
    return ResNetTower(sizes["layers"], embed_dim, heads, config.image_size, sizes["width"])


def resnet_sizes(backbone: str) -> dict | None:
    """open_clip's `vision_cfg` (layers, width, …) if `backbone` is one of its ResNets, else None."""
    sizes = (open_clip.get_model_config(backbone) or {}).get("vision_cfg", {})
    return sizes if isinstance(sizes.get("layers"), list) else None


def build_trunk(config: schema.ImageTowerConfig, pretrained: bool = False) -> nn.Module:
    """The timm backbone without its classifier; without its pool too when the head is an attention pool.

    `pretrained` fetches timm's released weights. Errors: UserError when timm does not know the name, or the backbone's
    output is no map [B, C, H, W].
    """
    options: dict = {"num_classes": 0, "pretrained": pretrained}
    if config.head != "average_linear":
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
    if trunk.default_cfg.get("pool_size") is None or getattr(trunk, "output_fmt", "NCHW") != "NCHW":
        raise schema.UserError(
            f"model.image.backbone: {config.backbone} gives no feature map [B, C, H, W]; use a convolutional one"
        )
    return trunk


def _build_head(trunk: nn.Module, kind: str, embed_dim: int) -> nn.Sequential:
    width = getattr(trunk, "head_hidden_size", None) or trunk.num_features
    head = nn.Sequential()
    if kind != "average_linear":
        if width % 64:
            raise schema.UserError(
                f"model.image.head: an attention pool needs a trunk width divisible by 64, not {width}"
            )
        # The position table has timm's map size for the backbone, as open_clip's, whatever the image size: the pool
        # resamples it. (A table of image_size // 32 would not load into open_clip, nor its weights here.)
        head.add_module("pool", AttentionPool(width, trunk.default_cfg["pool_size"], embed_dim))
    if kind != "attention_pool":
        head.add_module("proj", nn.Linear(width if kind == "average_linear" else embed_dim, embed_dim, bias=False))
    return head


def _convnext_units(trunk: ConvNeXt) -> list[Unit]:
    units: list[Unit] = [(trunk.stem,)]
    for stage in trunk.stages:
        first, *others = stage.blocks
        # timm groups a stage's downsampling with its first block.
        units += [(stage.downsample, first), *((block,) for block in others)]
    return [*units, (trunk.norm_pre, trunk.head)]


def _run_unit(unit: Unit, x: Tensor) -> Tensor:
    for module in unit:
        x = module(x)
    return x


def _contexts(unit: Unit) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """For `checkpoint`: nothing around the first pass, batch norms held still around the recomputation."""
    return contextlib.nullcontext(), _running_statistics_kept(unit)


@contextlib.contextmanager
def _running_statistics_kept(unit: Unit) -> Iterator[None]:
    """Without this a recomputed batch norm would count its batch into the running statistics twice."""
    norms = [m for module in unit for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
