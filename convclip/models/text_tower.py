"""Text towers: open_clip's CLIP text transformer, and GPT-2 with an MLP projection.

Both embed the first end-of-text token, which every tokenizer here gives the highest id, so pooling is an argmax over
token ids. Both are causal: what follows that token cannot reach it, so batches are cut to their longest caption.
Shapes: B batch, T tokens, D embed.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from open_clip.transformer import TextTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from convclip import schema

# GPT-2's released position table; longer contexts do not load from it.
GPT2_POSITIONS = 1024
# What enters a layer group: hidden states [B, T, C], or [B, C] above the last block, and the end positions [B].
TextPrefix: TypeAlias = tuple[Tensor, Tensor]


class CuttableText(nn.Module):
    """A text tower that can run in two parts, as `image_tower.CuttableTower`: what is locked need not run again.

    Its layer groups are the embeddings, then the blocks; the last has what follows the blocks and locks with them.
    """

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [B, T] -> hidden states [B, T, C]."""
        raise NotImplementedError

    def blocks(self) -> nn.ModuleList:
        """The blocks from input to output."""
        raise NotImplementedError

    def run_block(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """One causal block: [B, T, C] -> [B, T, C]."""
        raise NotImplementedError

    def finish(self, hidden: Tensor) -> Tensor:
        """What follows the last block and locks with it, on the hidden states of end tokens [B, C]."""
        raise NotImplementedError

    def head(self, hidden: Tensor) -> Tensor:
        """What is never locked: from what `finish` gave to embeddings [B, D]."""
        raise NotImplementedError

    def forward(self, texts: Tensor | TextPrefix, start: int = 0, stop: int | None = None) -> Tensor | TextPrefix:
        """Token ids [B, T] (int64) -> embeddings [B, D], not normalised.

        `start` > 0: `texts` is instead what enters layer group `start`. With `stop`, what enters that group is
        returned; the number of groups is what enters the head.
        """
        blocks = self.blocks()
        for group in range(start, len(blocks) + 1 if stop is None else stop):
            if group == 0:
                tokens, ends = cut_to_longest(texts)
                texts = self.embed(tokens), ends
                continue
            hidden, ends = texts
            hidden = self.run_block(blocks[group - 1], hidden)
            texts = self.finish(_take(hidden, ends)) if group == len(blocks) else hidden, ends
        return self.head(texts[0]) if stop is None else texts


class ClipText(CuttableText, TextTransformer):
    """open_clip's text transformer (its parameter names), for captions of any length up to the context's."""

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [B, T] -> hidden states [B, T, C]."""
        return self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]

    def blocks(self) -> nn.ModuleList:
        """The blocks from input to output."""
        return self.transformer.resblocks

    def run_block(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """One causal block: [B, T, C] -> [B, T, C]."""
        mask = self.attn_mask[: hidden.shape[1], : hidden.shape[1]]
        if self.transformer.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, hidden, None, None, mask, use_reentrant=False)
        return block(hidden, attn_mask=mask)

    def finish(self, hidden: Tensor) -> Tensor:
        """The final norm and CLIP's projection: [B, C] -> embeddings [B, D]."""
        return self.ln_final(hidden) @ self.text_projection

    def head(self, hidden: Tensor) -> Tensor:
        """Nothing: CLIP's projection is locked with the tower."""
        return hidden


class Gpt2Text(CuttableText):
    """Hugging Face GPT2Model, then a projection width -> (width + D) / 2 -> D without bias, GELU between.

    Names follow open_clip's HFTextEncoder: `transformer.*` and `proj.*`. GPT-2's dropout (0.1) is kept.
    """

    def __init__(self, config: schema.TextTowerConfig, embed_dim: int):
        super().__init__()
        from transformers import GPT2Config, GPT2Model  # slow to import, and only needed here

        sizes = {"n_embd": config.width, "n_head": config.heads, "n_layer": config.layers}
        end = config.vocab_size - 1
        positions = max(GPT2_POSITIONS, config.context_length)
        # This attention is causal where no mask is given.
        sizes["attn_implementation"] = "sdpa"
        self.transformer = GPT2Model(
            GPT2Config(vocab_size=config.vocab_size, n_positions=positions, bos_token_id=end, eos_token_id=end, **sizes)
        )
        hidden = (config.width + embed_dim) // 2
        self.proj = nn.Sequential(
            nn.Linear(config.width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, embed_dim, bias=False)
        )

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [B, T] -> hidden states [B, T, C]."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self.transformer.drop(self.transformer.wte(tokens) + self.transformer.wpe(positions))

    def blocks(self) -> nn.ModuleList:
        """The blocks from input to output."""
        return self.transformer.h

    def run_block(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """One causal block: [B, T, C] -> [B, T, C]."""
        result = block(hidden)
        # transformers 5.0 gives a tuple.
        return result if isinstance(result, Tensor) else result[0]

    def finish(self, hidden: Tensor) -> Tensor:
        """The final norm: [B, C] -> [B, C]."""
        return self.transformer.ln_f(hidden)

    def head(self, hidden: Tensor) -> Tensor:
        """The projection: [B, C] -> embeddings [B, D]."""
        return self.proj(hidden)

    def train(self, mode: bool = True) -> Gpt2Text:
        """As nn.Module, but the embeddings' dropout follows the embeddings: off while they are frozen."""
        super().train(mode)
        self.transformer.drop.train(mode and self.transformer.wte.weight.requires_grad)
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass instead of keeping them."""
        # transformers 5 renamed the switch and 6 drops the old name.
        name = "activation" if hasattr(self.transformer, "activation_checkpointing_enable") else "gradient"
        if enable:
            getattr(self.transformer, f"{name}_checkpointing_enable")({"use_reentrant": False})
        else:
            getattr(self.transformer, f"{name}_checkpointing_disable")()


def build_text_tower(config: schema.TextTowerConfig, embed_dim: int) -> ClipText | Gpt2Text:
    """The tower that `config` describes, with random weights; works under `torch.device("meta")`."""
    if config.kind == "gpt2":
        return Gpt2Text(config, embed_dim)
    return ClipText(
        context_length=config.context_length,
        vocab_size=config.vocab_size,
        width=config.width,
        heads=config.heads,
        layers=config.layers,
        output_dim=embed_dim,
    )


def cut_to_longest(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens without the columns that are padding in every row, up to a multiple of 8; end positions [B]).

    COCO's captions need about 24 of 77 columns, so this saves two thirds of the tower's work (GPT-2 on CPU: 13.2 s to
    4.6 s a step of 8). On an accelerator reading the length waits for the tokens, so callers should encode text first.
    """
    ends = tokens.argmax(dim=-1)
    longest = int(ends.max()) + 1
    return tokens[:, : -(-longest // 8) * 8], ends


def _take(x: Tensor, positions: Tensor) -> Tensor:
    """Row i of [B, T, C] at positions[i]: [B, C]."""
    return x[torch.arange(x.shape[0], device=x.device), positions]
