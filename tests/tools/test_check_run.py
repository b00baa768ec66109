"""A run's folder: what 0.1.0 wrote is sound, and each kind of damage is found by its name."""

import json
import re
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from convclip.models.checkpoint_files import write_tensors
from convclip.models.checkpoint_weights import read_state, write_state
from tests.conftest import REPOSITORY
from tools import check_run

FIXTURE = REPOSITORY / "tests" / "fixtures" / "0.1.0" / "run"
OLDER, NEWER = "step-00000003", "step-00000009"
METRICS = "metrics.jsonl"


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(FIXTURE, tmp_path / "run")


@pytest.fixture
def checked(capsys):
    """(exit code, standard output, {kind: count} of its table) of the tool."""

    def call(folder):
        code = check_run.main([str(folder)])
        out = capsys.readouterr().out
        table = out.partition("   count  kind")[2]
        kinds = {kind: int(count) for count, kind in re.findall(r"^ +(\d+)  (\S.*)$", table, re.MULTILINE)}
        assert bool(kinds) == (code == 1)
        return code, out, kinds

    return call


def rewritten(path, change):
    """A safetensors file again, its tensors changed, its metadata the same."""
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    change(tensors)
    save_file(tensors, path, metadata=metadata)


def replaced(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_a_sound_run_has_no_findings(checked):
    code, out, _ = checked(FIXTURE)
    assert code == 0 and "2 checkpoints (3, 9), 11 rows of metrics.jsonl, 3 rows of eval.jsonl" in out


@pytest.mark.parametrize(
    ("damage", "kind", "words"),
    [
        (lambda run: replaced(run / "recipe.yaml", "epochs:", "epoch:"), "recipe.yaml cannot be read", "epoch"),
        (lambda run: (run / "recipe.yaml").unlink(), "recipe.yaml cannot be read", "recipe.yaml"),
        (lambda run: (run / "ds_config.json").write_text("{"), "ds_config.json cannot be read", "JSON"),
        (lambda run: (run / "latest").write_text(f"checkpoints/{OLDER}"), "pointer is wrong", "that of step 9"),
        (lambda run: (run / "best").write_text("checkpoints/../.."), "pointer is wrong", "names no checkpoint"),
        (lambda run: (run / "best").unlink(), "pointer is wrong", "should name step 3"),
        (lambda run: shutil.rmtree(run / "checkpoints" / OLDER), "pointer is wrong", f"{OLDER}, which is not there"),
        (lambda run: (run / "checkpoints" / f"{NEWER}.part").mkdir(), "left by a killed run, or being written", NEWER),
        (lambda run: (run / "latest.ab-1-0.part").touch(), "left by a killed run, or being written", "latest.ab"),
        (
            lambda run: replaced(run / METRICS, '"step": 2,', '"step": 7,'),
            "steps of rows do not ascend",
            "line 3",
        ),
        (
            lambda run: replaced(run / METRICS, '{"step": 2', '["step": 2'),
            "row is no object with a step",
            "line 2",
        ),
        (
            lambda run: replaced(run / METRICS, '"loss": 1.98', '"loss": NaN, "x": 1.98'),
            "row has a figure that is not finite",
            "line 1, step 1: loss",
        ),
        (
            lambda run: replaced(run / "eval.jsonl", '"i2t_r1": 33', '"i2t_r1": Infinity, "x": 33'),
            "row has a figure that is not finite",
            "line 1, step 3: i2t_r1",
        ),
        (lambda run: (run / METRICS).open("a").write('{"step": 1'), "last row is cut", "line 12"),
        (lambda run: (run / "eval.jsonl").unlink(), "row is missing", "none of step 3"),
        (
            lambda run: (run / "checkpoints" / "locked.safetensors").write_bytes(b"x"),
            "checkpoint cannot be read",
            "locked.safetensors",
        ),
        (
            lambda run: (run / "checkpoints" / OLDER / "state.json").write_text("{"),
            "checkpoint cannot be read",
            f"{OLDER} is not a convclip checkpoint",
        ),
        (
            lambda run: replaced(run / "checkpoints" / OLDER / "state.json", '"step": 3', '"step": 4'),
            "checkpoint has another step than its name",
            "its state says 4",
        ),
    ],
)
def test_each_damage_by_its_name(damage, kind, words, folder, checked):
    damage(folder)
    code, out, kinds = checked(folder)
    assert code == 1 and kind in kinds and words in out, out


def test_a_cut_or_unsound_checkpoint_costs_no_other(folder, checked):
    path = folder / "checkpoints" / NEWER / "rank-00000.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    code, out, kinds = checked(folder)
    assert code == 1 and kinds == {"checkpoint cannot be read": 1} and "1 checkpoints (3)" in out
    path.write_bytes(whole)

    def spoil(tensors):
        for key in ("0/master", next(key for key in tensors if key.startswith("0/exp_avg"))):
            tensors[key].view(-1)[0] = torch.nan

    rewritten(path, spoil)
    code, out, kinds = checked(folder)
    assert code == 1 and kinds == {"tensor of a checkpoint is damaged or not finite": 2}
    assert "0/master that are not finite" in out and "0/exp_avg" in out


def test_checksums_and_runs_of_the_present_format(folder, checked):
    """The fixture's checkpoints written again by the present version, as of two runs; then one bit flips."""
    for name, run in ((OLDER, "one"), (NEWER, "two")):
        path = folder / "checkpoints" / name
        state = read_state(path)
        state.format, state.run = check_run.RunState(0, 0, 1, 0, "").format, run
        write_state(path, state)
        with safe_open(path / "rank-00000.safetensors", framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            layout = json.loads(file.metadata()["layout"])
        write_tensors(tensors, path / "rank-00000.safetensors", state.origin(0), layout)
    assert checked(folder)[2] == {"checkpoints are of more than one run": 1}
    data = bytearray(path.joinpath("rank-00000.safetensors").read_bytes())
    data[-4] ^= 1
    path.joinpath("rank-00000.safetensors").write_bytes(data)
    code, out, kinds = checked(folder)
    assert code == 1 and kinds == {"tensor of a checkpoint is damaged or not finite": 1} and "wrong checksum" in out


def test_no_run_is_an_error(tmp_path, capsys):
    for place in (tmp_path, tmp_path / "absent", tmp_path / ("x" * 5000), REPOSITORY / "README.md"):
        assert check_run.main([str(place)]) == 2
        assert "is not a run folder" in capsys.readouterr().err


def test_a_recipe_of_another_model_is_found(folder, checked):
    """What 0.1.0 wrote does not say its recipe; a state of now does."""
    recipe = (folder / "recipe.yaml").read_text()
    replaced(folder / "recipe.yaml", "- 0.48145466", "- 0.58145466")
    assert checked(folder)[0] == 0
    for path in (folder / "checkpoints").glob("step-*"):
        state = json.loads((path / "state.json").read_text())
        (path / "state.json").write_text(json.dumps({**state, "recipe": recipe}))
    code, out, kinds = checked(folder)
    assert code == 1 and kinds == {"recipe.yaml has another model than a checkpoint": 2}
    assert "model.image.mean" in out
