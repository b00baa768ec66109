"""The training stream: micro batches of an epoch through data workers.

Which rows a batch has is arithmetic (`convclip.data.order`), so workers only read, decode and tokenise: the stream
does not depend on how many there are, and it starts at any step without reading what came before.
Shapes: B micro batch, S image side, T tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import zlib
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from convclip.data.micro_batches import Batch, MicroBatches, Rows, Transform
from convclip.data.order import EpochOrder, epoch_order, micro_batch, rows_per_epoch
from convclip.data.samples import BrokenSample
from convclip.data.sources import open_source
from convclip.data.tokenizers import Tokenizer
from convclip.data.transforms import Views
from convclip.data.workers import leave_signals_to_main, plain_worker_errors
from convclip.schema import BatchConfig, Data, UserError

log = logging.getLogger(__name__)

SAMPLES_BEFORE_STOP = 100
# Images that a checkpoint's fingerprint of the data is taken from, with their captions.
FINGERPRINTED = 64


class Rowed(Protocol):
    """Items with captions, in shards: what the order of an epoch is made from (as in SampleSource)."""

    counts: np.ndarray
    shard: np.ndarray
    damage: list[str]
    lost: int

    def describe(self) -> str:
        """One line for the log."""


class EpochLoader:
    """Micro batches of one rank, of the rows that `epoch_order` gives; `dataset` makes a batch of Rows.

    A batch holds at least "caption_id" (int64 [B]) and "broken", the samples that could not be used, with the reason.
    `seen` and `broken` count this rank's samples since the loader was made. What damaged shards have lost counts as
    broken too, and is logged with the first epoch.

    Raises:
        UserError: the source holds less than one global batch, or has lost more than data.max_broken_share.
    """

    def __init__(
        self,
        source: Rowed,
        dataset: Dataset,
        data: Data,
        batch: BatchConfig,
        rank: int,
        world: int,
        seed: int,
        pin_memory: bool = False,
    ):
        self.source, self.data, self.rank, self.world, self.seed = source, data, rank, world, seed
        self.micro, self.micro_per_step = batch.per_rank(world)
        self.rows_per_epoch = rows_per_epoch(source.counts, data.captions)
        self.steps_per_epoch = self.rows_per_epoch // batch.global_
        if self.steps_per_epoch == 0:
            raise UserError(
                f"{data.train} has {self.rows_per_epoch} rows per epoch, fewer than one global batch: "
                f"lower batch.global (now {batch.global_})"
            )
        self.seen = 0
        self.broken = 0
        self.lost_share = source.lost / (source.lost + len(source.counts))
        if self.lost_share > data.max_broken_share:
            raise UserError(
                f"{data.train} has lost about {source.lost} of {source.lost + len(source.counts)} samples, more than "
                f"data.max_broken_share {data.max_broken_share} allows: {source.damage[0]}"
            )
        self._untold = list(source.damage) if rank == 0 else []
        self._plan = _Plan()
        self._loader = DataLoader(
            dataset,
            sampler=self._plan,
            batch_size=None,
            num_workers=data.workers,
            persistent_workers=data.workers > 0,
            pin_memory=pin_memory,
            worker_init_fn=leave_signals_to_main,
            # DataLoader draws its workers' seed from this generator, so that the model's does not move.
            generator=torch.Generator(),
        )

    def describe(self) -> str:
        """One line for the log: what is read, and the epoch's arithmetic."""
        step = self.micro * self.micro_per_step * self.world
        return (
            f"train data: {self.source.describe()}; captions {self.data.captions}: {self.rows_per_epoch:,} rows and "
            f"{self.steps_per_epoch:,} steps per epoch, the last {self.rows_per_epoch - self.steps_per_epoch * step} "
            f"rows left out; {self.data.workers} workers per rank"
        )

    def fingerprint(self) -> dict[str, Any]:
        """What the stream is made from, for a checkpoint: counts, and a checksum of what orders an epoch."""
        order = zlib.crc32(np.ascontiguousarray(self.source.counts).tobytes())
        return {
            "rows per epoch": self.rows_per_epoch,
            "steps per epoch": self.steps_per_epoch,
            "images or videos": len(self.source.counts),
            "captions": int(self.source.counts.sum()),
            "captions of each, and their shards (checksum)": zlib.crc32(
                np.ascontiguousarray(self.source.shard).tobytes(), order
            ),
        }

    def epoch(self, epoch: int, start_step: int = 0, pixels: bool = True, text: bool = True) -> Iterator[Batch]:
        """This rank's micro batches of `epoch` from optimizer step `start_step` on, micro_per_step for each step.

        Without `pixels` or `text` these are left out of the batches and no image is read or caption tokenised.

        Raises:
            UserError: more than data.max_broken_share of the samples are broken, or a data worker died.
        """
        order = epoch_order(
            self.source.counts, self.source.shard, self.data.captions, self.data.shuffle_shards, self.seed, epoch
        )
        steps = range(start_step * self.micro_per_step, self.steps_per_epoch * self.micro_per_step)
        self._plan.batches = [self._rows(order, epoch, index, pixels, text) for index in steps]
        # Not in __init__: the run's log is not open then.
        while self._untold:
            log.warning("train data: %s", self._untold.pop(0))
        with plain_worker_errors():
            for number, batch in enumerate(self._loader, start=1):
                # Before the last batch is yielded: a caller that stops there never resumes this generator.
                self._count(batch, is_last=number == len(self._plan))
                yield batch

    def _rows(self, order: EpochOrder, epoch: int, index: int, pixels: bool, text: bool) -> Rows:
        rows = micro_batch(len(order), index, self.micro, self.rank, self.world)
        return Rows(epoch, pixels, text, np.arange(rows.start, rows.stop), order.image[rows], order.caption[rows])

    def _count(self, batch: Batch, is_last: bool) -> None:
        self.seen += len(batch["caption_id"])
        self.broken += len(batch["broken"])
        enough = self.seen >= SAMPLES_BEFORE_STOP or is_last
        if enough and self.broken > (self.data.max_broken_share - self.lost_share) * self.seen:
            example = f", the last is {batch['broken'][-1]}" if batch["broken"] else ""
            raise UserError(
                f"{self.broken} of {self.seen} samples of {self.data.train} are broken{example}: more than "
                f"data.max_broken_share {self.data.max_broken_share} allows"
            )


