"""The order of an epoch: which image with which caption is row number i. Pure arithmetic on numpy arrays.

Every rank and every worker can compute the whole order, so nothing has to be agreed upon at run time: micro batch i of
rank r is a slice of the rows (`micro_batch`). Shapes: N images, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Later passes move an image by at most this share of the images, so that its rows stay far apart.
PARTS = 10
# Names of the random streams drawn from (seed, epoch); the numbers only have to differ.
ORDER, CAPTIONS = 0, 1


@dataclass(frozen=True)
class EpochOrder:
    """Row i of the epoch shows image `image[i]` with its caption number `caption[i]` (int64 [R] each)."""

    image: np.ndarray
    caption: np.ndarray

    def __len__(self) -> int:
        return len(self.image)


def rows_per_epoch(counts: np.ndarray, captions: str) -> int:
    """Rows of one epoch over images with `counts` captions (int [N]) in mode `captions` (all | one)."""
    return int(counts.sum()) if captions == "all" else len(counts)


def epoch_order(
    counts: np.ndarray, shard: np.ndarray, captions: str, shuffle_shards: int, seed: int, epoch: int
) -> EpochOrder:
    """The rows of `epoch`, from (seed, epoch) alone.

    Args:
        counts: int [N], captions of each image (>= 1).
        shard: int [N], ascending, the shard each image lies in.
        captions: `all`: every caption of every image; `one`: one caption per image, drawn anew each epoch.
        shuffle_shards: images are shuffled within this many shards of a shuffled list at a time.

    With `all`, an image with c captions is visited at times (k + u) / c of the epoch, k = 0..c-1, where u in 0..1 is
    its place in the image order; u is drawn again within its tenth of the order each time. Where all images have c
    captions this is c passes, pass k over every image's k-th caption, and two rows of an image are at least about
    0.9 N rows apart. Images with more captions than others are visited more often instead of in short passes of
    their own at the end, where their rows would fall into one batch.
    """
    images_N = _image_order(shard, shuffle_shards, seed, epoch)
    if captions == "one":
        generator = np.random.default_rng((seed, epoch, CAPTIONS))
        return EpochOrder(images_N, generator.integers(0, counts[images_N]))
    windows = -(-(int(shard[-1]) + 1) // shuffle_shards)
    # With many windows the parts shrink to a window, so that a later pass reads no more shards at once than the first.
    parts = max(PARTS, windows)
    place_N = np.empty(len(images_N))
    place_N[images_N] = (np.arange(len(images_N)) + 0.5) / len(images_N)
    image_R = np.repeat(np.arange(len(counts)), counts)
    caption_R = np.arange(len(image_R)) - np.repeat(np.cumsum(counts) - counts, counts)
    generator = np.random.default_rng((seed, epoch, CAPTIONS))
    moved_R = (np.floor(place_N[image_R] * parts) + generator.random(len(image_R))) / parts
    place_R = np.where(caption_R == 0, place_N[image_R], moved_R)
    rows = np.argsort((caption_R + place_R) / counts[image_R], kind="stable")
    return EpochOrder(image_R[rows], caption_R[rows])


def micro_batch(rows: int, index: int, micro: int, rank: int, world: int) -> slice:
    """Rows of micro batch `index` (counted over the epoch) of `rank`; IndexError past the last whole one."""
    start = (index * world + rank) * micro
    if (index + 1) * world * micro > rows:
        raise IndexError(f"micro batch {index} of {micro} x {world} does not fit into {rows} rows")
    return slice(start, start + micro)


def _image_order(shard: np.ndarray, shuffle_shards: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [N]: shards in random order, images shuffled within windows of `shuffle_shards` of them."""
    generator = np.random.default_rng((seed, epoch, ORDER))
    starts = np.searchsorted(shard, np.arange(int(shard[-1]) + 2))
    shards = generator.permutation(len(starts) - 1)
    windows = []
    for first in range(0, len(shards), shuffle_shards):
        window = [np.arange(starts[s], starts[s + 1]) for s in shards[first : first + shuffle_shards]]
        windows.append(generator.permutation(np.concatenate(window)))
    return np.concatenate(windows)
