"""An evaluation set: unique images with all their captions, dealt out to ranks in equal numbers of batches.

Shapes: N images, M captions, B batch, S image side, T tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from convclip.data.samples import BrokenSample, Captions, SampleSource, check_image, decode_image
from convclip.data.sources import open_source
from convclip.data.tokenizers import Tokenizer
from convclip.data.transforms import Views, stack_images
from convclip.data.workers import leave_signals_to_main, plain_worker_errors
from convclip.distributed import is_main
from convclip.schema import Data, UserError

# Index of a row that only fills a batch.
PADDING = -1

CHECKED_AT_ONCE = 64

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]
# A transform that draws nothing: what is scored is the same each time.
FixedTransform = Callable[[Image.Image, None], torch.Tensor]
# The usable captions of an image (None: drop the image), and what is wrong with it.
Check = tuple[Captions | None, list[str]]


@dataclass(frozen=True)
class EvaluationSet:
    """Images 0..N-1 and captions 0..M-1; caption m belongs to image `image_of_text[m]`.

    `image_ids` (int64 [N]) and `caption_ids` (int64 [M]) are the data set's own. `broken` names what was dropped.
    """

    image_ids: torch.Tensor
    captions: list[str]
    caption_ids: torch.Tensor
    image_of_text: torch.Tensor
    broken: list[str]
    _images: _Images
    _texts: _Texts

    def __len__(self) -> int:
        return len(self.image_ids)

    def checksum(self) -> str:
        """What identifies the set: its ids and captions."""
        content = [self.image_ids.tolist(), self.captions, self.caption_ids.tolist(), self.image_of_text.tolist()]
        return hashlib.sha256(json.dumps(content).encode("ascii")).hexdigest()[:16]

    def image_batches(self, rank: int, world: int, batch: int, workers: int = 0) -> Batches:
        """This rank's images as (image numbers int64 [B], uint8 [B, 3, S, S]).

        Every rank gets the same number of batches, of the same sizes; rows numbered -1 (zeros) fill up.
        """
        return dealt_batches(self._images, len(self), rank, world, batch, workers)

    def read_views(self, numbers: Sequence[int], views: Views, view: int, batch: int, workers: int = 0) -> Batches:
        """View `view` of these images as (image numbers int64 [B], uint8 [B, 3, S, S]), in this order."""
        dataset = _ImageViews(self._images, self.image_ids.tolist(), views, view)
        return listed_batches(dataset, numbers, batch, workers)

    def read_texts(
        self, numbers: Sequence[int], batch: int, workers: int = 0, tokenizer: Tokenizer | None = None
    ) -> Batches:
        """These captions as (caption numbers int64 [B], int64 [B, T]), by `tokenizer` if it is given."""
        dataset = self._texts if tokenizer is None else _Texts(self.captions, tokenizer)
        return listed_batches(dataset, numbers, batch, workers)

    def text_batches(self, rank: int, world: int, batch: int, workers: int = 0) -> Batches:
        """This rank's captions as (caption numbers int64 [B], int64 [B, T]), dealt out like images."""
        return dealt_batches(self._texts, len(self.captions), rank, world, batch, workers)


def load_evaluation_set(address: str, data: Data, transform: FixedTransform, tokenizer: Tokenizer) -> EvaluationSet:
    """The evaluation set behind an address (shards or CSV, as for training).

    Every image is decoded once here, JPEGs at an eighth of their size, so that all ranks drop the same broken images
    without talking to one another. Captions that are empty or not UTF-8 are dropped, and images left without any.

    Raises:
        UserError: nothing readable is there, or more than data.max_broken_share of the images are broken.
    """
    source = open_source(address, data)
    total = len(source.counts)
    broken: list[str] = list(source.damage)
    images: list[int] = []
    image_of_text: list[int] = []
    image_ids, captions, caption_ids = [], [], []
    checks = _checks(source, data)
    progress = tqdm(checks, f"checking {address}", total, unit="image", delay=2, disable=not is_main())
    for image, (found, problems) in enumerate(progress):
        broken.extend(problems)
        if found is None:
            continue
        image_of_text.extend([len(images)] * len(found.texts))
        captions.extend(found.texts)
        caption_ids.extend(found.ids)
        images.append(image)
        image_ids.append(found.image_id)
    dropped, promised = total - len(images) + source.lost, total + source.lost
    if not images or dropped > data.max_broken_share * promised:
        raise UserError(
            f"{dropped} of {promised} images of {address} are broken, the first is {broken[0]}: more than "
            f"data.max_broken_share {data.max_broken_share} allows"
        )
    return EvaluationSet(
        image_ids=torch.tensor(image_ids, dtype=torch.int64),
        captions=captions,
        caption_ids=torch.tensor(caption_ids, dtype=torch.int64),
        image_of_text=torch.tensor(image_of_text, dtype=torch.int64),
        broken=broken,
        _images=_Images(source, images, transform, data.max_image_pixels),
        _texts=_Texts(captions, tokenizer),
    )


