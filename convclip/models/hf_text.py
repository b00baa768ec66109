"""A Hugging Face text encoder, its pooling and a projection, under the names of open_clip's HFTextEncoder.

Parameters are `transformer.*`, as in `AutoModel`, and `proj.*`. What differs between encoders is data: `FAMILIES`
of hf_families.py.
transformers' own blocks run one at a time, so that the tower can be cut at each; what their model's forward would hand
them (mask, position bias, rotation) is made here, from the captions' lengths and frozen or trained parameters alone.
Shapes: B batch, T tokens, C width, D embed, H heads.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convclip import schema
from convclip.models.hf_families import CONSTANTS, FAMILIES, RENAMED, Family
from convclip.models.hf_folder import encoder_config, encoder_place, with_encoder
from convclip.models.tower import Layer, TextTower, mlp_projection, names_under, parameters_of
from convclip.schema import UserError

# Encoders that open_clip 3.3 builds, and its names of our pooling; its max pooling takes the padding alone.
_OPEN_CLIP = ("bert", "roberta", "xlm-roberta")
_OPEN_CLIP_POOLERS = {"mean": "mean_pooler", "cls": "cls_last_hidden_state_pooler"}


class HfText(TextTower):
    """Pads are masked, the encoder's own dropout is kept; it is off in what is frozen."""

    may_be_new = ("proj.",)

    def __init__(self, config: schema.TextTowerConfig, embed_dim: int):
        super().__init__()
        assert config.config is not None  # build has filled it
        place = encoder_place(config)
        self.sizes: Any = encoder_config(config.config, place)
        self.family = FAMILIES[self.sizes.model_type]
        self.pooling, self.embed_dim = config.pool, embed_dim
        if self.pooling == "cls" and self.family.attention == "causal":
            raise UserError(f"model.text.pool cls: the first token of {place} sees no other; use last or mean")
        _check_positions(self.sizes, self.family, config.context_length, place)
        self.transformer = _build_encoder(self.sizes, self.family)
        self.proj = _projection(config, embed_dim)
        # GPT-2 has no padding token: its rows are filled with end tokens, of which the first is the caption's.
        self.padded_with_ends = self.sizes.pad_token_id == getattr(self.sizes, "eos_token_id", None)

    @classmethod
    def build(cls, config: schema.TextTowerConfig, embed_dim: int) -> HfText:
        """Random weights. Errors: UserError where the encoder's configuration cannot be had or is of no encoder."""
        return cls(with_encoder(schema.Model(text=config)).text, embed_dim)

    def layers(self) -> list[Layer]:
        """The embeddings, the blocks; a final norm goes with the last block."""
        *below, last = self.blocks()
        above = () if self.norm is None else (self.norm,)
        embeddings = tuple(self._part(name) for name in self.family.embeddings)
        return [embeddings, *((block,) for block in below), (last, *above)]

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [B, T] -> hidden states [B, T, C]."""
        table = self._part(self.family.embeddings[0])
        if next(table.parameters()).is_meta:
            # The plan has token ids on the CPU; some encoders look up positions by them.
            tokens = tokens.to("meta")
        hidden: Tensor = table(tokens)
        if self.family.positions is not None:
            hidden = hidden + self._part(self.family.positions)(torch.arange(tokens.shape[1], device=tokens.device))
        return self._dropout(hidden, self.family.embeddings_dropout, table)

    def blocks(self) -> nn.ModuleList:
        """The blocks from input to output."""
        blocks = self._part(self.family.blocks)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def run_block(self, block: nn.Module, hidden: Tensor, ends: Tensor) -> Tensor:
        """One block: [B, T, C] -> [B, T, C]."""
        result = block(hidden, **self._beside(block, hidden, ends))
        # Some give a tuple, others did in transformers 5.0.
        return result if isinstance(result, Tensor) else result[0]

    def _beside(self, block: nn.Module, hidden: Tensor, ends: Tensor) -> dict[str, Any]:
        """What a block takes besides the hidden states."""
        attention, length = self.family.attention, hidden.shape[1]
        if attention == "causal":
            # No padding stands before a caption's end.
            return {}
        words = _words(ends, length).to(hidden.device)[:, None, None]
        if attention == "padding":
            return {"attention_mask": words.expand(-1, 1, length, -1)}
        if attention == "rotary":
            return self._rotary(block, hidden, words)
        padding = torch.zeros(words.shape, dtype=hidden.dtype, device=hidden.device)
        padding = padding.masked_fill(~words, torch.finfo(hidden.dtype).min)
        if attention == "mpnet":
            return {"attention_mask": self._part("encoder").compute_position_bias(hidden[:1]) + padding}
        # In the first block, whichever runs: a cut above it needs no more than its parameter.
        first: Any = self.blocks()[0].get_submodule("layer.0.SelfAttention")
        return {"position_bias": first.compute_bias(length, length, device=hidden.device) + padding}

    def _rotary(self, block: Any, hidden: Tensor, words: Tensor) -> dict[str, Any]:
        """The mask of a block's window, and cosines and sines [1, T, C / H] of its angles, in fp32 up to the end."""
        places = torch.arange(hidden.shape[1], device=hidden.device)
        mask = words
        if block.attention_type == "sliding_attention":
            near = (places[:, None] - places).abs() <= self.sizes.local_attention // 2
            # Padding far from every word sees itself: a row that sees nothing gives NaN.
            mask = (words & near) | torch.eye(len(places), dtype=torch.bool, device=hidden.device)
        size = self.sizes.hidden_size // self.sizes.num_attention_heads
        steps = torch.arange(0, size, 2, device=hidden.device, dtype=torch.float) / size
        angles = places[:, None].float() / self.sizes.rope_parameters[block.attention_type]["rope_theta"] ** steps
        angles = torch.cat((angles, angles), dim=-1)[None]
        rotation = (angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype))
        mask = mask.expand(len(hidden), 1, len(places), -1)
        return {"attention_mask": mask, "position_embeddings": rotation}

    def ends(self, tokens: Tensor) -> Tensor:
        """Token ids [B, T] -> position [B] of each caption's last token; padding stands on its right."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        last = places.where(tokens != self.sizes.pad_token_id, -1).amax(dim=-1)
        return (last + self.padded_with_ends).clamp(0, tokens.shape[1] - 1)

    def pool(self, hidden: Tensor, ends: Tensor) -> Tensor:
        """Hidden states [B, T, C] of the last block and end positions [B] -> [B, C], behind the final norm."""
        if self.norm is not None:
            hidden = self._dropout(self.norm(hidden), self.family.norm_dropout, self.norm)
        if self.pooling == "last":
            return super().pool(hidden, ends)
        if self.pooling == "cls":
            return hidden[:, 0]
        padding = ~_words(ends, hidden.shape[1]).to(hidden.device)[..., None]
        if self.pooling == "max":
            return hidden.masked_fill(padding, -torch.inf).amax(dim=1)
        return hidden.masked_fill(padding, 0).sum(dim=1) / (ends.to(hidden.device)[:, None] + 1)

    @property
    def norm(self) -> nn.Module | None:
        """What follows the last block."""
        return None if self.family.norm is None else self._part(self.family.norm)

    def embed_head(self) -> nn.Module:
        """The projection: [B, C] -> embeddings [B, D]."""
        return self.proj

    def released_names(self, names: Collection[str]) -> dict[str, str]:
        """The text part of a whole checkpoint, or a Hugging Face file of the encoder, with heads or without."""
        part = names_under("text.", names)
        if part:
            return part
        encoder = names_under(self.family.prefix, names)
        # T5's table may stand outside; whatever else is neither the encoder's nor a known head's is left over.
        own = {name: encoder.get(name, name) for name in names if not name.startswith(self.family.heads)}
        own = {name: bare for name, bare in own.items() if not bare.startswith("pooler.")}
        return {name: f"transformer.{_todays(bare)}" for name, bare in own.items() if not bare.endswith(CONSTANTS)}

    def open_clip_config(self, config: schema.Model) -> dict[str, Any] | None:
        """open_clip's `text_cfg`, but for the place of config.json; None where it has no such tower."""
        text = config.text
        if self.sizes.model_type not in _OPEN_CLIP or text.pool not in _OPEN_CLIP_POOLERS:
            return None
        return {
            "context_length": text.context_length,
            "hf_model_pretrained": False,
            "hf_proj_type": None if text.projection == "none" else text.projection,
            "hf_pooler_type": _OPEN_CLIP_POOLERS[text.pool],
        }

    def _part(self, name: str) -> Any:
        return self.transformer.get_submodule(name)

    def _dropout(self, hidden: Tensor, field: str | None, owner: nn.Module) -> Tensor:
        """The encoder's dropout by a field of its configuration, while `owner` trains."""
        learns = any(parameter.requires_grad for parameter in parameters_of((owner,)))
        if field is None or not self.training or not learns:
            return hidden
        return F.dropout(hidden, getattr(self.sizes, field))


