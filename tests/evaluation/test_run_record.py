"""What a model card says of a run: true figures, base names of places, bounded."""

import json
import re

import pytest

from convclip import schema
from convclip.evaluation.run_record import MAX_RECIPE, about_file, about_run, base_name, evaluation_of
from convclip.models.checkpoint_weights import RunState
from tests.conftest import REPOSITORY

RUN = REPOSITORY / "tests" / "fixtures" / "0.1.0" / "run"
STATE = RunState(9, 1, 2, 2, "torch.bfloat16", data={"steps per epoch": 6, "captions": 1200, "rows per epoch": True})


def recipe(**sections):
    return schema.Recipe.model_validate({"name": "small", "epochs": 4, **sections})


def test_the_recalls_are_those_of_the_exported_step_beside_chance():
    about = about_run(RUN / "checkpoints" / "step-00000009", recipe(data={"val": "/secret/val-0.tar"}), STATE)
    assert "At step 9, on `val-0.tar`" in about and "/secret" not in about
    # The row of step 9: R@1 is 0 and 25 %; a text of 12, with 6 images, is right by chance in a twelfth.
    standard, chance, rowwise, by_row = (
        re.search(rf"^{name} +(.*)$", about, re.MULTILINE)[1].split()
        for name in ("standard", "standard by chance", "rowwise", "rowwise by chance")
    )
    assert [standard[0], standard[3], rowwise[3], by_row[0], chance[3]] == ["0.00", "25.00", "16.67", "8.33", "16.67"]
    assert "9 optimizer steps, 1.5 of its recipe's 4 epochs, global batch 384" in about and "bf16" in about
    assert "1,200 captions" in about and "rows per epoch" not in about


def test_the_last_whole_row_of_a_step_counts(tmp_path):
    file = tmp_path / "eval.jsonl"
    rows = [json.dumps({"step": 3, "standard": {}, "number": n}) for n in range(3)]
    file.write_text("\n".join([*rows[:2], "[1]", '{"step": 3}', rows[2][:-9]]))
    assert evaluation_of(file, 3)["number"] == 1
    assert evaluation_of(file, 4) is None and evaluation_of(tmp_path / "none", 3) is None
    # Figures that are none are not shown, and no reason to fail.
    file.write_text(json.dumps({"step": 9, "standard": [], "images": 0, "texts": 1, "val_loss": "x"}))
    about = about_run(tmp_path / "checkpoints" / "step-00000009", recipe(), STATE)
    assert "has no evaluation at step 9" in about


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("/home/me/shards/train-{000000..000002}.tar", "train-{000000..000002}.tar"),
        ("https://me:password@host/a/b.tar?signature=abc#x", "b.tar"),
        ("s3://bucket/key/c.tar", "c.tar"),
        ("pipe:curl -H 'Authorization: secret' https://host/a.tar", "a pipe: command"),
        ("hf-hub:owner/name", "hf-hub:owner/name"),
        ("C:\\data\\weights.bin", "weights.bin"),
        ("runs/here/", "here"),
    ],
)
def test_of_a_place_only_its_name_is_said(place, said):
    assert base_name(place) == said
    values = {"data": {"train": place}, "model": {"pretrained": place, "image": {"pretrained": place}}}
    for about in (about_run(RUN / "checkpoints" / "x", recipe(**values), STATE), about_file(place, recipe(**values))):
        assert said.split("{")[0] in about
        assert not re.search("password|signature|secret|/home|bucket|data.weights|runs/", about)


def test_what_it_was_trained_from_is_named():
    about = about_run(RUN, recipe(model={"pretrained": "a/laion.bin", "image": {"pretrained": "timm"}}), STATE)
    assert "- both towers: `laion.bin`\n- image tower: `timm`" in about
    assert "Random weights" in about_run(RUN, recipe(), STATE)


def test_a_long_recipe_is_cut_and_cannot_leave_its_block():
    about = about_run(RUN, recipe(description="```\n# A heading of its own\n" + "word " * 9000), STATE)
    assert len(about) < MAX_RECIPE + 3000 and "and more" in about
    assert about.count("```") == 2
