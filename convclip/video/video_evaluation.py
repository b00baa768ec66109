"""Embedding an evaluation set of videos on all ranks, its figures, and the table people read.

Shapes: V videos, C captions, F frames, D embed width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from convclip.distributed import gather_objects, is_main, rank, world_size
from convclip.evaluation import report
from convclip.evaluation.embedding import Encoder, embed_rows
from convclip.evaluation.retrieval import standard_recall
from convclip.video.clip_loader import VideoEvaluationSet
from convclip.video.student import mean_pool

WAYS = ("t2v", "v2t")
NAMES = {"standard": "aggregation", "mean_pool": "zero-shot mean pool"}


@torch.no_grad()
def evaluate_videos(encoder: Encoder, dataset: VideoEvaluationSet, zero_shot: bool = False) -> dict[str, Any]:
    """{"standard": recalls, "videos": V, "texts": C}, the same on every rank; `encoder.batch` videos at a time.

    Each video's frames run once. With `zero_shot`, "mean_pool" are the recalls of the mean of the frames' embeddings.
    """
    place, device = (rank(), world_size(), encoder.batch), encoder.device

    def videos(numbers: Tensor, frames: Tensor) -> Tensor:
        pixels = encoder.pixels(frames.flatten(0, 1))
        counts = dataset.n_frames[numbers].to(device)
        output = encoder.encode(pixels.unflatten(0, frames.shape[:2]), None, counts)
        assert output.image is not None  # of frames that were given
        return torch.stack([output.image, mean_pool(output.extras["frame_features"], counts)], dim=1).flatten(1)

    def captions(texts: Tensor) -> Tensor:
        features = encoder.encode(None, texts.to(device, non_blocking=True)).text
        assert features is not None  # of captions that were given
        return features

    count = len(dataset.split.video_ids)
    pairs = ((numbers, (numbers, frames)) for numbers, frames in dataset.video_batches(*place, encoder.workers))
    rows = embed_rows(lambda given: videos(*given), pairs, count, "embedding videos")
    aggregated, pooled = rows.unflatten(1, (2, -1)).unbind(1)
    text_batches = dataset.text_batches(rank(), world_size(), 16 * encoder.batch, encoder.workers)
    texts = embed_rows(captions, text_batches, len(dataset.split.captions), "embedding captions")
    video_of_text = dataset.video_of_text.to(texts.device)
    figures = None
    if is_main():
        figures = {"standard": video_recall(aggregated, texts, video_of_text), "videos": count, "texts": len(texts)}
        if zero_shot:
            figures["mean_pool"] = video_recall(pooled, texts, video_of_text)
    # Scored once: ranks that share a machine's cores would only slow one another down.
    return gather_objects(figures)[0]


def video_recall(video_features: Tensor, text_features: Tensor, video_of_text: Tensor) -> dict[str, float]:
    """`standard_recall` of [V, D] and [C, D] under the names of videos: {t2v_r1 … v2t_mean_rank}.

    video_of_text int64 [C]; ValueError where a video has no caption, as its split then is wrong.
    """
    described = len(video_of_text.unique())
    if described != len(video_features):
        raise ValueError(f"{len(video_features)} videos but captions of {described}: every video needs a caption")
    return _named(standard_recall(video_features, text_features, video_of_text))


def format_video_table(figures: dict[str, Any]) -> str:
    """Recalls, median and mean rank beside their chance level, as lines of text."""
    videos, texts = figures["videos"], figures["texts"]
    lines = [f"{videos} videos, {texts} captions", report.header_line("", WAYS, width=20)]
    rows = {name: figures[key] for key, name in NAMES.items() if key in figures} | {"by chance": chance(videos, texts)}
    lines += [report.figures_line(name, row, WAYS, width=20) for name, row in rows.items()]
    return "\n".join(lines)


def chance(videos: int, texts: int) -> dict[str, float]:
    """What random scores give on average, with the mean number of captions for every video."""
    return _named(report.chance("standard", videos, texts))


def start_is_lost(figures: dict[str, Any]) -> bool:
    """Whether recall through the aggregation starts far below the zero-shot mean pool's: the alignment is lost."""
    pooled, started = (sum(figures[key][f"{way}_r10"] for way in WAYS) for key in ("mean_pool", "standard"))
    by_chance = sum(chance(figures["videos"], figures["texts"])[f"{way}_r10"] for way in WAYS)
    return pooled > 1.5 * by_chance and started - by_chance < 0.7 * (pooled - by_chance)


def _named(figures: dict[str, float]) -> dict[str, float]:
    """Figures of images under the names of videos, captions first as in WAYS."""
    renamed = {key.replace("t2i", "t2v").replace("i2t", "v2t"): value for key, value in figures.items()}
    return dict(sorted(renamed.items(), key=lambda item: WAYS.index(item[0][:3])))
