"""Embedding an evaluation set on all ranks, and its figures. Shapes: N images, M texts, D embed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from convclip.data.evaluation_set import PADDING, EvaluationSet
from convclip.data.transforms import normalize
from convclip.distributed import gather, gather_objects, is_main, rank, world_size
from convclip.evaluation.retrieval import rowwise_recall, standard_recall, validation_loss
from convclip.models.dual_tower import Outputs
from convclip.schema import ImageTowerConfig

# A model called as (images=…) or (texts=…).
Encode = Callable[..., Outputs]
# What one batch is embedded from.
Given = TypeVar("Given")


@dataclass(frozen=True)
class Encoder:
    """A model, and how an evaluation runs it: `batch` images (or videos) at a time, read by `workers` processes."""

    encode: Encode
    image_tower: ImageTowerConfig
    device: torch.device
    dtype: torch.dtype
    batch: int = 128
    workers: int = 0

    def pixels(self, images: Tensor) -> Tensor:
        """uint8 images [B, 3, S, S] as the image tower takes them: on the device, normalised, in `dtype`."""
        moved = images.to(self.device, non_blocking=True)
        return normalize(moved, self.image_tower.mean, self.image_tower.std, self.dtype)


@torch.no_grad()
def embed(encoder: Encoder, dataset: EvaluationSet) -> Outputs:
    """Embeddings of all N images [N, D] and M captions [M, D], with the model's scale and bias, on every rank.

    Every rank runs the same number of batches, so that ZeRO-3's collectives stay in step.
    """
    place = rank(), world_size(), encoder.batch

    def pictures(images: Tensor) -> Tensor:
        features = encoder.encode(images=encoder.pixels(images)).image
        assert features is not None  # of a tower that had input
        return features

    image_batches = dataset.image_batches(*place, encoder.workers)
    images = embed_rows(pictures, image_batches, len(dataset), "embedding images")
    scales: list[Outputs] = []

    def captions(texts: Tensor) -> Tensor:
        outputs = encoder.encode(texts=texts.to(encoder.device, non_blocking=True))
        scales[:] = [outputs]
        assert outputs.text is not None  # of a tower that had input
        return outputs.text

    text_batches = dataset.text_batches(*place, encoder.workers)
    texts = embed_rows(captions, text_batches, len(dataset.captions), "embedding texts")
    return Outputs(images, texts, scales[0].logit_scale, scales[0].logit_bias, {})


def evaluate(encoder: Encoder, dataset: EvaluationSet) -> dict[str, Any]:
    """Figures of both protocols: {"standard", "rowwise", "val_loss", "images", "texts"}; the same on every rank.

    The validation loss takes the captions in the set's order, `encoder.batch` at a time.
    """
    return score(embed(encoder, dataset), dataset, encoder.batch)


def score(found: Outputs, dataset: EvaluationSet, batch: int) -> dict[str, Any]:
    """`evaluate` of embeddings that are there: those of all images [N, D] and captions [M, D], on every rank."""
    figures = _figures(found, dataset.image_of_text.to(found.logit_scale.device), batch) if is_main() else None
    # Scored once: ranks that share a machine's cores would only slow one another down.
    return gather_objects(figures)[0]


def _figures(found: Outputs, image_of_text: Tensor, batch: int) -> dict[str, Any]:
    images, texts = found.both()
    return {
        "standard": standard_recall(images, texts, image_of_text),
        "rowwise": rowwise_recall(images, texts, image_of_text=image_of_text),
        "val_loss": validation_loss(images[image_of_text], texts, batch, found.logit_scale, found.logit_bias),
        "images": len(images),
        "texts": len(texts),
    }


def embed_rows(
    embed_batch: Callable[[Given], Tensor], batches: Iterable[tuple[Tensor, Given]], count: int, what: str
) -> Tensor:
    """Rows of all ranks in the data set's order [count, D]."""
    numbers, features = [], []
    for indices, inputs in tqdm(batches, desc=what, disable=not is_main(), leave=False, delay=2):
        features.append(embed_batch(inputs).float())
        numbers.append(indices.to(features[-1].device))
    places, rows = gather(torch.cat(numbers)), gather(torch.cat(features))
    ordered = rows.new_empty(count, rows.shape[1])
    real = places != PADDING
    ordered[places[real]] = rows[real]
    return ordered
