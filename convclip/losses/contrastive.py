"""Contrastive losses over all ranks' rows: softmax (CLIP) and sigmoid (SigLIP), whole or in tiles.

Shape legend: B rows of this rank, W world, N = W*B rows of all ranks, D embed.

Without `tile`, plain autograd on blocks of B x N logits. With it, one tile of logits at a time, in forward and
backward, so memory grows with N*D instead of with N^2; each logit is computed by one rank (image row x text column),
and the softmax over a column is put together from the ranks' parts of it. Tiled and whole agree to rounding.
About 2048 suits a CPU; on a GPU, where launching small work costs more than doing it, take 4096 or more.

Sources: CLIP (arXiv 2103.00020), SigLIP (arXiv 2303.15343); tiles after Inf-CL (arXiv 2410.17243).
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from convclip.distributed import Group, gather, gather_with_gradient, rank, world_size
from convclip.losses.tiles import (
    FeatureGradients,
    LogitTiles,
    RunningSoftmax,
    at_least_single,
    same_image,
    without_autocast,
)

# The image ids of this rank's rows [B] and of all ranks' [N].
Ids: TypeAlias = tuple[Tensor, Tensor] | None


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    group: Group = None,
    tile: int | None = None,
    ids: Tensor | None = None,
) -> Tensor:
    """CLIP's loss: the mean over images and over texts of -log softmax of the matching pair; a scalar.

    image_features, text_features [B, D], already normalised, row i matching row i, B the same on every rank;
    logit_scale () or (1,), already exponentiated. `ids` int64 [B], the images: rows of one image are never each
    other's negatives. Each rank's value is the mean over its own rows; the mean over ranks of values and of gradients
    is that of the whole batch. float16 and bfloat16 are computed in float32. ValueError on shapes that do not fit.
    """
    check_features(image_features, text_features, tile, ids)
    image, text = at_least_single(image_features), at_least_single(text_features)
    scale = logit_scale.to(image.dtype).reshape(())
    both_ids = None if ids is None else (ids, gather(ids, group))
    with without_autocast(image):
        if tile is None:
            return _whole_clip_loss(image, text, scale, both_ids, group)
        return _TiledClipLoss.apply(image, gather_with_gradient(text, group), scale, both_ids, tile, group)


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    group: Group = None,
    tile: int | None = None,
    ids: Tensor | None = None,
) -> Tensor:
    """SigLIP's loss: -log sigmoid(±(scale * image . text + bias)) summed over all pairs, divided by the images.

    logit_bias () or (1,); everything else as in `clip_loss`.
    """
    check_features(image_features, text_features, tile, ids)
    image, text = at_least_single(image_features), at_least_single(text_features)
    scale, bias = (x.to(image.dtype).reshape(()) for x in (logit_scale, logit_bias))
    both_ids = None if ids is None else (ids, gather(ids, group))
    with without_autocast(image):
        texts = gather_with_gradient(text, group)
        first = rank(group) * len(image)
        if tile is None:
            return _whole_siglip_loss(image, texts, scale, bias, both_ids, first)
        learns = torch.is_grad_enabled() and any(x.requires_grad for x in (image, texts, scale, bias))
        return _TiledSiglipLoss.apply(image, texts, scale, bias, both_ids, first, tile, learns)


def check_features(image: Tensor, text: Tensor, tile: int | None, ids: Tensor | None = None) -> None:
    """ValueError where the arguments of a loss do not fit one another."""
    if image.ndim != 2 or text.shape != image.shape:
        raise ValueError(f"image and text features must be [B, D] alike, not {[*image.shape]} and {[*text.shape]}")
    if tile is not None and tile < 1:
        raise ValueError(f"tile must be a positive number of rows, not {tile}")
    if ids is not None and ids.shape != image.shape[:1]:
        raise ValueError(f"ids must have one entry for each of the {len(image)} rows, not shape {[*ids.shape]}")


def _whole_clip_loss(image: Tensor, text: Tensor, scale: Tensor, ids: Ids, group: Group) -> Tensor:
    first = rank(group) * len(image)
    pair = first + torch.arange(len(image), device=image.device)
    per_image = _logits(image, gather_with_gradient(text, group), scale, ids, first)
    if world_size(group) == 1:
        per_text = per_image.T
    else:
        per_text = _logits(text, gather_with_gradient(image, group), scale, ids, first)
    return (F.cross_entropy(per_image, pair) + F.cross_entropy(per_text, pair)) / 2


def _whole_siglip_loss(image: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, ids: Ids, first: int) -> Tensor:
    sign = 2 * torch.eye(len(image), len(texts), dtype=image.dtype, device=image.device).roll(first, 1) - 1
    return -F.logsigmoid(sign * (_logits(image, texts, scale, ids, first) + bias)).sum() / len(image)


def _logits(rows: Tensor, columns: Tensor, scale: Tensor, ids: Ids, first: int) -> Tensor:
    """[B, N]; -inf where a column is of the row's image without being its pair, which is column `first` + row."""
    logits = (scale * rows) @ columns.T
    return logits if ids is None else logits.masked_fill_(same_image(*ids, first), -torch.inf)


