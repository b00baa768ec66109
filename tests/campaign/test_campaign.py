"""A tenth of the campaign: 150 cases of fixed seed over every kind that has no known failure left."""

from __future__ import annotations

import pytest

from tests.campaign.judge import FAILED, RIGHT, Kind, Wrong, judge, share_out
from tests.campaign.kinds import KINDS, UNMENDED, WEIGHTS
from tests.conftest import REPOSITORY

CASES, SEED = 150, 0
# A busy machine is slow, not wrong.
LIMIT = 60
COUNTS = share_out(CASES, {name: weight for name, weight in WEIGHTS.items() if name not in UNMENDED})


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """The fixture's recipe names its tokenizer from there."""
    monkeypatch.chdir(REPOSITORY)


@pytest.mark.parametrize("name", COUNTS)
def test_every_case_is_refused_counted_or_right(name):
    if name == "frame_stores":
        pytest.importorskip("av")
    verdicts = {number: judge(name, KINDS[name], SEED, number, LIMIT) for number in range(COUNTS[name])}
    assert not {number: verdict.detail for number, verdict in verdicts.items() if verdict.outcome == FAILED}


def test_the_tenth_is_a_tenth():
    assert CASES <= sum(COUNTS.values()) < CASES + len(COUNTS)
    assert sum(share_out(1500, WEIGHTS).values()) >= 1500 and set(WEIGHTS) == set(KINDS) >= set(UNMENDED)


def _raises(error: BaseException) -> Kind:
    def kind(folder, rng):
        raise error

    return kind


def _waits(folder, rng):
    while True:
        pass


@pytest.mark.parametrize(
    ("kind", "detail"),
    [
        (_raises(KeyError("x")), "KeyError"),
        (_raises(SystemExit(2)), "SystemExit"),
        (_raises(Wrong("other rows")), "silently wrong: other rows"),
        (_waits, "not done in 1 seconds"),
    ],
)
def test_anything_else_fails(kind, detail):
    verdict = judge("x", kind, 0, 0, 1)
    assert verdict.outcome == FAILED and detail in verdict.detail


def test_a_case_is_the_same_every_time():
    drawn = []

    def kind(folder, rng):
        drawn.append(rng.random())
        return RIGHT

    for seed, number in ((0, 0), (0, 1), (0, 0), (1, 0)):
        judge("x", kind, seed, number, 5)
    assert drawn[0] == drawn[2] and len(set(drawn)) == 3
