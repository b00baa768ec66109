"""The learning rate of every group at every step, against its formula."""

import math

import pytest

from convclip.config import load_recipe
from convclip.engine.stages.schedule import LearningRates

OPENED_AT, NEW_WARMUP, WARMUP, TOTAL = 30, 5, 10, 100


@pytest.mark.parametrize(("how", "factor"), [("none", 1), ("linear", 4), ("sqrt", 2)])
def test_groups_follow_the_schedule_from_the_batchs_peak(how, factor):
    overrides = ["batch.global=1536", f"optim.scale_lr_with_batch={how}", "optim.lr=1e-3"]
    warmups = [f"optim.warmup_steps={WARMUP}", f"freezing.new_warmup_steps={NEW_WARMUP}"]
    recipe = load_recipe("tiny_gpt2_unfreeze", [*overrides, *warmups])
    rates = LearningRates(recipe, TOTAL, {"text.event0.decay": OPENED_AT})
    old, new = {"name": "image.decay", "lr_scale": 1.0}, {"name": "text.event0.decay", "lr_scale": 0.1}
    for step in range(TOTAL):
        rates.set(step, [old, new])
        past = max(0, step - WARMUP) / (TOTAL - WARMUP)
        expected = 1e-3 * factor * min((step + 1) / WARMUP, (1 + math.cos(math.pi * past)) / 2)
        assert old["lr"] == pytest.approx(expected)
        if step >= OPENED_AT:
            assert new["lr"] == pytest.approx(0.1 * expected * min(1, (step - OPENED_AT + 1) / NEW_WARMUP))
    words = {
        "none": "peak lr 0.001,",
        "linear": "0.001 x (global batch 1536 / 384)",
        "sqrt": "the square root of (global",
    }
    assert words[how] in rates.describe() and f"{WARMUP} warm-up steps" in rates.describe()
