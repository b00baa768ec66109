"""The recipe beside a checkpoint is the one it was trained by, as far as the model goes."""

import json
import shutil
from pathlib import Path

import pytest

import convclip
from convclip.models.checkpoint_weights import checkpoint_path, recipe_of
from convclip.schema import UserError
from tests.conftest import REPOSITORY

STEP = "step-00000003"


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A checkpoint in a run's folder whose state says the recipe, as those of now do."""
    run = shutil.copytree(REPOSITORY / "tests" / "fixtures" / "0.1.0" / "run", tmp_path / "run")
    path = run / "checkpoints" / STEP
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "recipe": (run / "recipe.yaml").read_text()}))
    return path


def edit(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))


def test_another_model_is_refused(checkpoint, tmp_path):
    edit(tmp_path / "run" / "recipe.yaml", "  - 0.48145466", "  - 0.58145466")
    for read in (recipe_of, convclip.load):
        with pytest.raises(
            UserError, match=r"recipe.yaml has model.image.mean .*0.58.* was trained with .*: put it back"
        ):
            read(checkpoint)


def test_other_places_and_other_settings_are_not(checkpoint, tmp_path):
    recipe = tmp_path / "run" / "recipe.yaml"
    edit(recipe, "tokenizer: tests/fixtures/0.1.0/tokenizer", "tokenizer: /elsewhere")
    edit(recipe, "workers: 0", "workers: 2")
    edit(recipe, "seed: 0", "seed: 1")
    found = recipe_of(checkpoint)
    assert (found.model.text.tokenizer, found.data.workers) == ("/elsewhere", 2)
    # What the user says himself is no mistake.
    assert recipe_of(checkpoint, ["model.image.mean=[0, 0, 0]"]).model.image.mean == (0, 0, 0)


def test_a_state_without_a_recipe_or_gone_says_nothing(checkpoint, tmp_path):
    edit(tmp_path / "run" / "recipe.yaml", "  - 0.48145466", "  - 0.58145466")
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps({**state, "recipe": ""}))
    assert recipe_of(checkpoint).model.image.mean[0] == 0.58145466
    # A run that trains removes it meanwhile: whoever loads the weights looks again.
    (checkpoint / "state.json").unlink()
    assert recipe_of(checkpoint).model.image.mean[0] == 0.58145466


def test_a_damaged_recipe_in_a_state_is_one_line(checkpoint):
    path = checkpoint / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "recipe": state["recipe"].replace("seed: 0", "seed: x")}))
    with pytest.raises(UserError, match=r"the recipe in .*state.json is damaged \(seed: .*\)") as error:
        recipe_of(checkpoint)
    assert "\n" not in str(error.value)


def test_a_name_that_is_too_long_is_no_checkpoint():
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint_path("x" * 5000)
