"""tools/extract_features.py: two ranks under the launcher, kills at random points, --verify, and what it refuses."""

from __future__ import annotations

import functools
import multiprocessing
import multiprocessing.connection
import os
import random
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from convclip.features.reader import FeatureStore
from convclip.features.writer import FeatureWriter
from tests.conftest import FULL
from tests.engine.stored.frozen_run import call_script, make_frozen_files, make_recipe, overrides
from tests.features.extraction import die_at_call
from tests.processes import forked, free_port, run_launched

pytestmark = pytest.mark.launch

LOCKED = {"lock": ["image", "text"], "unfreeze": []}
KILLS = 6 if FULL else 3


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_frozen_files(tmp_path_factory.mktemp("files"))


def command(files: Path, output: Path, *more: str) -> list[str]:
    """The extraction of the small run, both towers locked, three views."""
    train = str(files / "train-{000000..000002}.tar")
    values = overrides(files, freezing=LOCKED, features__views=3)
    given = [part for value in values if not value.startswith("data.train=") for part in ("--set", value)]
    names = ["--kind", "towers", "--recipe", str(files / "small.yaml"), "--train_data", train, "--output", str(output)]
    return ["tools/extract_features.py", *names, *given, *more]


@pytest.fixture(scope="module")
def extracted(files, tmp_path_factory):
    """(completed process, the store)."""
    output = tmp_path_factory.mktemp("store") / "features.h5"
    return run_launched(2, *command(files, output)), output


def content(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Identity and all rows by array, in the order of the ids."""
    store = FeatureStore(path)
    return store.identity, {name: store.read(name, sorted(store.ids(name))) for name in store.arrays}


def test_two_ranks(extracted):
    done, output = extracted
    assert done.returncode == 0, done.stdout + done.stderr
    assert "72 views, 48 captions" in done.stdout and "GiB when done" in done.stdout
    assert f"train with --set features={output}" in done.stdout
    identity, arrays = content(output)
    assert {name: tuple(rows.shape) for name, rows in arrays.items()} == {
        "image_map": (72, 64, 1, 1),
        "text_embedding": (48, 16),
        "teacher_image": (72, 24),
        "teacher_text": (48, 24),
    }
    assert identity["precision"] == "float32" and "3 views" in identity["transform"]


def extract_rank(rank: int, port: int, files: Path, output: Path, dies_at: int | None) -> None:
    """One of two ranks, committing every few rows; it may be killed in the midst of its n-th write, sync or rename."""
    settings = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in settings.items()})
    torch.set_num_threads(1)
    from convclip.engine.stored import extraction
    from convclip.engine.task import ImageTextTask
    from convclip.engine.zero.launcher import start_processes

    start_processes()
    extraction.FeatureWriter = functools.partial(FeatureWriter, commit_bytes=1000)
    recipe = make_recipe(files, freezing=LOCKED, features__views=3, evaluation__batch=5)
    if dies_at:
        die_at_call(dies_at)
    ImageTextTask(recipe).extract(output, torch.float32)


def test_killed_at_random_points_and_resumed(files, extracted, tmp_path):
    output, chance, kills = tmp_path / "features.h5", random.Random(0), 0
    for attempt in range(KILLS + 1):
        port, victim = free_port(), chance.randrange(2) if attempt < KILLS else None
        ranks = []
        for rank in range(2):
            dies_at = chance.randrange(1, 60) if rank == victim else None
            ranks.append(forked().Process(target=extract_rank, args=(rank, port, files, output, dies_at)))
            ranks[-1].start()
        multiprocessing.connection.wait([process.sentinel for process in ranks])
        if victim is not None:
            ranks[victim].join()
            kills += ranks[victim].exitcode == -signal.SIGKILL
            ranks[1 - victim].kill()
        for process in ranks:
            process.join()
    assert kills and [process.exitcode for process in ranks] == [0, 0]
    (identity, expected), (found_identity, found) = content(extracted[1]), content(output)
    assert found_identity == identity and found.keys() == expected.keys()
    for name, rows in expected.items():
        # Rows come in other batches after a kill, which rounds a matrix product in another way.
        torch.testing.assert_close(found[name], rows, rtol=0, atol=1e-6)
    assert [path.name for path in tmp_path.glob("*.new")] == []


def test_verify_prints_the_differences_of_a_sample(extracted, files, tmp_path):
    _, output = extracted
    done = call_script(tmp_path, *command(files, output, "--verify"))
    assert done.returncode == 0, done.stdout + done.stderr
    said = re.findall(r"^(\w+): largest difference (\S+) over 32 items$", done.stdout, re.MULTILINE)
    assert sorted(name for name, _ in said) == ["image_map", "teacher_image", "teacher_text", "text_embedding"]
    assert all(float(difference) <= 1e-6 for _, difference in said)


def test_a_finished_store_of_another_recipe_is_left_alone(extracted, files, tmp_path):
    _, output = extracted
    before = output.read_bytes()
    done = call_script(tmp_path, *command(files, output, "--set", "features.views=2"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert str(output) in last and "3 views" in last and "the recipe has 2 (features.views)" in last, last
    assert output.read_bytes() == before
