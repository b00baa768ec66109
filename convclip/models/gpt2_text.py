"""Hugging Face GPT2Model, then an MLP projection, under the names of open_clip's HFTextEncoder.

Parameters are `transformer.*` and `proj.*`. open_clip itself cannot hold this tower: its native text transformer ends
in one linear map (`text_projection`), and its HFTextEncoder builds GPT2Model with an argument that class refuses
(`add_pooling_layer`) and has no pooler for the end token (checked on 3.3.0).
Shapes: B batch, T tokens, C width, D embed.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from convclip import schema
from convclip.models.tower import Layer, TextTower, mlp_projection, names_under

# GPT-2's released position table; longer contexts do not load from it.
GPT2_POSITIONS = 1024
# Attention masks, which old releases keep beside the weights of each block.
_MASKS = (".attn.bias", ".attn.masked_bias")


class Gpt2Text(TextTower):
    """Causal; the projection is `mlp_projection`.

    GPT-2's dropout (0.1) is kept. Padding needs no mask: what follows the end token cannot reach it.
    """

    may_be_new = ("proj.",)

    def __init__(self, config: schema.TextTowerConfig, embed_dim: int):
        super().__init__()
        from transformers import GPT2Config, GPT2Model  # slow to import, and only needed here

        sizes: dict[str, Any] = {"n_embd": config.width, "n_head": config.heads, "n_layer": config.layers}
        end = config.vocab_size - 1
        positions = max(GPT2_POSITIONS, config.context_length)
        # This attention is causal where no mask is given.
        sizes["attn_implementation"] = "sdpa"
        self.embed_dim = embed_dim
        self.transformer = GPT2Model(
            GPT2Config(vocab_size=config.vocab_size, n_positions=positions, bos_token_id=end, eos_token_id=end, **sizes)
        )
        self.proj = mlp_projection(config.width, embed_dim)

    @classmethod
    def build(cls, config: schema.TextTowerConfig, embed_dim: int) -> Gpt2Text:
        """Random weights."""
        return cls(config, embed_dim)

    def layers(self) -> list[Layer]:
        """The embeddings, the blocks; the final norm goes with the last block."""
        *below, last = self.blocks()
        embeddings = (self.transformer.wte, self.transformer.wpe)
        return [embeddings, *((block,) for block in below), (last, self.transformer.ln_f)]

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [B, T] -> hidden states [B, T, C]."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self.transformer.drop(self.transformer.wte(tokens) + self.transformer.wpe(positions))

    def blocks(self) -> nn.ModuleList:
        """The blocks from input to output."""
        return self.transformer.h

    def run_block(self, block: nn.Module, hidden: Tensor, ends: Tensor) -> Tensor:
        """One causal block: [B, T, C] -> [B, T, C]."""
        result = block(hidden)
        # transformers 5.0 gives a tuple.
        return result if isinstance(result, Tensor) else result[0]

    def finish(self, hidden: Tensor) -> Tensor:
        """The final norm: [B, C] -> [B, C]."""
        return self.transformer.ln_f(hidden)

    def embed_head(self) -> nn.Module:
        """The projection: [B, C] -> embeddings [B, D]."""
        return self.proj

    def released_names(self, names: Collection[str]) -> dict[str, str]:
        """The text part of a whole checkpoint, or a GPT-2 file, with or without a language model's head."""
        part = names_under("text.", names)
        if part:
            return part
        bare = {name: name.removeprefix("transformer.") for name in names}
        return {
            name: f"transformer.{own}"
            for name, own in bare.items()
            if own != "lm_head.weight" and not (own.startswith("h.") and own.endswith(_MASKS))
        }

    def train(self, mode: bool = True) -> Gpt2Text:
        """As nn.Module, but the embeddings' dropout follows the embeddings: off while they are frozen."""
        super().train(mode)
        self.transformer.drop.train(mode and self.transformer.wte.weight.requires_grad)
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As `Tower`, by the switch that transformers' blocks have."""
        # transformers 5 renamed the switch and 6 drops the old name.
        name = "activation" if hasattr(self.transformer, "activation_checkpointing_enable") else "gradient"
        if enable:
            getattr(self.transformer, f"{name}_checkpointing_enable")({"use_reentrant": False})
        else:
            getattr(self.transformer, f"{name}_checkpointing_disable")()
