"""The interface of a tower, for images and for text.

A new tower is one class in a file of its own: a subclass of `ImageTower` or `TextTower` that fills in the methods which
raise NotImplementedError here, and an entry in `convclip.models.towers`.
Shapes: B batch, C channels and H.W size of a feature map, T tokens, D embed.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from convclip import schema

# The parameters of a layer group, held by modules or on their own, in the order in which they work.
Layer: TypeAlias = tuple[nn.Module | nn.Parameter, ...]
# Modules that run one after another.
Unit: TypeAlias = tuple[nn.Module, ...]
# What enters a layer group: hidden states [B, T, C], or [B, C] above the last block, and the end positions [B].
TextPrefix: TypeAlias = tuple[Tensor, Tensor]


class Tower(nn.Module):
    """Layer groups from input to output, then a head that is never locked.

    A **cut** is the number of layer groups, counted from the input, that lie below it: 0 is the input itself,
    the number of all groups is what enters the head. What is locked below a cut need not run again.
    """

    # Whether activations are recomputed in the backward pass.
    checkpointing: bool = False
    # Beginnings of the names that a file of released weights may lack as a whole, because they are new here.
    may_be_new: tuple[str, ...] = ()

    def layers(self) -> list[Layer]:
        """The layer groups from input to output; each parameter that is not the head's is in exactly one of them."""
        raise NotImplementedError

    def embed_head(self) -> nn.Module:
        """What turns the layers' output into an embedding; `nn.Identity()` where nothing does."""
        raise NotImplementedError

    def released_names(self, names: Collection[str]) -> dict[str, str]:
        """The names in a file of released weights -> ours. Left out: what is no weight of this tower."""
        raise NotImplementedError

    def exported_name(self, name: str) -> str:
        """The name that open_clip has for a parameter or buffer of this tower, where it is not the same."""
        return name

    def open_clip_config(self, config: schema.Model) -> dict[str, Any] | None:
        """Its part of open_clip's `model_cfg` (vision_cfg or text_cfg); None where open_clip has no such tower."""
        return None

    @property
    def cuts(self) -> list[int]:
        """Where this tower can be cut, ascending."""
        return list(range(len(self.layers()) + 1))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each layer's activations in the backward pass instead of keeping them."""
        self.checkpointing = enable

    def layer_groups(self) -> list[list[str]]:
        """Parameter names of each layer group, from input to output. Works on the meta device and in ZeRO-3.

        Errors: ValueError when a parameter is in no group and not the head's, or in more than one.
        """
        groups = [self._names(layer) for layer in self.layers()]
        known = Counter(name for group in (*groups, self.head_names()) for name in group)
        for name, _ in self.named_parameters():
            if known[name] != 1:
                raise ValueError(f"{name} is in {known[name]} layer groups of {type(self).__name__}, not in one")
        return groups

    def head_names(self) -> list[str]:
        """Parameter names of the head."""
        return self._names((self.embed_head(),))

    def _names(self, layer: Layer) -> list[str]:
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        return [names[id(parameter)] for parameter in parameters_of(layer)]


class ImageTower(Tower):
    """An image tower: a trunk of layers that gives a feature map, and the head."""

    # Layout of activations only: DeepSpeed refuses channels_last weights.
    channels_last: bool = False

    @classmethod
    def build(cls, config: schema.ImageTowerConfig, embed_dim: int) -> ImageTower:
        """The tower that `config` describes, with random weights; works under `torch.device("meta")`."""
        raise NotImplementedError

    def units(self) -> list[Unit]:
        """The trunk from input to output as modules to run in turn: one tuple from each cut to the next."""
        raise NotImplementedError

    def timm_weights(self, config: schema.ImageTowerConfig) -> dict[str, Tensor]:
        """timm's release of this backbone. Errors: UserError when there is none, or it cannot be had."""
        raise schema.UserError(f"model.image.pretrained: timm has no {config.backbone}; name an open_clip checkpoint")

    @property
    def map_cut(self) -> int:
        """The cut at which the last feature map stands: what follows is the final norm, if any, and the head."""
        return self.cuts[-1]

    def forward_prefix(self, images: Tensor, cut: int) -> Tensor:
        """Images [B, 3, H, W] (float) -> what enters layer group `cut`, [B, C, H', W']."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        images = images.to(dtype=next(self.parameters()).dtype).contiguous(memory_format=layout)
        return self._run(self.units()[: self._unit_index(cut)], images)

    def forward_between(self, features: Tensor, cut: int, stop: int) -> Tensor:
        """What enters layer group `cut` -> what enters layer group `stop`; cut 0 takes images."""
        if cut == 0:
            return self.forward_prefix(features, stop)
        return self._run(self.units()[self._unit_index(cut) : self._unit_index(stop)], features)

    def forward_from(self, features: Tensor, cut: int) -> Tensor:
        """What `forward_prefix` gave at `cut` -> embeddings [B, D], not normalised."""
        return self.embed_head()(self._run(self.units()[self._unit_index(cut) :], features))

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] (float, normalised) -> embeddings [B, D], not normalised."""
        return self.forward_from(self.forward_prefix(images, 0), 0)

    def _unit_index(self, cut: int) -> int:
        cuts = self.cuts
        if cut not in cuts:
            raise ValueError(f"this tower cannot be cut at layer group {cut}; it can at {cuts}")
        return cuts.index(cut)

    def _run(self, units: Sequence[Unit], x: Tensor) -> Tensor:
        recompute = self.checkpointing and torch.is_grad_enabled()
        for unit in units:
            if recompute and (x.requires_grad or any(parameter.requires_grad for parameter in parameters_of(unit))):
                x = checkpoint(_run_unit, unit, x, use_reentrant=False, context_fn=functools.partial(_contexts, unit))
            else:
                x = _run_unit(unit, x)
        return x


