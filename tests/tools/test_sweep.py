"""tools/sweep.py: its runs are launch/train.py's, it goes on, refuses what cannot share a store, and ranks."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from PIL import Image

from convclip.config import load_recipe
from convclip.locks import Lock
from tests.conftest import REPOSITORY
from tests.engine.small_run import arguments
from tests.engine.stored.frozen_run import make_frozen_files
from tests.processes import run_ranks, run_script

pytestmark = pytest.mark.launch

GRID = ["optim.lr=1e-3,1e-2", "model.image.head=attention_pool,attention_pool_linear"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_frozen_files(tmp_path_factory.mktemp("files"))


def command(files: Path, output: Path, *more: str, sets: list[str] | tuple[str, ...] = GRID) -> list[str]:
    """A sweep of the small recipe from one file of weights, two epochs for each run."""
    start = f"model.pretrained={files / 'start' / 'open_clip_model.safetensors'}"
    given = [part for override in [start, *sets] for part in ("--set", override)]
    return ["tools/sweep.py", *arguments(files, output, "--epochs", "2", *more, *given, ds_config="zero1_fp32")]


def call(script: str, *given: str) -> tuple[int, str, str]:
    """A script in this process: (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", [script, *given]),
    ):
        try:
            runpy.run_path(str(REPOSITORY / script), run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0), out.getvalue(), err.getvalue()
    raise AssertionError(f"{script} did not end by sys.exit")


def rows(folder: Path, name: str = "eval.jsonl") -> list[dict[str, Any]]:
    """The figures of a run, without what a clock says."""
    found = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    timed = {"samples_per_s", "data_share", "step_seconds", "memory_gib"}
    return [{key: value for key, value in row.items() if key not in timed} for row in found]


def results(output: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(output.glob("runs/*/result.json"))]


