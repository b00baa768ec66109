"""Settings of a sweep, as people write them: choices, lists, ranges, what goes together, what is refused."""

import json
import math
import re

import pytest

from convclip.config import UserError, load_recipe, takes_whole_numbers
from convclip.sweep.points import make_points, split_settings


def points(*overrides, count=None, seed=0):
    return make_points(split_settings(overrides)[1], count, seed)


def settings(*overrides, **more):
    return [dict(point.settings) for point in points(*overrides, **more)]


def test_a_grid_is_every_combination_in_order():
    found = settings("optim.lr=1e-4,3e-4", "model.image.head=attention_pool,average_linear", "epochs=3")
    assert found == [
        {"optim.lr": lr, "model.image.head": head}
        for lr in (1e-4, 3e-4)
        for head in ("attention_pool", "average_linear")
    ]


def test_lists_and_texts_with_commas_are_values():
    assert settings("optim.betas=[0.9,0.98],[0.9,0.95]") == [
        {"optim.betas": [0.9, 0.98]},
        {"optim.betas": [0.9, 0.95]},
    ]
    assert settings("description='a, b',c", "optim.clip_grad_norm=null,1.0") == [
        {"description": text, "optim.clip_grad_norm": norm} for text in ("a, b", "c") for norm in (None, 1.0)
    ]
    assert settings("teacher={model: x, weight: 1},null")[0] == {"teacher": {"model": "x", "weight": 1}}


@pytest.mark.parametrize(
    "override",
    ["optim.betas=[0.9,0.98]", "epochs=3", "data.csv_separator=','", "name=a b", "teacher={model: x, weight: 1}"],
)
def test_one_value_is_for_all_and_stays_as_it_was_given(override):
    assert split_settings([override]) == ([override], [])


def test_settings_that_go_together():
    found = points("loss.kind,model.init_logit_bias=[softmax,null],[sigmoid,-10]", "optim.lr=1e-4,1e-3")
    assert [dict(point.settings) for point in found][::2] == [
        {"loss.kind": "softmax", "model.init_logit_bias": None, "optim.lr": 1e-4},
        {"loss.kind": "sigmoid", "model.init_logit_bias": -10, "optim.lr": 1e-4},
    ]
    # As overrides they are what a recipe takes.
    assert load_recipe("demo", found[2].overrides).loss.kind == "sigmoid"


def test_names_are_folders_of_their_own_whatever_the_order():
    texts = ["a/b", "a b", "../x", ".", "a" * 200]
    found = points("optim.lr=1e-4,1e-3", f"description={','.join(map(json.dumps, texts))}")
    names = [point.name for point in found]
    assert len(set(names)) == 10 and all(re.fullmatch(r"[A-Za-z0-9][\w.+-]{8,70}", name) for name in names)
    turned = points(f"description={','.join(map(json.dumps, texts))}", "optim.lr=1e-4,1e-3")
    assert {name.rpartition("_")[2] for name in names} == {point.name.rpartition("_")[2] for point in turned}


def test_random_points_are_the_seeds_and_the_first_of_more():
    given = ("optim.lr=log:1e-5..1e-2", "optim.weight_decay=0..0.3", "loss.mask_same_image=true,false")
    few, many = points(*given, count=5, seed=3), points(*given, count=9, seed=3)
    assert few == many[:5] and few != points(*given, count=5, seed=4) and len(set(many)) == 9


def test_ranges_are_even_in_their_measure_and_end_where_they_say():
    found = settings("optim.lr=log:1e-5..1e-2", "optim.weight_decay=0..0.3", "optim.warmup_steps=0..3", count=600)
    rates = [math.log10(point["optim.lr"]) for point in found]
    decays = [point["optim.weight_decay"] for point in found]
    assert min(rates) >= -5 and max(rates) <= -2 and min(decays) >= 0 and max(decays) <= 0.3
    for values, low, high in ((rates, -5, -2), (decays, 0, 0.3)):
        quarters = [sum((v - low) / (high - low) * 4 // 1 == quarter for v in values) for quarter in range(4)]
        assert min(quarters) > 100, quarters
    # A field of whole numbers is given whole numbers, and both ends.
    assert {point["optim.warmup_steps"] for point in found} == {0, 1, 2, 3}
    assert {type(point["optim.warmup_steps"]) for point in found} == {int}


def test_whole_numbers_are_known_by_the_field():
    whole = ["epochs", "max_steps", "batch.global", "freezing.unfreeze.0.epoch", "teacher.end_step"]
    assert all(takes_whole_numbers(key) for key in whole)
    assert not any(
        takes_whole_numbers(key) for key in ["optim.lr", "optim.clip_grad_norm", "nothing.here", "loss.kind"]
    )


@pytest.mark.parametrize(
    ("given", "count", "words"),
    [
        (["optim.lr=1e-3"], None, "nothing is swept"),
        (["optim.lr=1e-4..1e-3"], None, "optim.lr is a range, which has no grid: add --random N"),
        (["optim.lr=log:0..1"], 3, "begins above 0"),
        (["optim.lr=1..0"], 3, "from a smaller number to a larger one"),
        (["optim.lr=-1e999..5"], 3, "from a smaller number to a larger one"),
        (["epochs=0.2..0.8"], 3, "takes whole numbers, and none lies between"),
        (["epochs,max_steps=1..2"], 3, "a range is of one field"),
        (["optim.lr=1e-3,0.001"], None, "0.001 is given twice"),
        (["optim.lr=1,2", "optim.lr=3,4"], None, "optim.lr is given twice"),
        (["optim.lr=1,2", "optim.lr=3"], None, "optim.lr is given twice"),
        (["optim.lr=1,2,"], None, "write the values as A,B,C"),
        (["optim.lr=[1,2"], None, "not valid YAML"),
        (["optim.lr=1],[2"], None, "not valid YAML"),
        (["loss.kind,model.init_logit_bias=[softmax,null],[sigmoid]"], None, "each value is a list of 2"),
        (["loss.mask_same_image=true,false"], 3, "there are only 2 different points"),
        (["optim.lr=0..1"], 0, "draw one point at least"),
        (["optim.lr=0..1"], 10**6, "at most 1,000"),
        (
            [f"log_every={','.join(map(str, range(1, 102)))}", f"epochs={','.join(map(str, range(1, 11)))}"],
            None,
            "1,010",
        ),
    ],
)
def test_mistakes_are_told(given, count, words):
    with pytest.raises(UserError, match=re.escape(words)):
        points(*given, count=count)
