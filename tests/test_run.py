"""Evaluating a finished run: what the table and eval.jsonl say of how it was done."""

import json
from pathlib import Path

import pytest
import torch

from convclip.config import load_recipe
from convclip.run import evaluate_checkpoint, open_task
from convclip.schema import UserError
from tests.conftest import REPOSITORY
from tests.evaluation.small_model import write_noise

RUN = REPOSITORY / "tests" / "fixtures" / "0.1.0" / "run"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """The run's recipe names its data and its tokenizer from there."""
    monkeypatch.chdir(REPOSITORY)


def evaluated(folder: Path, *given: object) -> dict:
    evaluate_checkpoint(RUN, load_recipe(RUN / "recipe.yaml").data.val, folder, *given)
    return json.loads((folder / "eval.jsonl").read_text())


def test_an_evaluation_says_its_precision_and_its_overrides(tmp_path, capsys):
    row = evaluated(tmp_path)
    assert row["precision"] == "fp32" and "overrides" not in row
    assert capsys.readouterr().out.splitlines()[0] == "evaluated in fp32"
    row = evaluated(tmp_path, "bf16", ["evaluation.batch=2", "data.workers=0"])
    first, second, third, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("evaluated in bf16; the run computed in fp32, so its own figures differ a little")
    assert "--precision fp32" in first
    assert second == "with the recipe changed by --set evaluation.batch=2 --set data.workers=0"
    assert "images" in third and row["overrides"] == ["evaluation.batch=2", "data.workers=0"]


def test_zero_shot_takes_the_recipes_limit_of_pixels(tmp_path):
    (tmp_path / "classnames.txt").write_text("cat\n")
    (tmp_path / "templates.txt").write_text("a {}\n")
    write_noise(tmp_path / "cat" / "0.png", 1)

    def figures(overrides: list[str]) -> dict:
        task = open_task(load_recipe(RUN / "recipe.yaml", overrides))
        return task.zero_shot(tmp_path).figures(task.build_model().eval(), torch.device("cpu"), torch.float32)

    assert figures([])["images"] == 1
    with pytest.raises(UserError, match="none of the 1 pictures of the zero-shot folder"):
        figures(["data.max_image_pixels=4"])
