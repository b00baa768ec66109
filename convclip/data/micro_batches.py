"""A micro batch of the training stream, made in a data worker: rows of an epoch read, decoded and tokenised.

Shapes: B micro batch, S image side, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from convclip.data.samples import BrokenSample, SampleSource, decode_image
from convclip.data.tokenizers import Tokenizer
from convclip.data.transforms import Views, stack_images
from convclip.schema import Data, UserError

Transform = Callable[[Image.Image, np.random.Generator], torch.Tensor]

# Random streams drawn from (seed, epoch, row, ...); apart from those of convclip.data.order.
AUGMENTATION, REPLACEMENT = 2, 3
REPLACEMENTS = 20


class Batch(TypedDict, total=False):
    """A micro batch of images and captions, on the CPU; `image`, `text` and `teacher_text` only where they are read.

    image: uint8 [B, 3, S, S]. text: int64 [B, T]. teacher_text: int64 [B, teacher's T]. image_id, caption_id: int64
    [B]. broken: one line for each sample that could not be used and was replaced.
    """

    image: torch.Tensor
    text: torch.Tensor
    teacher_text: torch.Tensor
    image_id: torch.Tensor
    caption_id: torch.Tensor
    broken: list[str]


@dataclass(frozen=True)
class Rows:
    """What a worker is told: row numbers of an epoch with their images and captions (int64 [B]), and what to read."""

    epoch: int
    pixels: bool
    text: bool
    row: np.ndarray
    image: np.ndarray
    caption: np.ndarray


class MicroBatches(Dataset):
    """Rows -> batch, in the worker."""

    def __init__(
        self,
        source: SampleSource,
        data: Data,
        transform: Transform,
        tokenizer: Tokenizer,
        seed: int,
        views: Views | None = None,
        teacher_tokenizer: Tokenizer | None = None,
        stored: frozenset[int] | None = None,
    ):
        self.source, self.data, self.seed, self.transform, self.views = source, data, seed, transform, views
        self.stored, self.tokenizer, self.teacher_tokenizer = stored, tokenizer, teacher_tokenizer

    def __getitem__(self, rows: Rows) -> Batch:
        images, texts, image_ids, caption_ids = [], [], [], []
        broken: list[str] = []
        for row, image, caption in zip(rows.row.tolist(), rows.image.tolist(), rows.caption.tolist(), strict=True):
            pixels, text, image_id, caption_id = self._sample(rows, row, image, caption, broken)
            images.append(pixels)
            texts.append(text)
            image_ids.append(image_id)
            caption_ids.append(caption_id)
        batch: Batch = {
            "image_id": torch.tensor(image_ids, dtype=torch.int64),
            "caption_id": torch.tensor(caption_ids, dtype=torch.int64),
            "broken": broken,
        }
        if rows.pixels:
            batch["image"] = stack_images([pixels for pixels in images if pixels is not None])
        if rows.text:
            batch["text"] = self.tokenizer(texts)
            if self.teacher_tokenizer is not None:
                batch["teacher_text"] = self.teacher_tokenizer(texts)
        return batch

    def _sample(
        self, rows: Rows, row: int, image: int, caption: int, broken: list[str]
    ) -> tuple[torch.Tensor | None, str, int, int]:
        """(pixels, caption, image id, caption id) of a row, or of the sample that stands in for a broken one."""
        for attempt in range(REPLACEMENTS):
            try:
                return self._read(rows, row, image, caption)
            except BrokenSample as error:
                broken.append(str(error))
            generator = np.random.default_rng((self.seed, rows.epoch, row, REPLACEMENT, attempt))
            image = int(generator.integers(len(self.source.counts)))
            caption = int(generator.integers(self.source.counts[image]))
        raise UserError(f"{REPLACEMENTS} samples in a row are broken, the last is {broken[-1]}")

    def _read(self, rows: Rows, row: int, image: int, caption: int) -> tuple[torch.Tensor | None, str, int, int]:
        name = self.source.name(image)
        captions = self.source.read_captions(image)
        text = captions.usable(name, caption)
        if self.stored is not None and captions.image_id not in self.stored:
            raise BrokenSample(f"{name}: image {captions.image_id} is not in the feature store")
        pixels = self._pixels(rows.epoch, row, image, captions.image_id, name) if rows.pixels else None
        return pixels, text, captions.image_id, captions.ids[caption]

    def _pixels(self, epoch: int, row: int, image: int, image_id: int, name: str) -> torch.Tensor:
        picture = decode_image(name, self.source.read_image(image), self.data.max_image_pixels)
        try:
            if self.views is not None:
                return self.views(picture, image_id, epoch % self.views.count)
            return self.transform(picture, np.random.default_rng((self.seed, epoch, row, AUGMENTATION)))
        # Rare pixel modes decode but cannot be resized; the image is at fault, not the run.
        except (ValueError, OSError) as error:
            raise BrokenSample(f"{name}: {error}") from None
