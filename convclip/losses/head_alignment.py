"""Head alignment: pulls a new head's embedding towards the pretrained head's on the same feature map.

Shape legend: B batch, D embed.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from convclip.losses.tiles import at_least_single, without_autocast


def head_alignment_loss(embedding: Tensor, reference: Tensor, kind: Literal["cosine", "mse"] = "cosine") -> Tensor:
    """Mean over rows of 1 - cosine, or (`mse`) mean over all entries of the squared difference of unit vectors.

    embedding, reference [B, D], of any length; the reference gets no gradient. `mse` is 2/D of `cosine`: the two differ
    in size only. float16 and bfloat16 are computed in float32. ValueError on other shapes or kinds.
    """
    if embedding.ndim != 2 or embedding.shape != reference.shape:
        shapes = f"{[*embedding.shape]} and {[*reference.shape]}"
        raise ValueError(f"embedding and reference must be [B, D] alike, not {shapes}")
    with without_autocast(embedding):
        ours = F.normalize(at_least_single(embedding), dim=1)
        theirs = F.normalize(at_least_single(reference.detach()), dim=1).to(ours.dtype)
        # Both through the difference: 1 - cosine computed as such keeps no digits of a small angle.
        squares = (ours - theirs).square()
        if kind == "cosine":
            return squares.sum(1).mean() / 2
        if kind == "mse":
            return squares.mean()
    raise ValueError(f"kind must be cosine or mse, not {kind!r}")
