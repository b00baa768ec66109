"""The lines of a run's start."""

from types import SimpleNamespace

import pytest
from torch import nn

from convclip.config import load_recipe
from convclip.engine.reports import start_report


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("batch.accumulation=4", "micro batch 16 x accumulation 4 x world 2 = global batch 128; 9 steps"),
        ("batch.micro=16", "4 chunks of 16 rows x world 2 = global batch 128, with one loss; 9 steps"),
    ],
)
def test_a_chunked_run_speaks_of_chunks_and_another_of_accumulation(override, words):
    staged = SimpleNamespace(engine=SimpleNamespace(module=nn.Linear(2, 2)), trainable={"weight"}, world=2)
    lines = start_report(staged, load_recipe("demo", [override]), 9, 27)
    assert words in lines[-1] and ("accumulation" in lines[-1]) == ("accumulation" in override)
