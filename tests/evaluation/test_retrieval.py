"""Retrieval figures against loops that follow the definitions, ties included, and against open_clip_train's code."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.loss import ClipLoss, SigLipLoss

from convclip.evaluation import retrieval
from convclip.evaluation.retrieval import rowwise_recall, standard_recall, validation_loss


def figures(image_ranks, text_ranks, ks=(1, 5, 10)):
    """Recalls and ranks of lists of places, the best being 0."""
    result = {}
    for way, ranks in (("i2t", image_ranks), ("t2i", text_ranks)):
        result |= {f"{way}_r{k}": 100 * sum(rank < k for rank in ranks) / len(ranks) for k in ks}
        result[f"{way}_median_rank"] = np.median(ranks) + 1
        result[f"{way}_mean_rank"] = sum(ranks) / len(ranks) + 1
    return result


def standard_by_hand(image, text, image_of_text):
    scores = (image @ text.T).tolist()
    image_ranks = []
    for i, row in enumerate(scores):
        own = [row[t] for t in range(len(text)) if image_of_text[t] == i]
        if own:
            image_ranks.append(sum(score > max(own) for score in row))
    text_ranks = []
    for t, i in enumerate(image_of_text):
        text_ranks.append(sum(scores[other][t] > scores[i][t] for other in range(len(image))))
    return figures(image_ranks, text_ranks)


def rowwise_by_hand(image, text):
    def place(scores, right):
        """Where the right one stands when a stable sort puts the greatest first."""
        return sorted(range(len(scores)), key=lambda j: -scores[j]).index(right)

    scores = image @ text.T
    rows = range(len(scores))
    return figures([place(scores[r].tolist(), r) for r in rows], [place(scores[:, r].tolist(), r) for r in rows])


def draw(images, captions_per_image, width, levels, seed):
    """(image, text, image_of_text shuffled): whole numbers of few levels, so that scores tie often and exactly."""
    generator = torch.Generator().manual_seed(seed)
    image_of_text = torch.arange(images).repeat_interleave(torch.tensor(captions_per_image))
    image_of_text = image_of_text[torch.randperm(len(image_of_text), generator=generator)]
    sizes = ((images, width), (len(image_of_text), width))
    image, text = (torch.randint(-levels, levels + 1, size, generator=generator).float() for size in sizes)
    return image, text, image_of_text


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=9).filter(any), st.integers(1, 4), st.integers(0, 3), st.data())
def test_protocols_follow_their_definitions(captions, width, levels, data):
    image, text, image_of_text = draw(len(captions), captions, width, levels, data.draw(st.integers(0, 1000)))
    retrieval.BLOCK_SCORES, before = data.draw(st.sampled_from([1, 7, 50, 2**22])), retrieval.BLOCK_SCORES
    try:
        standard = standard_recall(image, text, image_of_text)
        rowwise = rowwise_recall(image, text, image_of_text=image_of_text)
        assert rowwise == rowwise_recall(image[image_of_text], text)
    finally:
        retrieval.BLOCK_SCORES = before
    assert standard == pytest.approx(standard_by_hand(image, text, image_of_text.tolist()))
    assert rowwise == pytest.approx(rowwise_by_hand(image[image_of_text], text))


@pytest.mark.parametrize("rows", [60, 61])
def test_rowwise_is_open_clip_trains(rows):
    """Their code sorts by itself: without ties it must agree. Of two middle ranks' mean they drop the half."""
    get_clip_metrics = pytest.importorskip("open_clip_train.train").get_clip_metrics
    torch.manual_seed(0)
    image = F.normalize(torch.randn(rows, 16), dim=1)
    text = F.normalize(image + 0.8 * torch.randn(rows, 16) / 4, dim=1)
    theirs = get_clip_metrics(image, text, torch.tensor(100.0))
    ours = rowwise_recall(image, text)
    for way, name in (("i2t", "image_to_text"), ("t2i", "text_to_image")):
        for k in (1, 5, 10):
            assert ours[f"{way}_r{k}"] == pytest.approx(100 * theirs[f"{name}_R@{k}"])
        assert math.floor(ours[f"{way}_median_rank"]) == theirs[f"{name}_median_rank"]
        assert ours[f"{way}_mean_rank"] == pytest.approx(theirs[f"{name}_mean_rank"])


