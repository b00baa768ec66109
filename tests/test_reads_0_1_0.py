"""What 0.1.0 wrote is read: a run, its feature store and an export. tests/fixtures/0.1.0/README.md says how it came."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from setuptools import find_packages

from convclip.data.tokenizers import build_tokenizer
from convclip.features.reader import FeatureStore
from convclip.models.export import load_export
from tests.conftest import REPOSITORY
from tests.processes import run_ranks

FOLDER = REPOSITORY / "tests" / "fixtures" / "0.1.0"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """The run's recipe names its data and its tokenizer from there."""
    monkeypatch.chdir(REPOSITORY)


def worst_difference(weights: dict[str, torch.Tensor], step: int) -> float:
    """Largest difference of any weight's sum, or sum of squares, from what 0.1.0 had at that step."""
    expected = EXPECTED["weights"][f"step-{step:08d}"]
    assert weights.keys() == expected.keys()
    found = {n: (t.double().sum().item(), t.double().square().sum().item()) for n, t in weights.items()}
    return max(abs(a - b) for name, values in found.items() for a, b in zip(values, expected[name], strict=True))


def evaluate_and_resume(run: str, evaluated: str) -> tuple[dict, dict, float]:
    """Figures of the best checkpoint, the summary of the run gone on with, and how far its weights are from 0.1.0's."""
    from convclip.config import load_recipe
    from convclip.run import evaluate_checkpoint, train_recipe
    from tests.engine.small_run import weights_of

    recipe = load_recipe(Path(run) / "recipe.yaml")
    # Paths as text here, as Path in the other tests of these two.
    figures = evaluate_checkpoint(run, recipe.data.val, evaluated)
    summary = train_recipe(recipe, str(REPOSITORY / "ds_configs" / "zero2_fp32.json"), run, "auto")
    return figures, summary, worst_difference(weights_of(Path(run)), 12)


@pytest.mark.parametrize("step", [3, 9])
def test_a_checkpoint_gives_the_weights_it_gave(step):
    from convclip.models.checkpoint_weights import read_weights

    assert worst_difference(read_weights(FOLDER / "run" / "checkpoints" / f"step-{step:08d}"), step) == 0


def lower_medians(figures):
    """0.1.0 dropped the half of a median that lies between two ranks."""
    return {name: math.floor(value) if "median" in name else value for name, value in figures.items()}


@pytest.mark.launch
def test_a_run_is_evaluated_and_gone_on_with(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(FOLDER / "run", run)
    figures, summary, difference = run_ranks(1, evaluate_and_resume, str(run), str(tmp_path / "e"))
    at_step_3 = EXPECTED["evaluation"][0]
    for protocol in ("standard", "rowwise"):
        assert lower_medians(figures[protocol]) == at_step_3[protocol]
    assert figures["val_loss"] == pytest.approx(at_step_3["val_loss"], rel=1e-5)
    assert summary["steps"] == 3 and difference < 1e-4
    log = (run / "train.log").read_text()
    assert "resumed from" in log and log.count("unfreeze image: last 2 groups") == 2
    rows = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 6, 9, 12]
    assert lower_medians(rows[-1]["standard"]) == EXPECTED["evaluation"][-1]["standard"]
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps if "event" not in row] == list(range(1, 13))


def test_a_feature_store_gives_the_rows_it_gave():
    expected = EXPECTED["store"]
    store = FeatureStore(FOLDER / "run" / "features.h5", expected["identity"])
    assert store.identity == expected["identity"] and store.arrays.keys() == expected["arrays"].keys()
    for name, array in expected["arrays"].items():
        assert list(store.ids(name)) == array["ids"]
        sums = store.read(name, array["ids"]).double().flatten(1).sum(1)
        assert sums.tolist() == array["row_sums"]


def test_an_export_gives_the_embeddings_it_gave():
    model, config = load_export(FOLDER / "export")
    images = torch.linspace(-2, 2, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    tokens = build_tokenizer(config.text)(["a red square", "7 is blue"])
    theirs = open_clip.create_model(f"local-dir:{FOLDER / 'export'}").eval()
    with torch.no_grad():
        found = model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)
        others = theirs.encode_image(images, normalize=True), theirs.encode_text(tokens, normalize=True)
        scale = model.logit_scale.exp()
    for ours, other, expected in zip(found, others, (EXPECTED["export"][k] for k in ("images", "texts")), strict=True):
        torch.testing.assert_close(ours, torch.tensor(expected), atol=1e-6, rtol=0)
        torch.testing.assert_close(other, torch.tensor(expected), atol=1e-5, rtol=0)
    assert scale.tolist() == pytest.approx(EXPECTED["export"]["scale"])


def test_the_package_takes_no_tests_along():
    from ast import Call, literal_eval, parse, walk

    (call,) = [node for node in walk(parse((REPOSITORY / "setup.py").read_text())) if isinstance(node, Call)][:1]
    data = {keyword.arg: keyword.value for keyword in call.keywords}["package_data"]
    assert literal_eval(data) == {"convclip": ["recipes/*.yaml"]}
    found = find_packages(str(REPOSITORY), include=["convclip", "convclip.*"])
    assert found and all(name.split(".")[0] == "convclip" for name in found)
