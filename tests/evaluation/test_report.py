"""The table: every figure in its place, and chance levels against random scores."""

import pytest
import torch

from convclip.engine.task import Retrieval
from convclip.evaluation.report import chance, format_table
from convclip.evaluation.retrieval import rowwise_recall, standard_recall


def recall(first):
    """Figures that tell their places apart."""
    keys = [f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)]
    return {key: first + number for number, key in enumerate(keys)} | {
        "i2t_median_rank": first + 6.0,
        "i2t_mean_rank": first + 7.5,
        "t2i_median_rank": first + 8.0,
        "t2i_mean_rank": first + 9.5,
    }


def test_every_figure_stands_in_its_column():
    table = format_table(
        {"standard": recall(10.0), "rowwise": recall(40.0), "val_loss": 2.5, "images": 1000, "texts": 5000}
    )
    first, header, standard, by_chance, rowwise, *_ = table.splitlines()
    assert first == "1000 images, 5000 captions, validation loss 2.5000"
    names = ["I2T R@1", "I2T R@5", "I2T R@10", "T2I R@1", "T2I R@5", "T2I R@10", "I2T med/mean", "T2I med/mean"]
    ends = [header.index(name) + len(name) for name in names]
    for line, offset in ((standard, 10), (rowwise, 40)):
        expected = [f"{offset + number}.00" for number in range(6)]
        expected += [f"{offset + 6} / {offset + 7}.5", f"{offset + 8} / {offset + 9}.5"]
        assert [line[:end].endswith(text) for end, text in zip(ends, expected, strict=True)] == [True] * 8
    assert by_chance.startswith("standard by chance") and "0.10" in by_chance
    assert max(map(len, table.splitlines())) <= 120


def test_chance_is_what_random_scores_have():
    images, captions, draws = 40, 5, 150
    image_of_text = torch.arange(images).repeat_interleave(captions)
    torch.manual_seed(0)
    sums = {"standard": {}, "rowwise": {}}
    for _ in range(draws):
        # As many dimensions as images: independent scores.
        image, text = torch.eye(images), torch.randn(images * captions, images)
        for protocol, found in (
            ("standard", standard_recall(image, text, image_of_text)),
            ("rowwise", rowwise_recall(image, text, image_of_text=image_of_text)),
        ):
            for key, value in found.items():
                sums[protocol][key] = sums[protocol].get(key, 0) + value / draws
    for protocol, means in sums.items():
        for key, value in chance(protocol, images, images * captions).items():
            assert means[key] == pytest.approx(value, rel=0.12, abs=0.1), (protocol, key)


def test_fewer_items_than_k():
    assert chance("standard", 3, 3)["t2i_r5"] == chance("rowwise", 3, 3)["i2t_r10"] == 100
    assert chance("standard", 2, 10)["i2t_r10"] == 100


def test_what_rowwise_means_is_said_once_for_a_run():
    figures = {"standard": recall(10.0), "rowwise": recall(40.0), "val_loss": 2.5, "images": 1000, "texts": 5000}
    retrieval = Retrieval.__new__(Retrieval)
    retrieval._explained = False
    first, second = retrieval.table(figures), retrieval.table(figures)
    assert "rowwise counts an image once per caption" in first and first.startswith(second)
    assert "counts an image" not in second and "rowwise by chance" in second