def test_how_the_protocols_relate_with_five_captions():
    """What experiments.md derives: the seed's row-wise figures read as standard ones."""
    torch.manual_seed(0)
    image = F.normalize(torch.randn(80, 24), dim=1)
    image_of_text = torch.arange(80).repeat_interleave(5)[torch.randperm(400)]
    text = F.normalize(image[image_of_text] + 1.2 * torch.randn(400, 24) / 5, dim=1)
    standard = standard_recall(image, text, image_of_text, ks=(1, 2))
    rowwise = rowwise_recall(image[image_of_text], text)
    assert 30 < standard["t2i_r1"] < 95
    assert rowwise["i2t_r1"] == pytest.approx(standard["i2t_r1"] / 5)
    assert rowwise["t2i_r5"] == pytest.approx(standard["t2i_r1"])
    assert rowwise["t2i_r10"] == pytest.approx(standard["t2i_r2"])
    # A text finds one of its image's five rows first: its own in a fifth of the cases.
    assert rowwise["t2i_r1"] == pytest.approx(standard["t2i_r1"] / 5, rel=0.2)


def test_a_collapsed_model():
    """All embeddings alike: every score ties exactly, whatever a matrix product rounds."""
    image, text = torch.rand(1, 640).expand(37, 640), torch.rand(1, 640).expand(185, 640)
    image_of_text = torch.arange(37).repeat_interleave(5)
    assert standard_recall(image, text, image_of_text)["t2i_r1"] == 100
    rowwise = rowwise_recall(image, text, image_of_text=image_of_text)
    assert rowwise["i2t_r1"] == rowwise["t2i_r1"] == pytest.approx(100 / 185)
    assert rowwise["i2t_mean_rank"] == rowwise["t2i_mean_rank"] == (1 + 185) / 2


def test_a_diverged_model_finds_nothing():
    image, text = torch.randn(4, 8), torch.full((12, 8), torch.nan)
    image_of_text = torch.arange(12) % 4
    standard = standard_recall(image, text, image_of_text, ks=(1,))
    for result in (standard, rowwise_recall(image, text, (1,), image_of_text)):
        assert result["i2t_r1"] == result["t2i_r1"] == 0
        # Last, not behind the last.
        assert result["t2i_mean_rank"] == (4 if result is standard else 12) and result["i2t_mean_rank"] == 12


def test_no_full_score_matrix(monkeypatch):
    """The largest block that is compared holds at most BLOCK_SCORES scores (or one row)."""
    seen = []
    gather = torch.Tensor.gather
    monkeypatch.setattr(torch.Tensor, "gather", lambda x, *rest: seen.append(x.numel()) or gather(x, *rest))
    monkeypatch.setattr(retrieval, "BLOCK_SCORES", 300)
    image, text, image_of_text = draw(40, [3] * 40, 5, 2, 0)
    standard_recall(image, text, image_of_text)
    assert len(seen) > 10 and max(seen) <= 300


def test_half_precision_features():
    image, text, image_of_text = draw(9, [2] * 9, 3, 3, 0)
    expected = standard_recall(image, text, image_of_text)
    assert standard_recall(image.half(), text.half(), image_of_text) == expected


@pytest.mark.parametrize("batch", [1, 4, 7, 100])
def test_validation_loss_is_open_clips(batch):
    """open_clip_train sums loss * rows over batches and divides by all rows."""
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(23, 8), dim=1) for _ in range(2))
    total = sum(
        ClipLoss()(image[i : i + batch], text[i : i + batch], 20.0) * len(image[i : i + batch])
        for i in range(0, 23, batch)
    )
    assert validation_loss(image, text, batch, torch.tensor([20.0])) == pytest.approx(total.item() / 23, rel=1e-6)


@pytest.mark.parametrize("batch", [1, 4, 100])
def test_validation_loss_with_a_bias_is_siglips(batch):
    torch.manual_seed(0)
    image, text = (F.normalize(torch.randn(23, 8), dim=1) for _ in range(2))
    total = sum(
        SigLipLoss()(image[i : i + batch], text[i : i + batch], 20.0, -10.0) * len(image[i : i + batch])
        for i in range(0, 23, batch)
    )
    found = validation_loss(image, text, batch, torch.tensor(20.0), torch.tensor(-10.0))
    assert found == pytest.approx(total.item() / 23, rel=1e-6)


def test_errors_say_what_is_wrong():
    image, text = torch.randn(3, 4), torch.randn(6, 4)
    with pytest.raises(ValueError, match=r"names an image outside 0..2"):
        standard_recall(image, text, torch.tensor([0, 1, 2, 3, 0, 0]))
    with pytest.raises(ValueError, match="6 texts need as many entries in image_of_text, not 5"):
        standard_recall(image, text, torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match="with one D"):
        standard_recall(image[:, :3], text, torch.zeros(6, dtype=torch.long))
    with pytest.raises(ValueError, match="3 image rows for 6 text rows: give image_of_text"):
        rowwise_recall(image, text)
    with pytest.raises(ValueError, match="alike and batch positive"):
        validation_loss(image, text, 2, 1.0)
