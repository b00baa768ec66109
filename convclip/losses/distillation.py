"""Distillation from a teacher dual tower: the student's softmax over the batch learns to match the teacher's.

Shape legend: B rows of this rank, W world, N = W*B rows of all ranks, D the student's embed, E the teacher's.

Source: open_clip's DistillClipLoss, with a temperature (Hinton et al., arXiv 1503.02531) that divides both logits. The
loss is not multiplied by its square: the recipe's weight does that where it is wanted.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from convclip.distributed import Group, gather, gather_with_gradient, rank, world_size
from convclip.losses.contrastive import check_features
from convclip.losses.tiles import FeatureGradients, LogitTiles, RunningSoftmax, at_least_single, without_autocast


def distillation_loss(
    student_image: Tensor,
    student_text: Tensor,
    student_scale: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    teacher_scale: Tensor,
    temperature: float = 1.0,
    group: Group = None,
    tile: int | None = None,
) -> Tensor:
    """Cross-entropy of the student's softmax under the teacher's, mean over images and over texts; a scalar.

    student_image, student_text [B, D], teacher_image, teacher_text [B, E], normalised, row i of all belonging together;
    the scales () or (1,), exponentiated. No gradient reaches the teacher. Ranks, `tile` and precision as in
    `contrastive.clip_loss`. ValueError on shapes that do not fit.
    """
    check_features(student_image, student_text, tile)
    check_features(teacher_image, teacher_text, tile)
    if len(teacher_image) != len(student_image) or temperature <= 0:
        raise ValueError(
            f"teacher and student need as many rows and the temperature must be positive, not {len(teacher_image)}, "
            f"{len(student_image)} and {temperature}"
        )
    student = _prepare(student_image, student_text, student_scale, temperature)
    teacher = [x.detach() for x in _prepare(teacher_image, teacher_text, teacher_scale, temperature)]
    with without_autocast(student_image):
        if tile is None:
            return _whole_loss(student, teacher, group)
        texts = gather_with_gradient(student[1], group)
        teacher_texts = gather(teacher[1], group)
        return _TiledLoss.apply(student[0], texts, student[2], teacher[0], teacher_texts, teacher[2], tile, group)


def _prepare(image: Tensor, text: Tensor, scale: Tensor, temperature: float) -> list[Tensor]:
    """[image, text, scale / temperature] in at least float32, the scale without dimensions."""
    image, text = at_least_single(image), at_least_single(text)
    return [image, text, scale.to(image.dtype).reshape(()) / temperature]


def _whole_loss(student: list[Tensor], teacher: list[Tensor], group: Group) -> Tensor:
    image, text, scale = student
    teacher_image, teacher_text, teacher_scale = teacher
    logits = [(scale * image) @ gather_with_gradient(text, group).T]
    targets = [(teacher_scale * teacher_image) @ gather(teacher_text, group).T]
    if world_size(group) == 1:
        logits.append(logits[0].T)
        targets.append(targets[0].T)
    else:
        logits.append((scale * text) @ gather_with_gradient(image, group).T)
        targets.append((teacher_scale * teacher_text) @ gather(teacher_image, group).T)
    of_images, of_texts = (F.cross_entropy(x, target.softmax(1)) for x, target in zip(logits, targets, strict=True))
    return (of_images + of_texts) / 2


class _TiledLoss(torch.autograd.Function):
    """Images of this rank [B, .] and texts of all ranks [N, .], student's and teacher's -> this rank's loss.

    As in `contrastive._TiledClipLoss`, with the teacher's softmax in the place of the matching pairs. For a line with
    student logits s and teacher probabilities p, the cross-entropy is logsumexp(s) - sum of p * s.
    """

    @staticmethod
    def forward(ctx: Any, image: Tensor, texts: Tensor, scale: Tensor, *rest: Any) -> Tensor:
        teacher_image, teacher_texts, teacher_scale, tile, group = rest
        first = rank(group) * len(image)
        student = LogitTiles(image, texts, scale, first, tile)
        teacher = LogitTiles(teacher_image, teacher_texts, teacher_scale, first, tile)
        lines = (len(image), len(texts))
        of_student, of_teacher = ([RunningSoftmax(count, image) for count in lines] for _ in range(2))
        for (rows, columns, logits, spare), (_, _, targets, _) in zip(student, teacher, strict=True):
            for dim, part in ((1, rows), (0, columns)):
                of_student[1 - dim].add(part, logits, dim, spare)
                of_teacher[1 - dim].add(part, targets, dim, spare, values=logits)
        of_student[1].join(group)
        of_teacher[1].join(group)
        ctx.save_for_backward(image, texts, scale, teacher_image, teacher_texts, teacher_scale)
        ctx.softmax, ctx.how = (of_student, of_teacher), (first, tile, group)
        own = slice(first, first + len(image))
        of_images = of_student[0].minus_log(of_teacher[0].mean())
        of_texts = of_student[1].minus_log(of_teacher[1].mean(own), own)
        return (of_images.mean() + of_texts.mean()) / 2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        image, texts, scale, teacher_image, teacher_texts, teacher_scale = ctx.saved_tensors
        of_student, of_teacher = ctx.softmax
        first, tile, group = ctx.how
        # A column's share of the loss belongs to the rank that owns the text, and weighs what reaches that rank.
        of_texts = (gather(gradient, group) / (2 * len(image))).repeat_interleave(len(image))
        weights = (of_texts[first : first + len(image)], of_texts)
        with without_autocast(image):
            student = LogitTiles(image, texts, scale, first, tile)
            teacher = LogitTiles(teacher_image, teacher_texts, teacher_scale, first, tile)
            sums = FeatureGradients(student, columns_learn=ctx.needs_input_grad[1])
            for (rows, columns, logits, slope), (_, _, targets, spare) in zip(student, teacher, strict=True):
                of_student[0].probability(rows, logits, 1, weights[0], out=slope)
                slope += of_student[1].probability(columns, logits, 0, weights[1], out=logits)
                slope -= of_teacher[0].probability(rows, targets, 1, weights[0], out=spare)
                slope -= of_teacher[1].probability(columns, targets, 0, weights[1], out=targets)
                sums.add(rows, columns, slope)
            return *sums.finish(), None, None, None, None, None
