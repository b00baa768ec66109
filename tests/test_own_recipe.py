"""CONTRIBUTING's word on a recipe of one's own: a file among the package's, and the tests of recipes pass with it."""

import shutil

import pytest

from convclip import config
from tests import test_readme, test_recipes
from tests.engine.plan import test_plan

MINE = """\
epochs: 3
batch: {global: 32}
model: {image: {backbone: convnextv2_atto, image_size: 64}, text: {layers: 2}}
optim: {warmup_steps: 100}
freezing: {lock: [text], unfreeze: [{epoch: 1, tower: text, layers: 1}]}
"""
# What takes the name of a recipe and is run for every recipe found.
CHECKS = (
    test_recipes.test_resolved_recipe_reads_back_unchanged,
    test_plan.test_every_recipe_has_a_plan_whose_counts_add_up,
)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A copy of the package's recipes with one more, in the place of the package's."""
    folder = shutil.copytree(config.RECIPE_FOLDER, tmp_path / "recipes")
    (folder / "mine.yaml").write_text(MINE)
    monkeypatch.setattr(config, "RECIPE_FOLDER", folder)
    assert "mine" in config.list_recipes()
    return "mine"


def test_every_recipe_found_is_checked():
    for check in CHECKS:
        (mark,) = check.pytestmark
        assert mark.name == "parametrize" and mark.args == ("name", config.list_recipes())


def test_a_recipe_of_ones_own_passes_the_checks_without_a_table(mine, tmp_path):
    read_back, has_a_plan = CHECKS
    read_back(mine, tmp_path)
    has_a_plan(mine)
    test_recipes.test_the_experiments_and_the_demo_are_among_the_recipes()
    test_readme.test_the_recipe_table_lists_the_seeds_recipes()


def test_a_broken_recipe_of_ones_own_does_not_pass(mine, tmp_path):
    (config.RECIPE_FOLDER / "mine.yaml").write_text(MINE.replace("layers: 1}", "layers: 7}"))
    with pytest.raises(config.UserError, match="7"):
        CHECKS[1](mine)
