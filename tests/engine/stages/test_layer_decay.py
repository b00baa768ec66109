"""Layer-wise lr decay: against timm's own groups, and a formula typed here for both towers across events."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from timm.optim import param_groups_layer_decay

from convclip.config import load_recipe
from convclip.engine.plan.plan import format_plan
from convclip.engine.reports import unfreeze_report
from convclip.engine.stages.groups import Group, shown_groups, training_stages
from convclip.models import build_model
from convclip.run import plan_recipe
from convclip.schema import Recipe
from tests.conftest import FULL

OFF: tuple[str, ...] = ("optim.layer_decay=1", "optim.layer_decay=null", "optim.layer_decay={image: 1.0}")
EVENTS = (
    "model.image.backbone=test_convnext",
    "freezing.lock=[image, text]",
    "freezing.unfreeze=[{epoch: 1, tower: image, groups: 2}, {epoch: 1, tower: text, layers: 1, lr_scale: 0.5}, "
    "{epoch: 2, tower: image, all: true}]",
    "freezing.new_lr_scale=0.1",
    "optim.part_lr_scale={image: 2.0}",
)


def stages_of(recipe: Recipe):
    with torch.device("meta"):
        return training_stages(build_model(recipe.model), recipe)


def scales_of(groups: list[Group] | tuple[Group, ...]) -> dict[str, float]:
    """lr scale of each parameter, which is in one group."""
    found = [(name, group.lr_scale) for group in groups for name in group.parameters]
    assert len(found) == len(dict(found))
    return dict(found)


TRUNKS = ("convnext_atto", "resnet18", "tf_efficientnet_lite0", "fastvit_t8")


@pytest.mark.parametrize("backbone", TRUNKS if FULL else TRUNKS[:2])
def test_a_trunks_scales_and_groups_are_timms(backbone):
    recipe = load_recipe("demo", [f"model.image.backbone={backbone}", "freezing={}", "optim.layer_decay={image: 0.8}"])
    with torch.device("meta"):
        trunk = build_model(recipe.model).visual.trunk
    timms, names = {}, {id(parameter): name for name, parameter in trunk.named_parameters()}
    theirs = param_groups_layer_decay(trunk, weight_decay=0.2, layer_decay=0.8)
    for group in theirs:
        for parameter in group["params"]:
            # timm's top layer of a trunk without a classifier has scale 1; here the head stands above it.
            timms[f"visual.trunk.{names[id(parameter)]}"] = (0.8 * group["lr_scale"], group["weight_decay"])
    (stage,) = stages_of(recipe)
    ours = {name: (group.lr_scale, group.weight_decay) for group in stage.groups for name in group.parameters}
    for index in (0, 1):
        of_trunk = {name: found[index] for name, found in ours.items() if name in timms}
        assert of_trunk == pytest.approx({name: found[index] for name, found in timms.items()})
    assert len([group for group in stage.groups if group.layer is not None]) == len(theirs)
    assert {scale for name, (scale, _) in ours.items() if name not in timms} == {1.0}


def test_scales_compose_across_events_and_a_layers_depth_is_the_towers():
    recipe = load_recipe("demo", [*EVENTS, "optim.layer_decay=0.5"])
    stages = stages_of(recipe)
    for before, after in itertools.pairwise(stages):
        assert after.groups[: len(before.groups)] == before.groups
        assert after.groups[len(before.groups) :] == after.opened
    first, second, third = (scales_of(stage.groups) for stage in stages)
    assert first == {"logit_scale": 1.0} | {name: 2.0 for name in first if name != "logit_scale"}
    # Eleven groups of the trunk: stem, nine blocks with what shrinks the map before them, and the norm below the head.
    assert second["visual.trunk.head.norm.weight"] == pytest.approx(2 * 0.1 * 0.5)
    assert second["visual.trunk.stages.3.blocks.1.gamma"] == pytest.approx(2 * 0.1 * 0.5**2)
    assert third["visual.trunk.stages.3.downsample.0.weight"] == pytest.approx(2 * 0.1 * 0.5**3)
    assert third["visual.trunk.stem.0.weight"] == pytest.approx(2 * 0.1 * 0.5**11)
    assert second["text.transformer.resblocks.2.ln_1.weight"] == pytest.approx(0.5 * 0.5)
    assert "visual.trunk.stages.3.downsample.0.weight" not in second


def test_off_is_what_it_was_and_one_tower_leaves_the_other_alone():
    plain = stages_of(load_recipe("demo", EVENTS))
    for override in OFF:
        assert stages_of(load_recipe("demo", [*EVENTS, override])) == plain
    text = stages_of(load_recipe("demo", [*EVENTS, "optim.layer_decay={text: 0.5}"]))
    of_image = [[group for group in stage.groups if group.name.startswith("image")] for stage in (plain[-1], text[-1])]
    assert of_image[0] == of_image[1] and text != plain


def test_every_group_is_in_the_plan_and_only_the_ends_of_a_tower_in_curves():
    recipe = load_recipe("demo", ["freezing={}", "optim.layer_decay=0.7"])
    plan = plan_recipe(recipe)
    (stage,) = plan["stages"]
    lines = format_plan(plan).splitlines()
    for group in stage["groups"]:
        (line,) = (line for line in lines if f"+ {group['name']} " in line)
        assert f"lr x {group['lr_scale']:g}  weight" in line
    assert sum(group["parameters"] for group in stage["groups"]) == stage["trainable"]["total"]
    layers = {name.split(".")[1] for name in plan["lr_curve"]["lr"] if "layer" in name}
    assert len(stage["groups"]) > 30 and layers == {"layer00", "layer13", "layer03"}, layers
    assert {"image.decay", "logit_scale.no_decay"} <= plan["lr_curve"]["lr"].keys()


def test_the_log_of_an_event_says_the_lowest_and_the_highest_lr():
    recipe = load_recipe("demo", [*EVENTS, "optim.layer_decay={image: 0.5}"])
    with torch.device("meta"):
        model = build_model(recipe.model)
    _, stage, _ = training_stages(model, recipe)
    rates = [{"name": group.name, "lr": 1e-3 * group.lr_scale} for group in stage.groups]
    staged = SimpleNamespace(engine=SimpleNamespace(module=model), present=stage, parameter_groups=rates)
    (image, said), (text, plain) = unfreeze_report(staged, recipe, stage, 3, 1, 0.1)  # type: ignore[arg-type]
    assert "lr 5.00e-05 to 1.00e-04 = 0.05 to 0.1 x lr(step); " in said and image["lr_scale"] == 0.1
    assert "lr 5.00e-04 = 0.5 x lr(step); " in plain and text["lr_scale"] == 0.5
    assert {group.layer for group in shown_groups(stage.opened)} == {None, *(group.layer for group in stage.opened)}
