"""The order of an epoch, as properties of the rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convclip.data.order import epoch_order, micro_batch, rows_per_epoch

images = st.lists(st.tuples(st.integers(1, 8), st.integers(0, 5)), min_size=1, max_size=60)


def _arrays(drawn):
    counts = np.array([count for count, _ in drawn])
    shard = np.sort(np.array([shard for _, shard in drawn]))
    return counts, shard


def _closest(order):
    """Rows between the two nearest rows of one image."""
    by_image = np.lexsort((np.arange(len(order)), order.image))
    same = np.diff(order.image[by_image]) == 0
    return np.diff(by_image)[same].min()


@settings(max_examples=60, deadline=None)
@given(images, st.integers(1, 7), st.integers(0, 3))
def test_every_caption_once_or_every_image_once(drawn, shuffle_shards, epoch):
    counts, shard = _arrays(drawn)
    every = epoch_order(counts, shard, "all", shuffle_shards, seed=1, epoch=epoch)
    expected = {(image, k) for image, count in enumerate(counts) for k in range(count)}
    assert len(every) == len(expected) == rows_per_epoch(counts, "all")
    assert set(zip(every.image.tolist(), every.caption.tolist(), strict=True)) == expected

    one = epoch_order(counts, shard, "one", shuffle_shards, seed=1, epoch=epoch)
    assert sorted(one.image) == list(range(len(counts))) and len(one) == rows_per_epoch(counts, "one")
    assert (one.caption < counts[one.image]).all() and (one.caption >= 0).all()


def test_five_captions_are_five_passes_far_apart():
    n = 1000
    order = epoch_order(np.full(n, 5), np.arange(n) // 100, "all", 64, seed=3, epoch=0)
    for number in range(5):
        rows = slice(number * n, (number + 1) * n)
        assert (order.caption[rows] == number).all()
        assert np.array_equal(np.sort(order.image[rows]), np.arange(n))
    assert _closest(order) >= 0.9 * n
    assert not np.array_equal(order.image[:n], order.image[n : 2 * n])


def test_images_with_more_captions_do_not_meet_themselves_in_a_batch():
    """COCO's shape: nearly all images have five captions, a few six or seven (passes of their own would be tiny)."""
    counts = np.full(20_000, 5)
    counts[:50], counts[50:54] = 6, 7
    order = epoch_order(counts, np.arange(20_000) // 1000, "all", 64, seed=0, epoch=0)
    assert _closest(order) >= 0.85 * counts.sum() / 7


def test_shards_of_a_window_are_read_together():
    shard = np.arange(400) // 10
    order = epoch_order(np.full(400, 2), shard, "one", 4, seed=0, epoch=0)
    windows = shard[order.image].reshape(10, 40)
    assert all(len(np.unique(window)) == 4 for window in windows)
    assert len({tuple(np.unique(window)) for window in windows}) == 10
    assert not np.array_equal(windows[0], np.sort(windows[0]))


def test_follows_seed_and_epoch_alone():
    arguments = (np.full(50, 3), np.arange(50) // 7, "all", 3)
    first = epoch_order(*arguments, seed=5, epoch=2)
    again = epoch_order(*arguments, seed=5, epoch=2)
    assert np.array_equal(first.image, again.image) and np.array_equal(first.caption, again.caption)
    for seed, epoch in ((5, 3), (6, 2)):
        assert not np.array_equal(first.image, epoch_order(*arguments, seed=seed, epoch=epoch).image)


@pytest.mark.parametrize("rows", [24, 31])
def test_worlds_cut_the_same_rows_into_the_same_global_batches(rows):
    every = np.arange(rows)
    for index in range(rows // 12):
        two = [every[micro_batch(rows, index, 6, rank, 2)] for rank in range(2)]
        four = [every[micro_batch(rows, index, 3, rank, 4)] for rank in range(4)]
        whole = every[micro_batch(rows, index, 12, 0, 1)]
        assert np.array_equal(np.concatenate(two), whole) and np.array_equal(np.concatenate(four), whole)
        assert whole[0] == 12 * index
    with pytest.raises(IndexError):
        micro_batch(rows, rows // 12, 6, 0, 2)
