"""Video retrieval metrics against plain loops; ties, NaNs, several captions per video, blocks."""

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convclip.video.video_retrieval import recalls, video_retrieval


def loop_recalls(scores, video_of_text, ks, competitors="captions"):
    """Ranks counted entry by entry."""
    texts, videos = len(scores), len(scores[0])
    t2v, v2t = [], []
    for t in range(texts):
        own = scores[t][video_of_text[t]]
        t2v.append(1 + sum(scores[t][v] > own for v in range(videos)))
    for v in range(videos):
        best = [max(scores[t][v] for t in range(texts) if video_of_text[t] == w) for w in range(videos)]
        rivals = [scores[t][v] for t in range(texts)] if competitors == "captions" else best
        v2t.append(1 + sum(rival > best[v] for rival in rivals))
    result = {}
    for name, ranks in (("t2v", t2v), ("v2t", v2t)):
        result |= {f"{name}_r{k}": 100 * sum(rank <= k for rank in ranks) / len(ranks) for k in ks}
        result |= {f"{name}_median_rank": statistics.median(ranks), f"{name}_mean_rank": statistics.mean(ranks)}
    return result


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    videos=st.integers(1, 9),
    more=st.integers(0, 8),
    block=st.integers(1, 6),
    levels=st.integers(1, 40),
    competitors=st.sampled_from(["captions", "videos"]),
)
def test_metrics_equal_plain_loops_with_ties(seed, videos, more, block, levels, competitors):
    generator = torch.Generator().manual_seed(seed)
    video_of_text = torch.cat([torch.arange(videos), torch.randint(0, videos, (more,), generator=generator)])
    video_of_text = video_of_text[torch.randperm(len(video_of_text), generator=generator)]
    # Few levels of score: many ties.
    scores = torch.randint(0, levels, (len(video_of_text), videos), generator=generator).float()
    result = recalls(lambda t, v: scores[t, v], video_of_text, videos, (1, 2, 5), block, competitors)
    expected = loop_recalls(scores.tolist(), video_of_text.tolist(), (1, 2, 5), competitors)
    assert result == pytest.approx(expected)


def test_embeddings_are_scored_by_their_product():
    torch.manual_seed(0)
    text, video = torch.randn(40, 8), torch.nn.functional.normalize(torch.randn(20, 8), dim=-1)
    video_of_text = torch.arange(40) // 2
    result = video_retrieval(text, video, video_of_text, block=7)
    assert result == pytest.approx(loop_recalls((text @ video.T).tolist(), video_of_text.tolist(), (1, 5, 10)))
    assert video_retrieval(video, video, torch.arange(20))["t2v_r1"] == 100


def test_equal_scores_do_not_push_one_another_down_and_nan_never_wins():
    def same(t, v):
        return torch.ones(6, 6)[t, v]

    def broken(t, v):
        return torch.full((6, 6), float("nan"))[t, v]

    places = torch.arange(6)
    assert recalls(same, places, 6)["t2v_mean_rank"] == recalls(same, places, 6)["v2t_mean_rank"] == 1
    for name in ("t2v", "v2t"):
        assert recalls(broken, places, 6)[f"{name}_r1"] == 0 and recalls(broken, places, 6)[f"{name}_mean_rank"] == 6
    scores = torch.eye(4)
    scores[0, 2] = float("nan")
    result = recalls(lambda t, v: scores[t, v], torch.arange(4), 4, ks=(1,))
    assert result["t2v_r1"] == result["v2t_r1"] == 75


def test_a_video_without_caption_is_refused():
    with pytest.raises(ValueError, match="3 videos but captions of 2"):
        recalls(lambda t, v: torch.zeros(2, 3)[t, v], torch.tensor([0, 2]), 3)