class TrainLoader(EpochLoader):
    """Micro batches of images and captions.

    A batch is a `Batch`. Each broken sample was replaced by another one drawn from (seed, epoch, row).
    With a `teacher_tokenizer`, `teacher_text` has the captions in its tokens, wherever `text` is read.

    Args:
        transform: `(image, numpy generator) -> uint8 [3, S, S]`; the generator is seeded by (seed, epoch, row).
        views: fixed views per image in place of `transform`.
        stored: ids of the images that a feature store has; others count as broken.
        pin_memory: set when an accelerator is used, so that copies to it need not wait.

    Raises:
        UserError: data.train is missing or unreadable, or holds less than one global batch.
    """

    def __init__(
        self,
        data: Data,
        batch: BatchConfig,
        transform: Transform,
        tokenizer: Tokenizer,
        rank: int,
        world: int,
        seed: int,
        pin_memory: bool = False,
        views: Views | None = None,
        teacher_tokenizer: Tokenizer | None = None,
        stored: frozenset[int] | None = None,
    ):
        if data.train is None:
            raise UserError("data.train is not set: name the training data with --train_data")
        source = open_source(data.train, data)
        dataset = MicroBatches(source, data, transform, tokenizer, seed, views, teacher_tokenizer, stored)
        super().__init__(source, dataset, data, batch, rank, world, seed, pin_memory)
        self.samples = source

    def fingerprint(self) -> dict[str, Any]:
        """As above, and some images with their captions: all of a large set take too long to read at every start.

        A run from a feature store may go on without its images: they are left out where none can be read.
        """
        texts, pixels, has_images = hashlib.sha256(), hashlib.sha256(), False
        for image in np.unique(np.linspace(0, len(self.samples.counts) - 1, FINGERPRINTED).astype(int)).tolist():
            with contextlib.suppress(BrokenSample):
                found = self.samples.read_captions(image)
                texts.update(json.dumps([found.image_id, found.texts, found.ids]).encode("ascii"))
            with contextlib.suppress(BrokenSample):
                pixels.update(self.samples.read_image(image))
                has_images = True
        found_images = {"images of a sample (checksum)": pixels.hexdigest()[:16]} if has_images else {}
        return {**super().fingerprint(), "captions of a sample (checksum)": texts.hexdigest()[:16], **found_images}


class _Plan:
    """The sampler: holds the batches of the present epoch for the DataLoader, whose workers outlive an epoch.

    It does not hold the TrainLoader. In a reference cycle the garbage collector would shut the workers down, in an
    order that leaves them waiting for seconds.
    """

    def __init__(self) -> None:
        self.batches: list[Rows] = []

    def __iter__(self) -> Iterator[Rows]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)
