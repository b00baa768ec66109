"""Retrieval that runs what is frozen once: for many runs of one feature store, or many evaluations of one run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from convclip.distributed import rank, world_size
from convclip.engine.stored.frozen import FrozenWork
from convclip.engine.task import Retrieval, encoder_of
from convclip.evaluation.embedding import Encode, Encoder, embed_rows, score
from convclip.models.dual_tower import Cut, Outputs
from convclip.schema import Recipe

# The feature maps of a larger evaluation set are computed each time.
KEPT_BYTES = 2 * 2**30


class FrozenRetrieval(Retrieval):
    """As Retrieval, to the bit, for models that all have one `work` frozen, with the same weights.

    The first evaluation keeps the feature maps [B, C, H, W] at the cut, on the CPU and up to `KEPT_BYTES` of a rank,
    and the embeddings [M, D] of a locked text tower; later ones start from them.
    """

    def __init__(self, recipe: Recipe, address: str, work: FrozenWork) -> None:
        """As Retrieval. `work` is what is stored of the training data. Errors: UserError."""
        super().__init__(recipe, address)
        self.work, self._cut = work, Cut(work.boundary)
        self._maps: list[tuple[Tensor, Tensor]] | None = None
        self._texts: Tensor | None = None

    @torch.no_grad()
    def figures(self, encode: Encode, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """As Evaluation."""
        encoder, data = encoder_of(self.recipe, encode, device, dtype), self.dataset
        scales: list[Outputs] = []

        def pictures(maps: Tensor) -> Tensor:
            outputs = encode(images=maps.to(device), start=self._cut)
            scales[:] = [outputs]
            assert outputs.image is not None  # of a tower that had input
            return outputs.image

        def captions(tokens: Tensor) -> Tensor:
            text = encode(texts=tokens.to(device)).text
            assert text is not None  # of a tower that had input
            return text

        images = embed_rows(pictures, self._entering(encoder), len(data), "embedding images")
        texts = self._texts
        if texts is None:
            batches = data.text_batches(rank(), world_size(), encoder.batch, encoder.workers)
            texts = embed_rows(captions, batches, len(data.captions), "embedding texts")
        if self.work.text:
            self._texts = texts
        return score(Outputs(images, texts, scales[0].logit_scale, scales[0].logit_bias, {}), data, encoder.batch)

    def _entering(self, encoder: Encoder) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's image numbers [B] and what enters the image tower at the cut, batch by batch."""
        if self._maps is not None:
            yield from self._maps
            return
        kept, size = [], 0
        for numbers, pixels in self.dataset.image_batches(rank(), world_size(), encoder.batch, encoder.workers):
            entering = encoder.pixels(pixels)
            if self._cut.image:
                image = encoder.encode(images=entering, stop=self._cut).image
                assert image is not None  # of a tower that had input
                entering = image
            size += entering.nbytes
            if size <= KEPT_BYTES:
                kept.append((numbers, entering.cpu()))
            else:
                kept.clear()
            yield numbers, entering
        if size <= KEPT_BYTES:
            self._maps = kept
