"""timm's attention pool, computed from its one query: the same output for a thirtieth of the work.

Only the mean token's row of the attention is used, so no other query is needed, nor any token's own key and value.
With q the query and x a token, q . (K x + b) = (K^T q) . x + q . b, where q . b is the same for all tokens and leaves
the softmax as it is; and the weighted sum of V x + c is V (weighted sum of x) + c. Per image that is three products
with a vector for each head, instead of one with every token. What is kept for the backward pass shrinks alike.
Shapes: B batch, C channels, H.W size of the map, N = H.W + 1 tokens, E embed, h heads of d.
"""

from __future__ import annotations

import torch
from timm.layers import AttentionPool2d, resample_abs_pos_embed
from torch import Tensor, nn

# Channels of a head in timm's pool, unless it is told otherwise.
TIMM_HEAD_WIDTH = 64


class AttentionPool(AttentionPool2d):
    """AttentionPool2d with its parameter names and values, for any `width`."""

    qkv: nn.Module  # type: ignore[assignment]  # timm says Linear, which is replaced here

    def __init__(self, width: int, map_size: int | tuple[int, int], embed_dim: int):
        super().__init__(width, map_size, out_features=embed_dim, num_heads=pool_heads(width))
        assert isinstance(self.qkv, nn.Linear)  # timm's, unless it is told to split it
        self.qkv = _MeanTokenAttention(self.qkv, self.num_heads)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # timm's can leave out the projection
        """Feature map [B, C, H, W] -> [B, E]."""
        size = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1)
        positions = resample_abs_pos_embed(self.pos_embed[None], size, old_size=self.feat_size, num_prefix_tokens=1)
        return self.proj(self.qkv(x + positions))


def pool_heads(width: int) -> int:
    """How many heads attend over `width` channels: those whose own width is nearest to 64, in doubt the more.

    timm's count, and open_clip's, where 64 divides the width; they have no pool for other widths.
    """
    counts = [heads for heads in range(1, width + 1) if width % heads == 0]
    return min(counts, key=lambda heads: (abs(width // heads - TIMM_HEAD_WIDTH), -heads))


class _MeanTokenAttention(nn.Module):
    """Tokens [B, N, C], the mean first -> what its attention gathers [B, h * d].

    The weights are read here, where they are this module's own: ZeRO-3 has them in memory only while it runs.
    """

    def __init__(self, qkv: nn.Linear, heads: int):
        super().__init__()
        self.weight, self.bias, self.heads = qkv.weight, qkv.bias, heads

    def forward(self, x: Tensor) -> Tensor:
        of_query, of_key, of_value = self.weight.unflatten(0, (3, self.heads, -1))
        query_bias, _, value_bias = self.bias.unflatten(0, (3, self.heads, -1))
        query = torch.einsum("bc,hdc->bhd", x[:, 0], of_query) + query_bias
        asked = torch.einsum("bhd,hdc->bhc", query * query.shape[-1] ** -0.5, of_key)
        shares = torch.softmax(asked @ x.transpose(1, 2), dim=-1)
        values = torch.einsum("bhc,hdc->bhd", shares @ x, of_value) + value_bias
        return values.flatten(1)
