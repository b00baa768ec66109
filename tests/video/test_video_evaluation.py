"""Recalls of videos against plain loops: ties, NaNs, several captions per video, blocks; and their table."""

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convclip.evaluation import retrieval
from convclip.video.video_evaluation import chance, format_video_table, video_recall


def loop_recalls(scores, video_of_text, ks=(1, 5, 10)):
    """Ranks counted entry by entry."""
    texts, videos = len(scores), len(scores[0])
    t2v, v2t = [], []
    for t in range(texts):
        own = scores[t][video_of_text[t]]
        t2v.append(1 + sum(scores[t][v] > own for v in range(videos)))
    for v in range(videos):
        best = max(scores[t][v] for t in range(texts) if video_of_text[t] == v)
        v2t.append(1 + sum(scores[t][v] > best for t in range(texts)))
    result = {}
    for name, ranks in (("t2v", t2v), ("v2t", v2t)):
        result |= {f"{name}_r{k}": 100 * sum(rank <= k for rank in ranks) / len(ranks) for k in ks}
        result |= {f"{name}_median_rank": statistics.median(ranks), f"{name}_mean_rank": statistics.mean(ranks)}
    return result


def recall_of(scores, video_of_text):
    """The figures of a matrix of scores [captions, videos]: against the unit vectors, a row's scores are itself."""
    return video_recall(torch.eye(scores.shape[1]), scores, video_of_text)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    videos=st.integers(1, 12),
    more=st.integers(0, 8),
    block=st.sampled_from([1, 7, 50, 2**22]),
    levels=st.integers(1, 40),
)
def test_metrics_equal_plain_loops_with_ties(seed, videos, more, block, levels):
    generator = torch.Generator().manual_seed(seed)
    video_of_text = torch.cat([torch.arange(videos), torch.randint(0, videos, (more,), generator=generator)])
    video_of_text = video_of_text[torch.randperm(len(video_of_text), generator=generator)]
    # Few levels of score: many ties.
    scores = torch.randint(0, levels, (len(video_of_text), videos), generator=generator).float()
    retrieval.BLOCK_SCORES, before = block, retrieval.BLOCK_SCORES
    try:
        result = recall_of(scores, video_of_text)
    finally:
        retrieval.BLOCK_SCORES = before
    assert result == pytest.approx(loop_recalls(scores.tolist(), video_of_text.tolist()))
    assert [key[:3] for key in result] == ["t2v"] * 5 + ["v2t"] * 5


def test_embeddings_are_scored_by_their_product():
    torch.manual_seed(0)
    text, video = torch.randn(40, 8), torch.nn.functional.normalize(torch.randn(20, 8), dim=-1)
    video_of_text = torch.arange(40) // 2
    expected = loop_recalls((text @ video.T).tolist(), video_of_text.tolist())
    assert video_recall(video, text, video_of_text) == pytest.approx(expected)
    assert video_recall(video, video, torch.arange(20))["t2v_r1"] == 100


def test_equal_scores_do_not_push_one_another_down_and_nan_never_wins():
    places = torch.arange(6)
    same = recall_of(torch.ones(6, 6), places)
    assert same["t2v_mean_rank"] == same["v2t_mean_rank"] == 1
    broken = recall_of(torch.full((6, 6), float("nan")), places)
    for name in ("t2v", "v2t"):
        assert broken[f"{name}_r1"] == 0 and broken[f"{name}_mean_rank"] == 6
    # One nan among the scores, of caption 0 and video 2: inf - inf, where products overflow.
    texts, videos = torch.eye(4, 6), torch.eye(4, 6)
    texts[0, 4:], videos[2, 4:] = torch.tensor([3e38, -3e38]), 3e38
    assert (texts @ videos.T).isnan().nonzero().tolist() == [[0, 2]]
    result = video_recall(videos, texts, torch.arange(4))
    assert result["t2v_r1"] == result["v2t_r1"] == 75


def test_a_video_without_caption_is_refused():
    with pytest.raises(ValueError, match="3 videos but captions of 2"):
        recall_of(torch.zeros(2, 3), torch.tensor([0, 2]))


def test_the_table_holds_every_figure_and_a_half_median():
    figures = recall_of(torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([0, 1]))
    assert (figures["t2v_median_rank"], figures["v2t_median_rank"]) == (1.5, 1.5)
    counts, header, row, by_chance = format_video_table({"standard": figures, "videos": 2, "texts": 2}).splitlines()
    assert counts == "2 videos, 2 captions" and by_chance.startswith("by chance") and "- / 1.5" in by_chance
    heads = ["T2V R@1", "T2V R@5", "T2V R@10", "V2T R@1", "V2T R@5", "V2T R@10", "T2V med/mean", "V2T med/mean"]
    assert " ".join(header.split()) == " ".join(heads)
    assert row.split() == ["aggregation", *["50.00", "100.00", "100.00"] * 2, *["1.5", "/", "1.5"] * 2]
    assert chance(2, 2)["t2v_r1"] == 50