class TextTower(Tower):
    """A text tower: its layer groups are the embeddings, then one for each block.

    What follows the last block and locks with it (`finish`) is in the last block's group. Batches are cut to their
    longest caption, so nothing that stands after a caption's end token may reach its embedding, unless the tower says
    that it `reads_padding`.
    """

    # Whether what stands after the end token changes the embedding; then captions keep all of their columns.
    reads_padding: bool = False
    # Whether its activation is QuickGELU; None: it has no such choice.
    quick_gelu: bool | None = None
    # D, kept because ZeRO-3 leaves parameters without a shape.
    embed_dim: int

    @classmethod
    def build(cls, config: schema.TextTowerConfig, embed_dim: int) -> TextTower:
        """The tower that `config` describes, with random weights; works under `torch.device("meta")`."""
        raise NotImplementedError

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [B, T] -> hidden states [B, T, C]."""
        raise NotImplementedError

    def blocks(self) -> nn.ModuleList:
        """The blocks from input to output."""
        raise NotImplementedError

    def run_block(self, block: nn.Module, hidden: Tensor, ends: Tensor) -> Tensor:
        """One block: [B, T, C] -> [B, T, C]; `ends` [B] are the captions' end positions, for a mask of padding.

        The plan measures with `hidden` on the meta device, `ends` on the CPU: make a mask beside `ends`, then move it.
        """
        raise NotImplementedError

    def finish(self, hidden: Tensor) -> Tensor:
        """What follows the last block and locks with it, on the pooled hidden states [B, C]."""
        return hidden

    def ends(self, tokens: Tensor) -> Tensor:
        """Token ids [B, T] -> position [B] of each caption's first end token, which has the highest id.

        The plan's longest captions are ones, then id vocab_size - 1: a tower with another rule must find them as long.
        """
        return tokens.argmax(dim=-1)

    def pool(self, hidden: Tensor, ends: Tensor) -> Tensor:
        """Hidden states [B, T, C] and end positions [B] -> [B, C], the end token's unless a tower says otherwise."""
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), ends]

    def forward(self, texts: Tensor | TextPrefix, start: int = 0, stop: int | None = None) -> Tensor | TextPrefix:
        """Token ids [B, T] (int64) -> embeddings [B, D], not normalised.

        `start` > 0: `texts` is instead what enters layer group `start`. With `stop`, what enters that group is
        returned; the number of groups is what enters the head.
        """
        if isinstance(texts, Tensor):
            if stop == 0:
                return texts
            ends = self.ends(texts)
            hidden = self.embed(texts if self.reads_padding else cut_to_longest(texts, ends))
        else:
            hidden, ends = texts
        blocks = self.blocks()
        for number in range(max(start, 1), len(blocks) + 1 if stop is None else stop):
            hidden = self._run(blocks[number - 1], hidden, ends)
            if number == len(blocks):
                hidden = self.finish(self.pool(hidden, ends))
        return self.embed_head()(hidden) if stop is None else (hidden, ends)

    def _run(self, block: nn.Module, hidden: Tensor, ends: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self.run_block, block, hidden, ends, use_reentrant=False)
        return self.run_block(block, hidden, ends)


def cut_to_longest(tokens: Tensor, ends: Tensor) -> Tensor:
    """Token ids [B, T] without the columns after the last of `ends` [B], up to a multiple of 8.

    COCO's captions need about 24 of 77 columns, so this saves two thirds of the tower's work (GPT-2 on CPU: 13.2 s to
    4.6 s a step of 8). On an accelerator reading the length waits for the tokens, so callers should encode text first.
    """
    longest = int(ends.max()) + 1
    return tokens[:, : -(-longest // 8) * 8]


def parameters_of(layer: Layer) -> Iterator[nn.Parameter]:
    """The parameters of `layer` in order."""
    for part in layer:
        if isinstance(part, nn.Parameter):
            yield part
        else:
            yield from part.parameters()


def mlp_projection(width: int, embed_dim: int) -> nn.Sequential:
    """open_clip's `hf_proj_type: mlp`: [B, C] -> [B, D] by way of (C + D) / 2, GELU between, without bias."""
    hidden = (width + embed_dim) // 2
    return nn.Sequential(nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, embed_dim, bias=False))


def names_under(part: str, names: Collection[str]) -> dict[str, str]:
    """Those of `names` that begin with `part` -> the same without it: one tower's share of a whole checkpoint."""
    return {name: name.removeprefix(part) for name in names if name.startswith(part)}


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
