"""The transformer over a video's frames that X-CLIP and the TeachCLIP student share: pre-norm blocks with QuickGELU.

Shapes: B batch, F frames, D embed width, H heads. Blocks are open_clip's, whose key names equal those of CLIP4Clip,
X-CLIP and TeachCLIP (`resblocks.<i>.ln_1`, `.attn`, `.ln_2`, `.mlp.c_fc`, `.mlp.c_proj`).
"""

from __future__ import annotations

from functools import partial

import torch
from open_clip.transformer import LayerNorm, QuickGELU, Transformer
from torch import Tensor, nn

HEAD_WIDTH = 64


def temporal_blocks(width: int, layers: int = 4, eps: float = 1e-5) -> Transformer:
    """`layers` pre-norm QuickGELU blocks of `width` with width/64 heads. ValueError: width not a multiple of 64."""
    if width % HEAD_WIDTH:
        raise ValueError(f"width {width} is not a multiple of {HEAD_WIDTH}: heads are {HEAD_WIDTH} wide")
    norm = partial(LayerNorm, eps=eps)
    return Transformer(width, layers, width // HEAD_WIDTH, act_layer=QuickGELU, norm_layer=norm)


def frame_mask(n_frames: Tensor, frames: int) -> Tensor:
    """[B] frame counts -> [B, F] bool, True for real frames. Every video must have at least one."""
    return torch.arange(frames, device=n_frames.device) < n_frames.unsqueeze(1)


def over_time(blocks: Transformer, positions: nn.Embedding, x: Tensor, mask: Tensor) -> Tensor:
    """blocks(x + positions) + x: [B, F, D] frame features and [B, F] bool mask -> [B, F, D].

    No frame attends to a padded one. Padded places still get an output, which callers leave out.
    """
    heads = blocks.resblocks[0].attn.num_heads
    blocked = torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_fill(~mask, float("-inf"))
    keys = blocked[:, None, None, :].expand(-1, heads, mask.shape[1], -1).flatten(0, 1)
    # Through the module, not its weight: under ZeRO-3 a parameter is only there while its module runs.
    return blocks(x + positions(torch.arange(x.shape[1], device=x.device)), attn_mask=keys) + x


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over real frames: [B, F, D], [B, F] bool -> [B, D]."""
    weights = mask.unsqueeze(-1).to(x.dtype)
    return (x * weights).sum(1) / weights.sum(1)
