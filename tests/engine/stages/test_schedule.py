"""The learning rate of every group at every step, against its formula."""

import math

import pytest

from convclip.config import load_recipe
from convclip.engine.stages.schedule import LearningRates, about_ema, fitted_warmup

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


def test_a_warm_up_that_fits_stays_and_one_that_does_not_takes_a_tenth():
    for steps in range(1, 40):
        for asked in range(60):
            expected = asked if asked < steps else min(asked, max(1, steps // 10))
            assert fitted_warmup(asked, steps) == expected
            assert asked == 0 or 1 <= fitted_warmup(asked, steps) <= steps


@pytest.mark.parametrize("total", [1, 2, 9, 50, 2399, 2400])
def test_every_short_run_of_a_seed_recipe_reaches_its_peak(total):
    recipe = load_recipe("tiny_gpt2_unfreeze")
    rates = LearningRates(recipe, total, {})
    lr = [rates.at(step, "image.decay", 1.0) for step in range(total)]
    peak = max(1, total // 10)
    assert max(lr) == lr[peak - 1] == pytest.approx(7e-4)
    assert lr[:peak] == pytest.approx([7e-4 * (step + 1) / peak for step in range(peak)])
    words = f"the warm-up of 2400 steps would not end within the run's {total}: it takes {peak}, a tenth"
    assert f"peak lr 0.0007, {peak} warm-up steps; {words}" in rates.describe()


def test_a_run_that_is_longer_than_its_warm_up_is_left_alone():
    rates = LearningRates(load_recipe("tiny_gpt2_unfreeze"), 2401, {})
    assert rates.warmup == 2400 and rates.describe() == "peak lr 0.0007, 2400 warm-up steps"


def test_the_warm_up_of_an_event_ends_too():
    recipe = load_recipe("demo", ["freezing.new_warmup_steps=200", "optim.warmup_share=0"])
    rates = LearningRates(recipe, 130, {"text.event0.decay": 90})
    factors = [rates.at(step, "text.event0.decay", 1.0) / rates.at(step, "image.decay", 1.0) for step in range(90, 130)]
    assert factors == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 37)
    assert "200 steps of what opens at step 90 would not end within the 40 steps left: it takes 4" in rates.describe()


def test_a_moving_average_says_how_far_back_it_reaches():
    recipe = load_recipe("demo", ["optim.ema_decay=0.99"])
    # 0.99^69 is the first power of it that is not above a half.
    assert 0.99**68 > 0.5 >= 0.99**69
    assert about_ema(recipe, 1000) == [
        "moving average of what trains (optim.ema_decay 0.99): half of it is of the last 69 updates"
    ]
    (line,) = about_ema(recipe, 100)
    assert line.endswith("; after 100 steps 37% of it is still the weights it began with: lower the decay")
    assert about_ema(load_recipe("demo"), 100) == []
