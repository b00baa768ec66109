"""`--plan` against the parameter counts of the experiments, typed here from the design, not from the code."""

from __future__ import annotations

import json

import pytest

from convclip.config import UserError, list_recipes, load_recipe
from convclip.engine.plan.plan import format_plan
from convclip.run import plan_recipe
from tests.processes import run_script

GPT2_SIX_LAYERS = 42_527_232 + 1_536 + 819_200
BASE_TEXT = 91_163_520

# recipe: (epoch, visual, text) of each stage
EXPECTED = {
    "tiny_gpt2_nofreeze": [(0, 30_070_400, 125_259_008)],
    "tiny_gpt2_unfreeze": [
        (0, 2_203_904, 819_200),
        (3, 2_203_904, GPT2_SIX_LAYERS),
        (5, 17_692_160, GPT2_SIX_LAYERS),
    ],
    "tiny_cliptext_unfreeze": [(0, 2_203_904, 63_428_096), (5, 17_692_160, 63_428_096)],
    "base_absattn_3stage": [(0, 4_265_600, 0), (3, 4_265_600 + 8_450_048, 0), (8, 4_265_600 + 8_450_048, BASE_TEXT)],
    "base_absattn_distill_frozen": [(0, 3_856_000, 0)],
    "base_absattn_distill_unfreeze": [(0, 3_856_000, 0), (8, 12_306_048, 0), (18, 12_306_048, BASE_TEXT)],
    "base_absattn_headalign": [(0, 3_856_000, 0), (6, 3_858_048, 0)],
}


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_has_a_plan_whose_counts_add_up(name):
    recipe = load_recipe(name)
    plan = plan_recipe(recipe)
    if name in EXPECTED:
        found = [(s["epoch"], s["trainable"]["visual"], s["trainable"]["text"]) for s in plan["stages"]]
        assert found == EXPECTED[name]
    for stage in plan["stages"]:
        counts = stage["trainable"]
        if recipe.video is None:
            assert counts["total"] == counts["visual"] + counts["text"] + 1
        assert sum(group["parameters"] for group in stage["groups"]) == counts["total"]


def test_groups_of_a_stage_begin_with_those_of_the_stage_before():
    first, second, third = plan_recipe(load_recipe("tiny_gpt2_unfreeze"))["stages"]
    assert second["groups"][: len(first["groups"])] == first["groups"]
    assert third["groups"][: len(second["groups"])] == second["groups"]
    assert {group["lr_scale"] for group in third["groups"][len(first["groups"]) :]} == {0.1}


def test_batch_norms_of_a_map_of_one_by_one_are_no_hindrance():
    overrides = ["model.image.backbone=mobilenetv4_conv_small", "model.image.image_size=32", "batch.micro=32"]
    events = ["freezing.unfreeze=[{tower: image, groups: 2, epoch: 1}]", "freezing.lock=[image]"]
    plan = plan_recipe(load_recipe("tiny_cliptext_unfreeze", [*overrides, *events]))
    assert len(plan["stages"]) == 2 and "image_map: 128x1x1 bfloat16 entering layer group 17" in plan["storable"][0], (
        plan["storable"]
    )


def test_event_beyond_the_end_is_said():
    (note,) = plan_recipe(load_recipe("base_absattn_headalign"))["notes"]
    assert "text all at epoch 10 is never reached" in note


def test_lr_curve_warms_up_then_falls_and_new_groups_start_at_their_event():
    plan = plan_recipe(load_recipe("tiny_gpt2_unfreeze"))
    curve, steps = plan["lr_curve"], plan["lr_curve"]["step"]
    old, new = curve["lr"]["image.decay"], curve["lr"]["image.event1.decay"]
    assert max(old) == pytest.approx(7e-4, rel=1e-3)
    assert old[-1] < 1e-9
    for step, old_lr, new_lr in zip(steps, old, new, strict=True):
        assert (new_lr is None) == (step < 5 * (591_753 // 384))
        assert new_lr is None or new_lr == pytest.approx(0.1 * old_lr)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("freezing.unfreeze.1.groups=99", "99"),
        ("freezing.unfreeze.0.layers=14", "14"),
        ("freezing.unfreeze.1.epoch=null", "exactly one of epoch and step"),
        ("freezing.lock=[text]", "lock does not name"),
    ],
)
def test_mistakes_in_the_schedule_are_caught(override, message):
    with pytest.raises(UserError, match=message):
        plan_recipe(load_recipe("tiny_gpt2_unfreeze", [override]))


