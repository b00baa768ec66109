"""Image-text retrieval under two protocols, and open_clip's validation loss, in blocks of rows.

Shape legend: N images, T texts, R rows (pairs of one image and one text), D embed. Recalls are in percent, ranks count
from 1. Scores are dot products: features normalised alike give cosine similarity.

`standard` (CLIP_benchmark's): every image once, and any of its captions is a right answer. The rank of an answer is the
number of strictly greater scores + 1, so ties do not count against it. `rowwise` (open_clip_train's): one row per
caption, and only row i is right for row i. Of equal scores, the earlier one ranks better. The two are never comparable,
see `convclip.evaluation.report`. In both, nan (a diverged model) ranks above every score, and a right answer whose
score is nan ranks last. Videos are scored by `standard` too, in the place of images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

KS = (1, 5, 10)
# Scores held at a time: 2**22 floats are 16 MiB, which a CPU's cache still holds.
BLOCK_SCORES = 2**22


def standard_recall(
    image_features: Tensor, text_features: Tensor, image_of_text: Tensor, ks: Sequence[int] = KS
) -> dict[str, float]:
    """{i2t_r1 … t2i_r10, i2t_median_rank, i2t_mean_rank, t2i_median_rank, t2i_mean_rank}.

    image_features [N, D], text_features [T, D], image_of_text int64 [T] in any order, with any number of captions per
    image. An image without captions has nothing to find: it is left out of image-to-text, and stays a wrong answer in
    text-to-image. ValueError when the shapes do not fit or an image number is out of range.
    """
    _check(image_features, text_features, image_of_text)
    images, of_image = _unique_rows(image_features)
    texts, of_text = _unique_rows(text_features)
    row_texts = torch.arange(len(image_of_text), device=image_of_text.device)
    rank_of_caption = _ranks(images, of_image[image_of_text], texts, of_text, row_texts, ties_count=False)
    # An image's best caption is the one that the fewest texts of any kind beat.
    best = torch.full((len(image_features),), len(text_features), device=rank_of_caption.device)
    best.scatter_reduce_(0, image_of_text, rank_of_caption, "amin")
    described = torch.bincount(image_of_text, minlength=len(image_features)) > 0
    rank_of_image = _ranks(texts, of_text, images, of_image, image_of_text, ties_count=False)
    return _figures(best[described], rank_of_image, ks)


def rowwise_recall(
    image_features: Tensor, text_features: Tensor, ks: Sequence[int] = KS, image_of_text: Tensor | None = None
) -> dict[str, float]:
    """The same keys as `standard_recall`, for rows (image i, text i), i = 0..R-1.

    image_features [R, D] with an image's features once for each of its captions; or [N, D] with image_of_text int64
    [R], the image of each row. text_features [R, D]. ValueError when the shapes do not fit.
    """
    rows = torch.arange(len(text_features), device=text_features.device)
    image_of_row = rows if image_of_text is None else image_of_text
    if image_of_text is None and len(image_features) != len(text_features):
        raise ValueError(f"{len(image_features)} image rows for {len(text_features)} text rows: give image_of_text")
    _check(image_features, text_features, image_of_row)
    images, of_image = _unique_rows(image_features)
    texts, of_text = _unique_rows(text_features)
    of_image = of_image[image_of_row]
    image_to_text = _ranks(images, of_image, texts, of_text, rows, ties_count=True)
    text_to_image = _ranks(texts, of_text, images, of_image, rows, ties_count=True)
    return _figures(image_to_text, text_to_image, ks)


def validation_loss(
    image_features: Tensor,
    text_features: Tensor,
    batch: int,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
) -> float:
    """The loss of each `batch` rows in the order given, averaged over rows: open_clip's clip_val_loss, or with a bias
    SigLIP's.

    image_features, text_features [R, D], row i matching row i; logit_scale already exponentiated. As in open_clip, the
    last batch may be smaller and captions of one image in a batch are each other's negatives: values compare only
    where the batch and the order of rows are the same.
    """
    if image_features.shape != text_features.shape or batch < 1:
        raise ValueError(
            f"features must be [R, D] alike and batch positive, not {[*image_features.shape]}, "
            f"{[*text_features.shape]} and {batch}"
        )
    total = torch.zeros((), dtype=torch.float64)
    for image, text in zip(image_features.split(batch), text_features.split(batch), strict=True):
        logits = logit_scale * image.float() @ text.float().T
        pair = torch.arange(len(image), device=image.device)
        if logit_bias is None:
            loss = (F.cross_entropy(logits, pair) + F.cross_entropy(logits.T, pair)) / 2
        else:
            match = F.one_hot(pair).to(logits)
            loss = F.binary_cross_entropy_with_logits(logits + logit_bias, match, reduction="sum") / len(image)
        total += loss.double().cpu() * len(image)
    return (total / len(image_features)).item()


def _check(image_features: Tensor, text_features: Tensor, image_of_text: Tensor) -> None:
    if image_features.ndim != 2 or text_features.ndim != 2 or image_features.shape[1] != text_features.shape[1]:
        shapes = f"{[*image_features.shape]} and {[*text_features.shape]}"
        raise ValueError(f"image and text features must be [N, D] and [T, D] with one D, not {shapes}")
    if image_of_text.shape != text_features.shape[:1] or not len(text_features):
        raise ValueError(f"{len(text_features)} texts need as many entries in image_of_text, not {len(image_of_text)}")
    if image_of_text.min() < 0 or image_of_text.max() >= len(image_features):
        raise ValueError(f"image_of_text names an image outside 0..{len(image_features) - 1}")


def _unique_rows(features: Tensor) -> tuple[Tensor, Tensor]:
    """(different rows [U, D] in float32, which of them each row is [rows]).

    Equal rows must tie. Computed twice they might not: a matrix product may round by the place of a column.
    """
    return torch.unique(features.float(), dim=0, return_inverse=True)


def _ranks(
    queries: Tensor, query_of_row: Tensor, answers: Tensor, answer_of_column: Tensor, right: Tensor, ties_count: bool
) -> Tensor:
    """int64 [rows]: how many columns beat column right[r] for row r's query.

    queries [Q, D] with query_of_row [rows]; answers [A, D] with answer_of_column [columns]. With `ties_count`, an equal
    score in an earlier column beats too.
    """
    ranks = torch.empty_like(query_of_row)
    columns = torch.arange(len(answer_of_column), device=queries.device)
    blocks = query_of_row.argsort(stable=True).split(max(1, BLOCK_SCORES // len(columns)))
    for rows in tqdm(blocks, "scoring", leave=False, delay=2):
        # Rows of one query stand together, so that its scores are computed once.
        of_block, query_of_block = torch.unique(query_of_row[rows], return_inverse=True)
        scores = queries[of_block] @ answers.T
        scores = scores.index_select(0, query_of_block).index_select(1, answer_of_column)
        place = right[rows, None]
        threshold = scores.gather(1, place)
        # Not "greater": a comparison with nan is false, and a diverged model would have every answer right.
        beats = (scores <= threshold).logical_not_()
        if ties_count:
            beats |= (scores == threshold) & (columns < place)
        # nan beats itself, too: the last of n columns is beaten by n - 1.
        ranks[rows] = beats.sum(1, dtype=torch.int32).clamp_max_(len(columns) - 1).long()
    return ranks


def _figures(image_to_text: Tensor, text_to_image: Tensor, ks: Sequence[int]) -> dict[str, float]:
    """Recalls in percent and ranks from 1, of the numbers of better answers; a median of two is their mean."""
    figures: dict[str, float] = {}
    for way, better in (("i2t", image_to_text.double()), ("t2i", text_to_image.double())):
        figures |= {f"{way}_r{k}": 100 * (better < k).double().mean().item() for k in ks}
        figures[f"{way}_median_rank"] = better.quantile(0.5).item() + 1
        figures[f"{way}_mean_rank"] = better.mean().item() + 1
    return figures
