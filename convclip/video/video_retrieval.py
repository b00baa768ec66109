"""Text-to-video and video-to-text retrieval: recalls, median and mean rank. Pure functions, computed in blocks.

Shapes: T captions, V videos, D embed width. A rank is the number of strictly better entries plus one; what is not a
number counts as better than anything, so that a broken model never looks good.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

# (captions, videos) -> scores of that block, [captions, videos]; bigger is better.
ScoreBlock = Callable[[slice, slice], Tensor]


def video_retrieval(
    text_features: Tensor,
    video_features: Tensor,
    video_of_text: Tensor,
    ks: Sequence[int] = (1, 5, 10),
    block: int = 1024,
) -> dict[str, float]:
    """`recalls` of embeddings [T, D] and [V, D], scored by their product; video_of_text [T] int64 on their device."""
    return recalls(lambda t, v: text_features[t] @ video_features[v].T, video_of_text, len(video_features), ks, block)


def recalls(
    score: ScoreBlock,
    video_of_text: Tensor,
    videos: int,
    ks: Sequence[int] = (1, 5, 10),
    block: int = 1024,
    competitors: Literal["captions", "videos"] = "captions",
) -> dict[str, float]:
    """t2v_r1 … and v2t_r1 … in percent, t2v_median_rank, t2v_mean_rank and the same for v2t.

    Text to video: every caption is ranked among V videos. Video to text: a video's best caption is ranked; its
    `competitors` are all captions, or (CLIP4Clip's multi-sentence protocol) the best caption of each other video. With
    one caption per video they are the same. video_of_text [T]: the video of each caption; every video needs one.
    """
    t2v = text_ranks(score, video_of_text, videos, block)
    v2t = video_ranks(score, video_of_text, videos, block, competitors)
    return {**_summary("t2v", t2v, ks), **_summary("v2t", v2t, ks)}


def text_ranks(score: ScoreBlock, video_of_text: Tensor, videos: int, block: int = 1024) -> Tensor:
    """int64 [T]: rank of each caption's video, `block` captions at a time."""
    ranks = []
    for start in range(0, len(video_of_text), block):
        texts = slice(start, start + block)
        scores = score(texts, slice(0, videos)).float()
        own = scores.gather(1, video_of_text[texts, None])
        ranks.append(_rank(scores, own, dim=1))
    return torch.cat(ranks)


def video_ranks(
    score: ScoreBlock,
    video_of_text: Tensor,
    videos: int,
    block: int = 1024,
    competitors: Literal["captions", "videos"] = "captions",
) -> Tensor:
    """int64 [V]: rank of each video's best caption, `block` videos at a time."""
    if len(video_of_text.unique()) != videos:
        raise ValueError(f"{videos} videos but captions of {len(video_of_text.unique())}: every video needs a caption")
    ranks = []
    for start in range(0, videos, block):
        some = torch.arange(start, min(start + block, videos), device=video_of_text.device)
        scores = score(slice(0, len(video_of_text)), slice(start, start + block)).float()
        best = scores.new_full((videos, len(some)), float("-inf"))
        best.scatter_reduce_(0, video_of_text[:, None].expand_as(scores), scores, "amax")
        own = best[some, torch.arange(len(some), device=some.device)]
        ranks.append(_rank(scores if competitors == "captions" else best, own, dim=0))
    return torch.cat(ranks)


def _rank(scores: Tensor, own: Tensor, dim: int) -> Tensor:
    """One plus the entries along `dim` that are better than `own`, at most their number."""
    better = (~(scores <= own)).sum(dim)
    return (better + 1).clamp_max(scores.shape[dim])


def _summary(name: str, ranks: Tensor, ks: Sequence[int]) -> dict[str, float]:
    ranks = ranks.double()
    found = {f"{name}_r{k}": 100 * (ranks <= k).double().mean().item() for k in ks}
    # torch.median takes the lower of two middle ranks; the usual median is their mean.
    return {**found, f"{name}_median_rank": ranks.quantile(0.5).item(), f"{name}_mean_rank": ranks.mean().item()}
