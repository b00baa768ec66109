"""Ranks that differ: each difference ends the run on all ranks, in one line that names it, before anything trains."""

from __future__ import annotations

import os
import shutil
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from convclip.schema import UserError
from tests.data.makers import noise_jpeg, write_tar
from tests.engine.small_run import make_files
from tests.processes import run_ranks

pytestmark = pytest.mark.launch

SMALL = {"batch": {"global": 8}, "max_steps": 1, "data": {"captions": "one", "workers": 0}}


def own_disks(files: Path, place: Path) -> Path:
    """A working folder for this rank alone, with its own copy of the files; ranks name what is in it alike."""
    from convclip.distributed import barrier, rank

    folder = place / f"disk{rank()}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(files, folder)
    os.chdir(folder)
    barrier()
    return folder


def other_pictures(path: Path) -> None:
    """The shard anew, with the same names, captions and sizes of the set, but other pictures."""
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            stem, _, kind = member.name.partition(".")
            file = tar.extractfile(member)
            assert file is not None
            samples.setdefault(stem, {})[kind] = file.read()
    for number, sample in enumerate(samples.values()):
        sample["jpg"] = noise_jpeg(1000 + number, (40, 36))
    write_tar(path, samples)


def said(output: str, resume: str = "never", config: str = "zero1_fp32", **fields: Any) -> list[str]:
    """What each rank says of a run that must not begin; "trained" where it did."""
    from convclip.config import load_recipe
    from convclip.distributed import gather_objects
    from convclip.run import train_recipe
    from tests.conftest import REPOSITORY

    values = {**SMALL, "data.train": "train-{000000..000002}.tar", "data.val": "val-000000.tar", **fields}
    recipe = load_recipe("small.yaml", [f"{key}={value}" for key, value in values.items()])
    try:
        train_recipe(recipe, REPOSITORY / "ds_configs" / f"{config}.json", output, resume)
    except UserError as error:
        return gather_objects(str(error))
    return gather_objects("trained")


def ranks_differ(files: str, place: str) -> dict[str, Any]:
    """What is said, by what differs on rank 1."""
    from convclip.distributed import is_main
    from convclip.engine import agreement
    from convclip.engine.zero.launcher import refuse_differing, versions

    shared, found = Path(place, "run"), {}
    one = not is_main()

    def fresh() -> str:
        own_disks(Path(files), Path(place))
        return str(shared)

    fresh()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "TOKEN_SECONDS", 0.5)
        found["folder"] = said("run")
    found["nothing left"] = Path("run").exists() and [path.name for path in Path("run").iterdir()] == []
    found["recipe"] = said(fresh(), seed=1 if one else 0, max_steps=1 + one)
    found["ds_config"] = said(fresh(), config="zero2_fp32" if one else "zero1_fp32")
    found["resume"] = said(fresh(), resume="auto" if one else "never")
    run = fresh()
    if one:
        other_pictures(Path("train-000001.tar"))
    found["pictures"] = said(run)
    run = fresh()
    if one:
        Path("train-000002.tar").unlink()
        shutil.copy("train-000001.tar", "train-000002.tar")
    found["captions"] = said(run)
    run = fresh()
    if one:
        shutil.copy("train-000001.tar", "val-000000.tar")
    found["evaluation"] = said(run)
    run = fresh()
    with pytest.MonkeyPatch.context() as patch:
        if one:
            patch.setattr(torch, "manual_seed", partial(lambda plain, seed: plain(seed + 1), torch.manual_seed))
        found["weights"] = said(run)
    with pytest.MonkeyPatch.context() as patch:
        if one:
            patch.setattr(agreement.metadata, "version", lambda name: "0.0.1")
        with pytest.raises(UserError) as caught:
            refuse_differing(versions())
        found["versions"] = [str(caught.value)]
    found["alike"] = said(fresh())
    return found


def test_each_difference_is_one_line_on_all_ranks(tmp_path):
    files = tmp_path / "files"
    files.mkdir()
    make_files(files)
    found = run_ranks(2, ranks_differ, str(files), str(tmp_path))
    expected = {
        "folder": "--output_dir run: rank 1 (host ",
        "recipe": "recipe.seed 1, not 0; recipe.max_steps 2, not 1; give",
        "ds_config": "ds_config.zero_optimization.stage 2, not 1",
        "resume": "resume auto, not never",
        "pictures": "training data, images of a sample (checksum) ",
        "captions": "training data, captions of a sample (checksum) ",
        "evaluation": "evaluation data (checksum) ",
        "weights": "weights to start from (checksum) ",
        "versions": "the version of torch 0.0.1, not ",
    }
    for name, words in expected.items():
        messages = found[name]
        assert len(set(messages)) == 1 and words in messages[0] and "\n" not in messages[0], (name, messages)
        assert name == "folder" or messages[0].startswith("rank 1 (host "), messages
    # Only what differs is named.
    assert "captions" not in found["pictures"][0] and ";" not in found["pictures"][0].partition("give all")[0][:-2]
    assert found["nothing left"]
    assert found["alike"] == ["trained", "trained"]