def _checks(source: SampleSource, data: Data) -> Iterator[Check]:
    """What is usable of each image, in order; read by data.workers processes."""
    total = len(source.counts)
    plan = [range(first, min(first + CHECKED_AT_ONCE, total)) for first in range(0, total, CHECKED_AT_ONCE)]
    dataset = _Checks(source, data.max_image_pixels)
    with plain_worker_errors():
        for checks in _loader(dataset, plan, data.workers):
            yield from checks


class _Checks(Dataset):
    """Numbers of images -> a Check for each."""

    def __init__(self, source: SampleSource, max_pixels: int):
        self.source, self.max_pixels = source, max_pixels

    def __getitem__(self, numbers: range) -> list[Check]:
        return [_check(self.source, image, self.max_pixels) for image in numbers]


def _check(source: SampleSource, image: int, max_pixels: int) -> Check:
    name = source.name(image)
    problems: list[str] = []
    try:
        stored = source.read_captions(image)
        check_image(name, source.read_image(image), max_pixels)
    except BrokenSample as error:
        return None, [str(error)]
    texts, ids = [], []
    for number in range(max(1, len(stored.texts))):
        try:
            texts.append(stored.usable(name, number))
            ids.append(stored.ids[number])
        except BrokenSample as error:
            problems.append(str(error))
    return (Captions(stored.image_id, texts, ids) if texts else None), problems


class _Images(Dataset):
    """Numbers of images [B] -> uint8 [B, 3, S, S]."""

    def __init__(self, source: SampleSource, images: list[int], transform: FixedTransform, max_pixels: int):
        self.source, self.images, self.transform, self.max_pixels = source, images, transform, max_pixels

    def __getitem__(self, numbers: list[int]) -> torch.Tensor:
        return stack_images([self._read(self.images[number]) for number in numbers])

    def _read(self, image: int) -> torch.Tensor:
        return self.read(image, lambda picture: self.transform(picture, None))

    def read(self, image: int, transform: Callable[[Image.Image], torch.Tensor]) -> torch.Tensor:
        """Image `image` of the source under a transform; UserError when it broke since the check at start."""
        name = self.source.name(image)
        try:
            return transform(decode_image(name, self.source.read_image(image), self.max_pixels))
        except (BrokenSample, ValueError) as error:
            raise UserError(f"evaluation image {name} was readable at start and is not now: {error}") from None


class _ImageViews(Dataset):
    """Numbers of images [B] -> uint8 [B, 3, S, S], in one of their fixed views."""

    def __init__(self, images: _Images, image_ids: list[int], views: Views, view: int):
        self.images, self.image_ids, self.views, self.view = images, image_ids, views, view

    def __getitem__(self, numbers: list[int]) -> torch.Tensor:
        return stack_images([self._read(number) for number in numbers])

    def _read(self, number: int) -> torch.Tensor:
        image_id = self.image_ids[number]
        return self.images.read(self.images.images[number], lambda picture: self.views(picture, image_id, self.view))


class _Texts(Dataset):
    """Numbers of captions [B] -> int64 [B, T]."""

    def __init__(self, captions: list[str], tokenizer: Tokenizer):
        self.captions, self.tokenizer = captions, tokenizer

    def __getitem__(self, numbers: list[int]) -> torch.Tensor:
        return self.tokenizer([self.captions[number] for number in numbers])


def dealt_batches(dataset: Dataset, size: int, rank: int, world: int, batch: int, workers: int) -> Batches:
    """Rank r's stretch of 0..size-1 in batches; all ranks' stretches are equally long, filled up with -1."""
    per_rank = -(-size // world)
    start, stop = rank * per_rank, (rank + 1) * per_rank
    plan = []
    for first in range(start, stop, batch):
        rows = range(first, min(first + batch, stop))
        # Padding rows read the last row, for its shape, and are zeroed below.
        plan.append([min(row, size - 1) for row in rows])
    with plain_worker_errors():
        for first, values in zip(range(start, stop, batch), _loader(dataset, plan, workers), strict=True):
            numbers = torch.arange(first, first + len(values))
            numbers[numbers >= size] = PADDING
            values[numbers == PADDING] = 0
            yield numbers, values


def listed_batches(dataset: Dataset, numbers: Sequence[int], batch: int, workers: int) -> Batches:
    """The rows of these numbers in batches, in order."""
    plan = [[int(number) for number in numbers[first : first + batch]] for first in range(0, len(numbers), batch)]
    with plain_worker_errors():
        for rows, values in zip(plan, _loader(dataset, plan, workers), strict=True):
            yield torch.tensor(rows), values


def _loader(dataset: Dataset, plan: list, workers: int) -> DataLoader:
    # A generator of its own, so that the model's does not move.
    return DataLoader(
        dataset,
        sampler=plan,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_is,
        worker_init_fn=leave_signals_to_main,
        generator=torch.Generator(),
    )


def _as_is(item: object) -> object:
    return item