def test_event_that_opens_nothing_is_caught():
    overrides = ["freezing.unfreeze.1.tower=text", "freezing.unfreeze.1.groups=null", "freezing.unfreeze.1.layers=6"]
    with pytest.raises(UserError, match="opens nothing"):
        plan_recipe(load_recipe("tiny_gpt2_unfreeze", overrides))


def test_event_at_the_very_start_belongs_to_stage_0():
    plan = plan_recipe(load_recipe("tiny_cliptext_unfreeze", ["freezing.unfreeze.0.epoch=0"]))
    (stage,) = plan["stages"]
    assert stage["trainable"]["visual"] == 17_692_160
    scales = {group["name"]: group["lr_scale"] for group in stage["groups"]}
    assert scales["image.decay"] == 1.0
    assert scales["image.event0.decay"] == 0.1


def test_two_events_in_one_epoch_are_one_stage_with_two_groups():
    plan = plan_recipe(load_recipe("tiny_gpt2_unfreeze", ["freezing.unfreeze.0.epoch=5"]))
    _, stage = plan["stages"]
    assert stage["trainable"]["visual"] == 17_692_160
    assert stage["trainable"]["text"] == GPT2_SIX_LAYERS
    assert {"text.event0.decay", "image.event1.decay"} <= {group["name"] for group in stage["groups"]}


def test_a_warm_up_longer_than_the_run_is_shortened_and_said():
    plan = plan_recipe(load_recipe("base_absattn_3stage", ["max_steps=50"]))
    assert (plan["total_steps"], plan["warmup_steps"]) == (50, 5)
    assert max(plan["lr_curve"]["lr"]["image.decay"]) == plan["peak_lr"] == 2e-5
    assert plan["lr_curve"]["lr"]["image.decay"].index(2e-5) == 4
    assert any("of 1000 steps would not end within the run's 50: it takes 5" in note for note in plan["notes"])
    assert any("image last 2 groups at epoch 3 is never reached: the run ends after 50" in n for n in plan["notes"])
    assert "50 in all; lr rises to 2e-05 over 5 steps, then follows a cosine to 0" in format_plan(plan)


def test_a_run_of_unknown_length_says_what_its_limit_does_to_the_warm_up():
    plan = plan_recipe(load_recipe("demo", ["rows_per_epoch=null", "max_steps=50", "optim.warmup_steps=60"]))
    assert plan["total_steps"] is None and "it takes 5" in " ".join(plan["notes"])


def test_a_batch_above_the_rows_is_refused_with_the_arithmetic():
    with pytest.raises(UserError, match=r"rows_per_epoch 10,000 / batch\.global 10,001 = 0 steps per epoch"):
        plan_recipe(load_recipe("demo", ["batch.global=10001"]))
    assert plan_recipe(load_recipe("demo", ["batch.global=10000"]))["steps_per_epoch"] == 1


def test_a_chunked_plan_speaks_of_chunks():
    plan = plan_recipe(load_recipe("demo", ["batch.micro=32"]))
    assert plan["batch"][0] == "micro batch 32 x 4 chunks x world 1 = global batch 128, with one loss"
    assert "accumulation" not in format_plan(plan)
    assert "accumulation 4" in format_plan(plan_recipe(load_recipe("demo", ["batch.accumulation=4"])))


def test_plan_on_the_command_line(tmp_path):
    pytest.importorskip("matplotlib")
    options = ["--recipe", "base_absattn_3stage", "--plan", "--json", "--plot", str(tmp_path / "lr.png")]
    done = run_script("launch/train.py", *options)
    assert done.returncode == 0, done.stderr
    assert [stage["epoch"] for stage in json.loads(done.stdout)["stages"]] == [0, 3, 8]
    assert (tmp_path / "lr.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "tiny_gpt2_unfrezze", "--plan"], ["tiny_gpt2_unfrezze", "did you mean", "tiny_gpt2_unfreeze"]),
        (["--recipe", "demo", "--set", "optim.learning_rate=1", "--plan"], ["optim.learning_rate"]),
        (["--recipe", "demo", "--plam"], ["--plam"]),
        (["--recipe", "demo"], ["--ds_config"]),
        ([], ["--recipe"]),
    ],
)
def test_bad_command_lines_get_one_line_and_exit_code_2(arguments, words):
    done = run_script("launch/train.py", *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert all(word in done.stderr.strip().splitlines()[-1] for word in words)
