"""Retrieval figures under two protocols, as pure functions that never hold the full score matrix.

`standard` (CLIP_benchmark's): unique images against all captions; an image hits when any of its captions does, and the
rank is the number of strictly greater scores. `rowwise` (open_clip_train's): one row per caption, so an image with five
captions stands five times; only the diagonal is right, and of equal scores those that stand earlier count as better.
Shapes: N images (rows in `rowwise`), M texts, D embed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Scores held at a time: a block of rows of about this many entries.
BLOCK_ENTRIES = 2**24


def standard_recall(
    image_features: Tensor, text_features: Tensor, image_of_text: Tensor, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """Recall of images [N, D] and texts [M, D], text m belonging to image image_of_text[m] (any order and number).

    Keys i2t_r<k>, t2i_r<k> in percent; i2t_ and t2i_ median_rank and mean_rank, counted from 1. ValueError where the
    shapes do not fit or an image has no text.
    """
    image_of_text = torch.as_tensor(image_of_text, device=image_features.device)
    _check(image_features, text_features, image_of_text)
    i2t = _best_ranks(image_features, text_features, image_of_text)
    t2i = _ranks_of_images(text_features, image_features, image_of_text)
    return {**_figures("i2t", i2t, ks), **_figures("t2i", t2i, ks)}


def rowwise_recall(image_features: Tensor, text_features: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Recall of rows [N, D]: row i of the images is right for row i of the texts alone. Keys as `standard_recall`."""
    if image_features.shape != text_features.shape:
        raise ValueError(f"rows must pair up: {[*image_features.shape]} images, {[*text_features.shape]} texts")
    i2t = _diagonal_ranks(image_features, text_features)
    t2i = _diagonal_ranks(text_features, image_features)
    return {**_figures("i2t", i2t, ks), **_figures("t2i", t2i, ks)}


def clip_validation_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor, batch: int
) -> float:
    """open_clip's validation loss: CLIP's loss of each batch of rows [N, D], averaged over rows."""
    total = 0.0
    for start in range(0, len(image_features), batch):
        image, text = image_features[start : start + batch].float(), text_features[start : start + batch].float()
        logits = logit_scale * image @ text.T
        pair = torch.arange(len(image), device=image.device)
        total += float(F.cross_entropy(logits, pair) + F.cross_entropy(logits.T, pair)) / 2 * len(image)
    return total / len(image_features)


def _check(images: Tensor, texts: Tensor, image_of_text: Tensor) -> None:
    if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1]:
        raise ValueError(f"features must be [N, D] and [M, D], not {[*images.shape]} and {[*texts.shape]}")
    if image_of_text.shape != (len(texts),):
        raise ValueError(f"image_of_text must name the image of each of {len(texts)} texts")
    if len(image_of_text.unique()) != len(images) or image_of_text.min() < 0 or image_of_text.max() >= len(images):
        raise ValueError("image_of_text must name every image, 0 to N - 1, at least once")


def _blocks(queries: Tensor, items: Tensor):
    """(first row, scores of a block of queries against all items [b, M])."""
    rows = max(1, BLOCK_ENTRIES // max(1, len(items)))
    for start in range(0, len(queries), rows):
        yield start, queries[start : start + rows] @ items.T


def _best_ranks(images: Tensor, texts: Tensor, image_of_text: Tensor) -> Tensor:
    """For each image, how many texts score strictly more than its best text: int64 [N]."""
    ranks = []
    for start, scores in _blocks(images, texts):
        rows = torch.arange(start, start + len(scores), device=scores.device)
        own = scores.masked_fill(image_of_text[None, :] != rows[:, None], -torch.inf).amax(1, keepdim=True)
        ranks.append((scores > own).sum(1))
    return torch.cat(ranks)


def _ranks_of_images(texts: Tensor, images: Tensor, image_of_text: Tensor) -> Tensor:
    """For each text, how many images score strictly more than its own: int64 [M]."""
    ranks = []
    for start, scores in _blocks(texts, images):
        own = scores.gather(1, image_of_text[start : start + len(scores), None])
        ranks.append((scores > own).sum(1))
    return torch.cat(ranks)


def _diagonal_ranks(queries: Tensor, items: Tensor) -> Tensor:
    """For each row, how many items score more than its own, or as much and stand earlier: int64 [N]."""
    ranks = []
    for start, scores in _blocks(queries, items):
        rows = torch.arange(start, start + len(scores), device=scores.device)[:, None]
        own = scores.gather(1, rows)
        earlier = torch.arange(scores.shape[1], device=scores.device)[None, :] < rows
        ranks.append(((scores > own) | ((scores == own) & earlier)).sum(1))
    return torch.cat(ranks)


def _figures(direction: str, ranks: Tensor, ks: Sequence[int]) -> dict[str, float]:
    """Recalls at ks in percent, median and mean rank from 1."""
    ordered = ranks.double() + 1
    return {
        **{f"{direction}_r{k}": 100 * (ranks < k).double().mean().item() for k in ks},
        # quantile's midpoint of an even count, which torch.median is not.
        f"{direction}_median_rank": ordered.quantile(0.5).item() if len(ordered) < 2**24 else ordered.median().item(),
        f"{direction}_mean_rank": ordered.mean().item(),
    }