def train_command(files: Path, output: Path, sweep: Path, settings: dict[str, Any]) -> list[str]:
    """launch/train.py of a point's settings."""
    start = f"model.pretrained={files / 'start' / 'open_clip_model.safetensors'}"
    sets = [start, f"features={sweep / 'features.h5'}", "freezing.unfreeze=[]", "epochs=2"]
    sets += [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    given = [part for override in sets for part in ("--set", override)]
    return ["launch/train.py", *arguments(files, output, *given, ds_config="zero1_fp32")]


def interrupted(given: list[str]) -> tuple[int, str, str]:
    """The sweep with Ctrl-C in the midst of its second run."""
    import convclip.sweep.runs as runs
    from convclip.engine.trainer import Trainer

    count, train, step = [0], runs.train_recipe, Trainer._report_step

    def counted(*a: Any, **k: Any) -> Any:
        count[0] += 1
        return train(*a, **k)

    def pressed(self: Trainer, result: Any) -> None:
        step(self, result)
        if count[0] == 2 and self.state.step == 7:
            raise KeyboardInterrupt

    with mock.patch.object(runs, "train_recipe", counted), mock.patch.object(Trainer, "_report_step", pressed):
        return call(*given)


def scenario(files: Path, folder: Path) -> dict[str, tuple[int, str, str]]:
    """All that a process start is shared for."""
    grid, stopped, wild = folder / "grid", folder / "stopped", folder / "wild"
    said = {"grid": call(*command(files, grid))}
    for number, result in enumerate(results(grid)[::2]):
        said[f"train {number}"] = call(*train_command(files, folder / f"train-{number}", grid, result["settings"]))
    before = {path: path.stat().st_mtime_ns for path in grid.glob("runs/*/*")}
    said["again"] = call(*command(files, grid))
    assert before == {path: path.stat().st_mtime_ns for path in grid.glob("runs/*/*")}
    said["wider"] = call(*command(files, grid, sets=["optim.lr=1e-3,1e-2,3e-3", GRID[1]]))
    said["another"] = call(*command(files, grid, sets=[*GRID, "batch.global=8"]))
    said["a run's folder"] = call(*command(files, folder / "train-0"))
    store = f"features={grid / 'features.h5'}"
    two = command(files, stopped, sets=[GRID[0], store])
    said["stopped"] = interrupted(two)
    said["left"] = (0, " ".join(sorted(path.name for path in stopped.iterdir())), str(len(results(stopped))))
    said["gone on"] = call(*two)
    together = "optim.lr,batch.global=[1e-3,4],[1e30,4],[1e-3,4096]"
    sets = [store, "max_bad_steps=2", "freezing.unfreeze=[]", together]
    said["wild"] = call(*command(files, wild, sets=sets))
    said["all wild"] = call(*command(files, folder / "all", sets=[store, "optim.lr=1e30,1e31", "max_bad_steps=2"]))
    for name, sets in REFUSED.items():
        said[name] = call(*command(files, folder / "refused", sets=sets))
    return said


REFUSED = {
    "image_size 32, the recipe has 64": ["model.image.image_size=32,64"],
    "made with another model: model.text.layers 2, the recipe has 1": [
        "model.text.layers=2,1",
        "model.pretrained=null",
    ],
    "model.image.head attention_pool, the recipe has average_linear": [
        "model.image.head=attention_pool,average_linear"
    ],
    "made with other weights": ["seed=0,1", "model.pretrained=null"],
    "3 views, seed 0, the recipe has": ["features.views=3", "seed=0,1"],
    "`features` takes one value": ["features.views=1,2"],
    "it holds text embeddings, the recipe has no use for them": [
        "freezing.lock=[image,text],[image]",
        "freezing.unfreeze=[]",
    ],
    "freezing.new_lr_scale matters at unfreeze events": ["freezing.new_lr_scale=0.1,1.0"],
    "change nothing where an image has one view": ["data.random_erasing=0.1,0.5", "features.views=1"],
    "data.crop_scale changes nothing": ["data.crop_scale=[0.1,1],[0.5,1]", "features.views=1"],
    "evaluation.every_epochs is 0": ["evaluation.every_epochs=0", "optim.lr=1,2"],
    "--epochs and --set epochs": ["epochs=1,2"],
    "both set data.val": ["data.val=a.tar,b.tar"],
    "unknown key optim.lrr, did you mean 'lr'?": ["optim.lrr=1,2"],
    "settings that go together are given together": ["loss.kind=softmax,sigmoid"],
}


@pytest.fixture(scope="module")
def said(files, tmp_path_factory):
    """(folder, what each command said)."""
    folder = tmp_path_factory.mktemp("sweeps")
    return folder, run_ranks(1, scenario, files, folder)


def test_every_run_is_the_one_of_train_to_the_last_digit(said):
    folder, outputs = said
    found = results(folder / "grid")
    assert outputs["grid"][0] == 0, outputs["grid"]
    grid = [result for result in found if result["settings"]["optim.lr"] != 3e-3]
    assert len(grid) == 4
    for number, result in enumerate(sorted(grid, key=lambda result: result["folder"])[::2]):
        run, train = Path(result["folder"]), folder / f"train-{number}"
        assert outputs[f"train {number}"][0] == 0, outputs[f"train {number}"]
        assert len(rows(run)) == 2 and rows(run) == rows(train)
        assert rows(run, "metrics.jsonl") == rows(train, "metrics.jsonl")
        best = load_recipe(train / "recipe.yaml")
        assert load_recipe(run / "recipe.yaml") == best
        state = json.loads((train / (train / "best").read_text().strip() / "state.json").read_text())
        assert result["best"] == state["best"]


def test_ranking_table_and_picture(said):
    folder, outputs = said
    code, out, err = outputs["wider"]
    assert code == 0 and "Traceback" not in err
    lines = re.findall(r"^ +(\d+)  (.*): mean R@1 (\S+) \(.*\) at step (\d+)$", out, re.MULTILINE)
    means = [float(line[2]) for line in lines]
    assert [int(line[0]) for line in lines] == [1, 2, 3, 4, 5, 6] and means == sorted(means, reverse=True)
    table = (folder / "grid" / "sweep.md").read_text()
    assert table.count("\n| ") == 7 and "| optim.lr | model.image.head | mean R@1 |" in table
    expected = max(results(folder / "grid"), key=lambda result: result["best"]["mean_r1"])["best"]["mean_r1"]
    assert f"| {expected:.2f} |" in table.splitlines()[2] and shlex.split(table.split("```")[1])[0] == "deepspeed"
    with Image.open(folder / "grid" / "sweep.png") as picture:
        assert picture.size[0] > 500
    # Logs of the runs are in their folders, not on the screen.
    assert "grad norm" not in out and "grad norm" in next((folder / "grid").glob("runs/*/train.log")).read_text()
    assert not list((folder / "grid").rglob("*.safetensors")) and not list((folder / "grid").rglob("*.lock"))


def test_the_winners_command_has_the_events_again(said):
    folder, outputs = said
    words = shlex.split(outputs["grid"][1].splitlines()[-1])
    assert words[:2] == ["deepspeed", "launch/train.py"]
    sets = [word for flag, word in itertools.pairwise(words) if flag == "--set"]
    recipe = load_recipe(words[words.index("--recipe") + 1], sets)
    assert len(recipe.freezing.unfreeze) == 2 and recipe.epochs == 4 and recipe.features.mode == "fill"
    best = max(results(folder / "grid"), key=lambda result: result["best"]["mean_r1"])
    assert recipe.optim.lr in (1e-3, 1e-2) and f"optim.lr={recipe.optim.lr}" in words
    assert best["best"]["mean_r1"] > 0
    # Without events the store is its own.
    assert f"features={folder / 'grid' / 'features.h5'}" in shlex.split(outputs["wild"][1].splitlines()[-1])


def test_the_same_command_keeps_what_is_there(said):
    _, outputs = said
    assert outputs["again"][0] == 0 and outputs["again"][1].count("; kept, ETA 0:00:00") == 4
    ranking = [out.split("\n\n", 1)[1] for out in (outputs["grid"][1], outputs["again"][1])]
    assert ranking[0] == ranking[1]
    assert outputs["wider"][1].count("; kept, ") == 4
    code, _, err = outputs["another"]
    assert code == 2 and "holds another sweep: recipe.batch.global was 4, is 8; name a new folder" in err
    code, _, err = outputs["a run's folder"]
    assert code == 2 and "and no sweep: name a new folder" in err


def test_ctrl_c_leaves_a_folder_that_goes_on(said):
    folder, outputs = said
    code, _, err = outputs["stopped"]
    assert code == 130 and err.splitlines()[-1].endswith("the same command goes on with the runs that are missing")
    assert outputs["left"][1:] == ("runs sweep.json", "1")
    assert outputs["gone on"][0] == 0 and outputs["gone on"][1].count("; kept, ") == 1
    for result in results(folder / "stopped"):
        settings = {**result["settings"], "model.image.head": "attention_pool"}
        same = next(other for other in results(folder / "grid") if other["settings"] == settings)
        for name in ("eval.jsonl", "metrics.jsonl"):
            assert rows(Path(result["folder"]), name) == rows(Path(same["folder"]), name)


def test_a_run_that_diverges_is_a_row(said):
    folder, outputs = said
    code, out, _ = outputs["wild"]
    assert code == 0, outputs["wild"]
    lines = [line for line in out.splitlines() if line.startswith("   ")]
    assert len(lines) == 3 and "optim.lr=0.001 batch.global=4: mean R@1" in lines[0]
    assert sum("without a finite loss and gradient" in line for line in lines) == 1
    # A batch larger than the data: not this sweep's to keep.
    assert sum("batch.global=4096: failed: " in line for line in lines) == 1
    assert {result["settings"]["batch.global"] for result in results(folder / "wild")} == {4}
    assert "stopped at step" in (folder / "wild" / "sweep.md").read_text()
    code, _, err = outputs["all wild"]
    assert code == 2 and "no run of 2 has figures; the first: stopped at step" in err.splitlines()[-1]


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_share_a_store_is_refused_before_any_work(words, said):
    folder, outputs = said
    code, _, err = outputs[words]
    last = err.splitlines()[-1]
    assert code == 2 and last.startswith("sweep: ") and words in last and "Traceback" not in err, err
    assert not (folder / "refused").exists()


def test_one_sweep_at_a_time_in_a_folder(files, tmp_path):
    output = tmp_path / "sweep"
    output.mkdir()
    with Lock(output / "sweep.lock", output):
        done = run_script(*command(files, output))
    assert done.returncode == 2 and "another process is writing it" in done.stderr.splitlines()[-1]
    assert [path.name for path in output.iterdir()] == []


@pytest.mark.full
def test_two_ranks_train_each_run_together(files, tmp_path):
    sets = ["optim.lr=1e-3,1e-2"]
    done = run_script(*command(files, tmp_path / "sweep", sets=sets), world=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("[2/2] ") == 1 and "deepspeed --num_gpus 2 launch/train.py" in done.stdout
    first = results(tmp_path / "sweep")[0]
    train = run_script(*train_command(files, tmp_path / "train", tmp_path / "sweep", first["settings"]), world=2)
    assert train.returncode == 0, train.stdout + train.stderr
    assert rows(Path(first["folder"])) == rows(tmp_path / "train")