class _TiledClipLoss(torch.autograd.Function):
    """Images of this rank [B, D] and texts of all ranks [N, D] -> this rank's loss.

    A rank's tiles hold whole image rows, so their softmax is complete; the softmax over a text column is joined from
    all ranks' parts. A rank's gradient for the texts is a part too; the backward pass of the gather sums the parts.
    """

    @staticmethod
    def forward(ctx: Any, image: Tensor, texts: Tensor, scale: Tensor, ids: Ids, tile: int, group: Group) -> Tensor:
        first = rank(group) * len(image)
        tiles = LogitTiles(image, texts, scale, first, tile, ids)
        over_texts, over_images = RunningSoftmax(len(image), image), RunningSoftmax(len(texts), image)
        matching = image.new_empty(len(image))
        for rows, columns, logits, spare in tiles:
            paired, entries = tiles.pairs(rows, columns, logits)
            matching[paired] = entries
            over_texts.add(rows, logits, 1, spare)
            over_images.add(columns, logits, 0, spare)
        over_images.join(group)
        ctx.save_for_backward(image, texts, scale)
        ctx.softmax, ctx.how = (over_texts, over_images), (first, tile, ids, group)
        own = slice(first, first + len(image))
        return (over_texts.minus_log(matching).mean() + over_images.minus_log(matching, own).mean()) / 2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        image, texts, scale = ctx.saved_tensors
        over_texts, over_images = ctx.softmax
        first, tile, ids, group = ctx.how
        # A column's share of the loss belongs to the rank that owns the text, and weighs what reaches that rank.
        of_texts = (gather(gradient, group) / (2 * len(image))).repeat_interleave(len(image))
        of_images = of_texts[first : first + len(image)]
        with without_autocast(image):
            tiles = LogitTiles(image, texts, scale, first, tile, ids)
            sums = FeatureGradients(tiles, columns_learn=ctx.needs_input_grad[1])
            for rows, columns, logits, spare in tiles:
                over_texts.probability(rows, logits, 1, of_images, out=spare)
                spare += over_images.probability(columns, logits, 0, of_texts, out=logits)
                paired, entries = tiles.pairs(rows, columns, spare)
                entries -= 2 * of_images[paired]
                sums.add(rows, columns, spare)
            return *sums.finish(), None, None, None


class _TiledSiglipLoss(torch.autograd.Function):
    """Images of this rank [B, D] and texts of all ranks [N, D] -> this rank's loss.

    No softmax ties the pairs together, so the gradients are found in the forward pass, where the logits are at hand.
    """

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        texts: Tensor,
        scale: Tensor,
        bias: Tensor,
        ids: Ids,
        first: int,
        tile: int,
        learns: bool,
    ) -> Tensor:
        tiles = LogitTiles(image, texts, scale, first, tile, ids)
        sums = FeatureGradients(tiles, columns_learn=texts.requires_grad) if learns else None
        loss, bias_sum = image.new_zeros(len(image)), image.new_zeros(len(image))
        for rows, columns, logits, spare in tiles:
            # With the sign of the pairs turned, the loss of every entry is -log sigmoid(-x) and its slope sigmoid(x).
            logits += bias
            tiles.pairs(rows, columns, logits)[1].neg_()
            loss[rows] -= F.logsigmoid(torch.neg(logits, out=spare)).sum(1)
            if sums is not None:
                slope = logits.sigmoid_()
                tiles.pairs(rows, columns, slope)[1].neg_()
                bias_sum[rows] += slope.sum(1)
                sums.add(rows, columns, slope)
        if sums is not None:
            ctx.save_for_backward(*sums.finish(), bias_sum.sum())
        ctx.rows = len(image)
        return loss.sum() / len(image)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (None if x is None else x * (gradient / ctx.rows) for x in ctx.saved_tensors)
        return *gradients, None, None, None, None