def _build_encoder(sizes: Any, family: Family) -> nn.Module:
    """transformers' encoder with random weights, without pooler and decoder."""
    import transformers  # slow to import, and only needed here

    options = {"add_pooling_layer": False} if family.has_pooler else {}
    try:
        model = getattr(transformers, family.model)(sizes, **options)
    except (ValueError, KeyError, TypeError, ZeroDivisionError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"the encoder's config.json cannot be built as {sizes.model_type} ({reason}): mend it"
        ) from None
    if sizes.model_type == "t5":
        return model.encoder
    if sizes.model_type == "modernbert":
        if "sliding_window_mask" in inspect.signature(model.layers[0].forward).parameters:
            raise UserError(
                f"transformers {transformers.__version__} runs ModernBERT in another way: pip install -U transformers"
            )
        # Its frequencies would be rounded to half precision with the weights: `_rotary` makes them anew.
        del model.rotary_emb
        if any(rope["rope_type"] != "default" for rope in sizes.rope_parameters.values()):
            raise UserError("the encoder's config.json has rope_scaling, which is not known here: name another encoder")
    return model


def _projection(config: schema.TextTowerConfig, embed_dim: int) -> nn.Module:
    """The way from the encoder's width to `embed_dim`, as open_clip builds it."""
    if config.projection == "none":
        if config.width != embed_dim:
            raise UserError(
                f"model.text.projection none needs model.embed_dim {config.width}, the encoder's width, not {embed_dim}"
            )
        return nn.Identity()
    if config.projection == "linear":
        return nn.Linear(config.width, embed_dim, bias=False)
    return mlp_projection(config.width, embed_dim)


def _check_positions(sizes: Any, family: Family, context_length: int, place: str) -> None:
    """UserError where captions may be longer than the encoder has positions."""
    positions = getattr(sizes, "max_position_embeddings", None) if family.attention != "t5" else None
    if positions is not None and family.offset:
        positions -= sizes.pad_token_id + 1
    if positions is not None and context_length > positions:
        raise UserError(
            f"model.text.context_length is {context_length}, but {place} has {positions} positions: lower it"
        )


def _todays(name: str) -> str:
    """A name of an encoder's file as transformers has it today."""
    for old, new in RENAMED.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _words(ends: Tensor, length: int) -> Tensor:
    """End positions [B] -> bool [B, T]: what is no padding. Beside `ends`, which the plan has on the CPU."""
    return torch.arange(length, device=ends.device) <= ends[:, None]
