"""TeachCLIP's losses (CVPR 2024): ground truth, coarse distillation of the score matrix, fine distillation of frames.

Shapes: B pairs per rank, W world, D embed width, F frames. Pair b is caption b with video b. A rank computes the rows
of its own captions and the columns of its own videos: the mean over ranks of a loss, and of its gradients, is that of
the whole batch. Student and teacher widths need not match, since all losses live on score matrices or frame weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from convclip.distributed import Group, gather_with_gradient, rank

Coarse = Literal["pearson", "ce"]
# The original's weights of (ground truth, coarse, fine) for each kind of coarse loss.
WEIGHTS: dict[Coarse, tuple[float, float, float]] = {"pearson": (0.2, 1.0, 2.0), "ce": (1.0, 10.0, 1.0)}


@dataclass(frozen=True)
class TeacherTargets:
    """One teacher's targets for this rank's pairs, without gradient.

    rows [B, W*B]: logits of own captions against all videos; columns [B, W*B]: of own videos against all captions;
    frames [B, F]: r, how well each frame fits its caption (sums to 1), None for a coarse-only teacher.
    """

    rows: Tensor
    columns: Tensor
    frames: Tensor | None = None


def teachclip_loss(
    text: Tensor,
    video: Tensor,
    logit_scale: Tensor,
    frame_weights: Tensor,
    teachers: Sequence[TeacherTargets],
    mask: Tensor | None = None,
    coarse: Coarse = "pearson",
    weights: tuple[float, float, float] | None = None,
    group: Group = None,
) -> dict[str, Tensor]:
    """`total` and its parts `ground_truth`, `coarse`, `fine` (unweighted), as scalars.

    text, video [B, D] of unit length; logit_scale exponentiated; frame_weights [B, F] at temperature 1; mask [B, F]
    True for real frames, None to count padded ones as the original does. Coarse and fine are averaged over the
    teachers that have them; without teachers they are 0. `weights` default to WEIGHTS[coarse].
    """
    rows, columns = student_logits(text, video, logit_scale, group)
    zero = rows.new_zeros(())
    coarses = [coarse_loss(rows, columns, t.rows, t.columns, coarse) for t in teachers]
    fines = [fine_loss(frame_weights, t.frames, mask) for t in teachers if t.frames is not None]
    parts = {
        "ground_truth": ground_truth_loss(rows, columns, rank(group) * len(rows)),
        "coarse": torch.stack(coarses).mean() if coarses else zero,
        "fine": torch.stack(fines).mean() if fines else zero,
    }
    weighted = (weight * part for weight, part in zip(weights or WEIGHTS[coarse], parts.values(), strict=True))
    total = sum(weighted, start=zero)
    return {"total": total, **parts}


def student_logits(text: Tensor, video: Tensor, logit_scale: Tensor, group: Group = None) -> tuple[Tensor, Tensor]:
    """(own captions against all videos, own videos against all captions), each [B, W*B] in fp32, differentiable."""
    with torch.autocast(text.device.type, enabled=False):
        text, video = text.float(), video.float()
        rows = logit_scale.float() * text @ gather_with_gradient(video, group).T
        columns = logit_scale.float() * video @ gather_with_gradient(text, group).T
        return rows, columns


def ground_truth_loss(rows: Tensor, columns: Tensor, first: int) -> Tensor:
    """Half the cross-entropy of rows plus half that of columns; own pair b stands at place first + b."""
    places = torch.arange(first, first + len(rows), device=rows.device)
    return (F.cross_entropy(rows, places) + F.cross_entropy(columns, places)) / 2


def coarse_loss(
    rows: Tensor, columns: Tensor, teacher_rows: Tensor, teacher_columns: Tensor, kind: Coarse = "pearson"
) -> Tensor:
    """Distance between student's and teacher's softmax, over rows plus over columns; all [B, W*B] logits.

    `pearson`: mean of 1 - correlation. `ce`: cross-entropy from teacher to student, as a mean over all entries of the
    matrix, as in the original, whose weight of 10 expects that.
    """
    pairs = ((rows, teacher_rows), (columns, teacher_columns))
    if kind == "ce":
        of_rows, of_columns = (-(q.softmax(-1) * s.log_softmax(-1)).mean() for s, q in pairs)
    else:
        of_rows, of_columns = ((1 - _correlation(s.softmax(-1), q.softmax(-1))).mean() for s, q in pairs)
    return of_rows + of_columns


def fine_loss(frame_weights: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over B x F of -log(w) * r, for w = frame_weights and r = target, both [B, F].

    With a mask (True for real frames), r is taken over real frames only and padded ones contribute nothing.
    """
    if mask is not None:
        target = target.masked_fill(~mask, 0)
        target = target / target.sum(-1, keepdim=True)
        frame_weights = frame_weights.masked_fill(~mask, 1)
    # A weight that underflowed to 0 must not turn the loss into infinity.
    return -(frame_weights.clamp_min(1e-30).log() * target).mean()


def stuck_at_chance(ground_truth: Sequence[float], global_batch: int, tolerance: float = 0.01) -> bool:
    """True when every one of these ground-truth losses lies within `tolerance` of ln(global_batch), relatively.

    All pairs then have the same score: text and video features have collapsed, and training will not recover.
    """
    chance = math.log(global_batch)
    return bool(ground_truth) and all(abs(loss - chance) <= tolerance * chance for loss in ground_truth)


def _correlation(p: Tensor, q: Tensor) -> Tensor:
    """Pearson correlation of each row: [B, N], [B, N] -> [B]; 0 where a row is constant."""
    return F.cosine_similarity(p - p.mean(-1, keepdim=True), q - q.mean(-1, keepdim=True), dim=-1)
