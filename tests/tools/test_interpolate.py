"""tools/interpolate.py on the run that 0.1.0 left: its figures against evaluations of both ends; mistakes."""

import csv
import shutil

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

import convclip
from convclip.config import load_recipe
from convclip.engine.task import ImageTextTask
from convclip.models.checkpoint_weights import read_weights
from convclip.run import evaluate_checkpoint
from tests.conftest import REPOSITORY
from tests.evaluation.small_model import write_noise
from tools import interpolate

PLACE = REPOSITORY / "tests" / "fixtures" / "0.1.0"
RUN, VAL, TRAIN = PLACE / "run", PLACE / "shards" / "val-000000.tar", PLACE / "shards" / "train-{000000..000001}.tar"
START, END = (RUN / "checkpoints" / f"step-0000000{step}" for step in (3, 9))


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """The run's recipe names its tokenizer from there."""
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """A zero-shot folder."""
    folder = tmp_path_factory.mktemp("classes")
    (folder / "classnames.txt").write_text("red\nblue\n")
    (folder / "templates.txt").write_text("a {} square\n")
    for number in range(6):
        write_noise(folder / ("red", "blue")[number % 2] / f"{number}.png", number)
    return folder


def mean(recalls):
    return (recalls["i2t_r1"] + recalls["t2i_r1"]) / 2


def rows(folder):
    with open(folder / "interpolation.csv", newline="") as file:
        found = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    return {row["alpha"]: row for row in found}


def test_the_ends_score_as_their_checkpoints_and_a_mix_as_its_export(tmp_path, classes, capsys):
    folder = tmp_path / "mixed"
    given = [str(END), "--start", str(START), "--data", str(TRAIN), "--zero_shot", str(classes), "--steps", "2"]
    assert interpolate.main([*given, "--output_dir", str(folder), "--alpha", "0.25"]) == 0
    said, found = capsys.readouterr().out, rows(folder)
    assert list(found) == [0, 0.25, 0.5, 1] and "the end's at every alpha" not in said
    for alpha, checkpoint in ((0, START), (1, END)):
        expected = evaluate_checkpoint(checkpoint, TRAIN, tmp_path / f"{alpha}", zero_shot=classes)
        row, recalls = found[alpha], expected["standard"]
        assert [row["new_mean_r1"], row["new_i2t_r1"]] == pytest.approx([mean(recalls), recalls["i2t_r1"]])
        assert [row["retained_top1"], row["retained_top5"]] == pytest.approx(
            [expected["zero_shot"]["top1"], expected["zero_shot"]["top5"]]
        )
    # The export is the formula's, and scores as its row says.
    clip = convclip.load(folder / "export", "cpu")
    start, end = read_weights(START), read_weights(END)
    for name, value in clip.model.state_dict().items():
        torch.testing.assert_close(value, 0.75 * start[name] + 0.25 * end[name], rtol=1e-5, atol=1e-7)
    evaluation = ImageTextTask(load_recipe(RUN / "recipe.yaml")).evaluation(str(TRAIN))
    recalls = evaluation.figures(clip.model, torch.device("cpu"), torch.float32)["standard"]
    assert found[0.25]["new_mean_r1"] == pytest.approx(mean(recalls))
    assert Image.open(folder / "interpolation.png").width > 1000
    card = (folder / "export" / "README.md").read_text()
    assert (
        "0.75 of `step-00000003` and 0.25 of the run's" in card and "At step" not in card and str(tmp_path) not in card
    )


def test_the_start_is_rebuilt_from_the_recipe_and_a_new_head_is_the_ends(tmp_path, capsys):
    weights = {name: value for name, value in read_weights(START).items() if not name.startswith("visual.head.")}
    save_file(weights, tmp_path / "began.safetensors")
    run = tmp_path / "run"
    shutil.copytree(RUN, run)
    (run / "best").unlink()
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["model"]["pretrained"] = str(tmp_path / "began.safetensors")
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    given = [str(run), "--data", str(TRAIN), "--retained_data", str(VAL), "--steps", "4"]
    assert interpolate.main([*given, "--output_dir", str(tmp_path / "mixed"), "--choose"]) == 0
    said = capsys.readouterr().out
    assert "start: the start of run;" in said and "new in the run: visual.head (1 tensor)\n" in said
    found = rows(tmp_path / "mixed")
    best = max(found.values(), key=lambda row: (row["new_mean_r1"] + row["retained_mean_r1"], row["alpha"]))["alpha"]
    assert f"the highest sum of both has alpha {best:g}\n" in said
    model, end = convclip.load(tmp_path / "mixed" / "export", "cpu").model, read_weights(END)
    stem = "visual.trunk.stem.0.weight"
    assert torch.equal(model.visual.head.proj.weight, end["visual.head.proj.weight"])
    torch.testing.assert_close(model.get_parameter(stem), (1 - best) * weights[stem] + best * end[stem])
    # Of other pretrained weights, what never trained tells.
    save_file({**weights, stem: weights[stem] + 1}, tmp_path / "began.safetensors")
    assert interpolate.main([*given, "--output_dir", str(tmp_path / "other")]) == 2
    error = capsys.readouterr().err
    assert "visual.trunk.stem.0.weight than the run, which never trained it" in error and error.count("\n") == 1
    assert not (tmp_path / "other").exists()


def test_mistakes_are_one_line(tmp_path, classes, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    given = {"--data": str(VAL), "--retained_data": str(VAL), "--output_dir": str(tmp_path / "new")}
    for place, changes, words in (
        (END, {"--steps": "0"}, "--steps 0: give a number from 1"),
        (END, {"--alpha": "1.5"}, "--alpha 1.5: give a number from 0"),
        (END, {"--alpha": "nan"}, "--alpha nan: give a number from 0"),
        (END, {"--output_dir": str(tmp_path / "full")}, "already holds files, name a new folder"),
        (END, {"--start": str(END)}, "has the same weights as the end"),
        (END, {"--start": str(tmp_path / "none")}, "none: no such file or folder"),
        (END, {}, "has no weight that is not new in the run: there is nothing to mix"),
        (END, {"--start": str(START), "--ema": None}, "has no moving average"),
        (END, {"--start": str(START), "--data": str(tmp_path / "none.csv")}, "none.csv"),
        (tmp_path, {}, "holds no checkpoint"),
    ):
        flags = [word for pair in {**given, **changes}.items() for word in pair if word is not None]
        assert interpolate.main([str(place), *flags]) == 2, words
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1 and not (tmp_path / "new").exists(), error
