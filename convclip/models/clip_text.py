"""open_clip's CLIP text transformer, under its parameter names. Shapes: B batch, T tokens, C width, D embed."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from open_clip.transformer import QuickGELU, TextTransformer
from torch import Tensor, nn

from convclip import schema
from convclip.models.tower import Layer, TextTower, names_under

# open_clip's CLIP hangs this tower on the model itself; its CustomTextCLIP, and we, under `text.`.
TOP_LEVEL_NAMES = ("text_projection", "positional_embedding", "token_embedding.", "transformer.", "ln_final.")


class ClipText(TextTower, TextTransformer):
    """For captions of any length up to the context's. CLIP's projection is locked with it: it has no head.

    Causal, or without any mask (`causal: false`): then every token attends to the padding too, as in open_clip.
    """

    # Of open_clip's class, which has no types.
    token_embedding: nn.Embedding
    positional_embedding: nn.Parameter
    transformer: nn.Module
    ln_final: nn.LayerNorm
    text_projection: nn.Parameter
    attn_mask: Tensor | None

    @classmethod
    def build(cls, config: schema.TextTowerConfig, embed_dim: int) -> ClipText:
        """Random weights."""
        quick_gelu = config.activation == "quick_gelu"
        tower = cls(
            context_length=config.context_length,
            vocab_size=config.vocab_size,
            width=config.width,
            heads=config.heads,
            layers=config.layers,
            output_dim=embed_dim,
            no_causal_mask=not config.causal,
            act_layer=QuickGELU if quick_gelu else nn.GELU,
        )
        tower.reads_padding, tower.quick_gelu = not config.causal, quick_gelu
        tower.embed_dim = embed_dim
        return tower

    def layers(self) -> list[Layer]:
        """The embeddings, the blocks; final norm and projection go with the last block."""
        *below, last = self.blocks()
        embeddings = (self.positional_embedding, self.token_embedding)
        return [embeddings, *((block,) for block in below), (last, self.text_projection, self.ln_final)]

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [B, T] -> hidden states [B, T, C]."""
        return self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]

    def blocks(self) -> nn.ModuleList:
        """The blocks from input to output."""
        blocks = self.transformer.resblocks
        assert isinstance(blocks, nn.ModuleList)  # open_clip's
        return blocks

    def run_block(self, block: nn.Module, hidden: Tensor, ends: Tensor) -> Tensor:
        """One block: [B, T, C] -> [B, T, C]."""
        length, mask = hidden.shape[1], self.attn_mask
        return block(hidden, attn_mask=None if mask is None else mask[:length, :length])

    def finish(self, hidden: Tensor) -> Tensor:
        """The final norm and CLIP's projection: [B, C] -> embeddings [B, D]."""
        return self.ln_final(hidden) @ self.text_projection

    def embed_head(self) -> nn.Module:
        """Nothing."""
        return nn.Identity()

    def released_names(self, names: Collection[str]) -> dict[str, str]:
        """The text part of an open_clip checkpoint, in either of its layouts."""
        return names_under("text.", names) or {name: name for name in names if name.startswith(TOP_LEVEL_NAMES)}

    def open_clip_config(self, config: schema.Model) -> dict[str, Any]:
        """open_clip's `text_cfg`."""
        names = ("context_length", "vocab_size", "width", "heads", "layers")
        sizes: dict[str, Any] = {name: getattr(config.text, name) for name in names}
        if not config.text.causal:
            sizes["no_causal_mask"] = True
        if config.text.tokenizer != "open_clip":
            sizes["hf_tokenizer_name"] = config.text.tokenizer
        return sizes
