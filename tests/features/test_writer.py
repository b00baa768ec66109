"""Writing a feature store: kills at any moment, several ranks, other world sizes, full disks, refusals."""

from __future__ import annotations

import errno
import filecmp
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from convclip.features import writer
from convclip.features.layout import ArraySpec, estimate
from convclip.features.reader import FeatureStore
from convclip.features.writer import FeatureWriter
from convclip.schema import UserError
from tests.conftest import FULL
from tests.features.extraction import ARRAYS, IDENTITY, ITEMS, committed, die_at_call, extract, features, in_child

TOTAL = sum(len(ids) for ids in ITEMS.values())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "features.h5"
    assert extract(path)
    return path


def assert_whole(path: Path) -> None:
    store = FeatureStore(path)
    for name, spec in ARRAYS.items():
        ids = ITEMS[spec.item_kind]
        assert torch.equal(store.read(name, ids), features(name, ids))
        assert sorted(map(str, store.ids(name))) == sorted(map(str, ids))
    leftovers = [file.name for file in path.parent.iterdir() if file.suffix in (".part", ".new", ".lock")]
    assert not leftovers


def run_ranks(path: Path, world: int, log: Path, batch: int = 3, batches: int | None = None) -> bool:
    """All ranks one after the other; appends what they compute to `log`."""

    def note(kind: str, ids: list) -> None:
        with open(log, "a") as file:
            file.writelines(f"{kind} {item}\n" for item in ids)

    return [extract(path, rank, world, note, batch, batches) for rank in range(world)][-1]


def computed(log: Path) -> list[tuple[str, str]]:
    return [tuple(line.split(" ", 1)) for line in log.read_text().splitlines()] if log.exists() else []


@pytest.mark.parametrize("world", [1, 2])
def test_kill_at_every_write_sync_and_rename(tmp_path: Path, uninterrupted: Path, world: int) -> None:
    status, number, path, log = -signal.SIGKILL, 0, tmp_path / "features.h5", tmp_path / "log"
    while status == -signal.SIGKILL:
        number += 1 if FULL else 3
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()

        def killed(number: int = number) -> None:
            die_at_call(number)
            run_ranks(path, world, log, batch=8)

        status = in_child(killed)
        before = committed(tmp_path)
        lost = len(computed(log)) - len(before)
        first_run = len(computed(log))
        assert in_child(lambda: run_ranks(path, world, log)) == 0
        again = computed(log)[first_run:]
        assert not before & set(again)
        assert len(again) == TOTAL - first_run + lost
        assert_whole(path)
        if world == 1:
            assert filecmp.cmp(path, uninterrupted, shallow=False)
    assert status == 0 and number > 20


def test_killed_20_times_at_random_moments(tmp_path: Path, uninterrupted: Path) -> None:
    path, log, rng, kills = tmp_path / "features.h5", tmp_path / "log", random.Random(5), 0
    fork = multiprocessing.get_context("fork")
    while kills < 20:
        if path.exists():  # Done sooner than killed 20 times: begin another.
            assert filecmp.cmp(path, uninterrupted, shallow=False)
            path.unlink()
            log.unlink()
        before = committed(tmp_path)
        known = len(computed(log))
        process = fork.Process(target=run_ranks, args=(path, 1, log))
        process.start()
        time.sleep(rng.uniform(0.005, 0.08))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        assert not before & set(computed(log)[known:])
    assert in_child(lambda: run_ranks(path, 1, log)) == 0
    assert filecmp.cmp(path, uninterrupted, shallow=False)


@pytest.mark.parametrize("world", [2, 2, 3, 5])
def test_ranks_at_once(tmp_path: Path, world: int) -> None:
    path = tmp_path / "features.h5"
    fork = multiprocessing.get_context("fork")
    start = fork.Barrier(world)

    def rank_of(rank: int) -> None:
        writer = FeatureWriter(path, ARRAYS, IDENTITY, ITEMS, rank, world)
        for kind in ITEMS:
            ids = writer.missing(kind)
            writer.write(ids, {name: features(name, ids) for name, spec in ARRAYS.items() if spec.item_kind == kind})
        start.wait()  # So that all join the parts at the same time.
        writer.finish()

    ranks = [fork.Process(target=rank_of, args=(rank,)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
        assert process.exitcode == 0
    assert_whole(path)
    assert len(list(tmp_path.iterdir())) == world + 1


@pytest.mark.parametrize("worlds", [(1, 2), (2, 1), (3, 2, 3), (1, 3, 1), (2, 25)])
def test_resume_with_another_world_size(tmp_path: Path, worlds: tuple[int, ...]) -> None:
    path, log = tmp_path / "features.h5", tmp_path / "log"
    for world in worlds[:-1]:
        assert not run_ranks(path, world, log, batches=2)
    assert run_ranks(path, worlds[-1], log)
    rows = computed(log)
    assert len(rows) == len(set(rows)) == TOTAL
    assert_whole(path)


def test_a_rank_with_nothing_to_do(tmp_path: Path) -> None:
    assert not extract(tmp_path / "features.h5", rank=49, world=50)
    assert not list(tmp_path.iterdir())


def test_parts_of_which_nothing_was_written_go(tmp_path: Path) -> None:
    path = tmp_path / "features.h5"
    FeatureWriter(path, ARRAYS, IDENTITY, ITEMS)
    for rank in range(2):
        extract(path, rank, 2)
    assert_whole(path)
    assert not list(tmp_path.glob("*of-00001*"))


def test_a_finished_store_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "features.h5"
    extract(path)
    before = path.read_bytes()
    writer = FeatureWriter(path, ARRAYS, IDENTITY, ITEMS)
    assert len(writer.missing("image")) == 0 and writer.missing("caption") == []
    assert writer.finish() and writer.finish()
    assert path.read_bytes() == before


@pytest.mark.parametrize("finished", [True, False])
def test_other_identity_arrays_or_items_are_refused(tmp_path: Path, finished: bool) -> None:
    path = tmp_path / "features.h5"
    assert extract(path, batches=None if finished else 1) == finished
    changed = {"note": "", "model": "tiny", "views": 2}
    with pytest.raises(UserError, match=r"its views is 1, wanted is 2"):
        FeatureWriter(path, ARRAYS, {**IDENTITY, **changed}, ITEMS)
    with pytest.raises(UserError, match=r"does not say its layer, .*'stage 3'"):
        FeatureWriter(path, ARRAYS, {**IDENTITY, "layer": "stage 3"}, ITEMS)
    with pytest.raises(UserError, match=r"its note is ''"):
        FeatureWriter(path, ARRAYS, {key: value for key, value in IDENTITY.items() if key != "note"}, ITEMS)
    with pytest.raises(UserError, match=r"its eot is .*uint8.*wanted is .*int32"):
        FeatureWriter(path, {**ARRAYS, "eot": ArraySpec((), "int32", "token position", "caption")}, IDENTITY, ITEMS)
    with pytest.raises(
        UserError, match="other training data: 23 images and 41 captions, the data now have 23 images and 40 captions;"
    ):
        FeatureWriter(path, ARRAYS, IDENTITY, {**ITEMS, "caption": ITEMS["caption"][1:]})


def test_a_full_disk_is_one_line_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, log, write, left = tmp_path / "features.h5", tmp_path / "log", os.pwrite, 12

    def full(*arguments: object) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*arguments)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match=r"No space left on device.*run the same command again"):
        run_ranks(path, 1, log)
    monkeypatch.undo()
    before = len(committed(tmp_path))
    assert 0 < before < len(computed(log)) and not path.exists()
    first_run = len(computed(log))
    assert run_ranks(path, 1, log)
    assert len(computed(log)) - first_run == TOTAL - before
    assert_whole(path)


def test_writes_the_system_cuts_short_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: write(file, data[:1000], offset))
    assert extract(tmp_path / "features.h5")
    assert_whole(tmp_path / "features.h5")


def test_too_little_room_is_said_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match=r"needs 0.00 GB more, its disk has 0.00 GB free"):
        FeatureWriter(tmp_path / "features.h5", ARRAYS, IDENTITY, ITEMS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("limit", [100, 3_000, 50_000])
def test_a_file_size_limit_is_a_user_error(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "features.h5"

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        with pytest.raises(UserError, match="cannot write"):
            extract(path)

    assert in_child(limited) == 0
    assert extract(path)
    assert_whole(path)


def test_a_part_has_one_writer_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "features.h5"
    writer = FeatureWriter(path, ARRAYS, IDENTITY, ITEMS)

    def second() -> None:
        with pytest.raises(UserError, match="another process is writing it"):
            FeatureWriter(path, ARRAYS, IDENTITY, ITEMS)

    assert in_child(second) == 0
    assert not writer.finish()


def test_done_bytes_follow_the_sync_of_what_they_vouch_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    write, sync = os.pwrite, os.fsync
    writer = FeatureWriter(tmp_path / "features.h5", ARRAYS, IDENTITY, ITEMS)
    flags = {writer._part.offsets[f"done/{kind}"]: len(ids) for kind, ids in ITEMS.items()}

    def noted_write(file: int, data: memoryview, offset: int) -> int:
        is_flag = any(start <= offset < start + count for start, count in flags.items())
        calls.append("done" if is_flag else "data")
        return write(file, data, offset)

    monkeypatch.setattr(os, "pwrite", noted_write)
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("sync"), sync(file)))
    for first in (0, 7):
        ids = writer.missing("image")[: first + 7]
        writer.write(ids, {name: features(name, ids) for name in ("map", "embedding")})
        writer.flush()
    assert "done" in calls
    for place, call in enumerate(calls):
        if call == "done":
            since = calls[:place][::-1]
            assert since.index("sync") < since.index("data")


def test_rows_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    writer = FeatureWriter(tmp_path / "features.h5", ARRAYS, IDENTITY, ITEMS, rank=0, world=2)
    ids = writer.missing("image")[:3]
    rows = {name: features(name, ids) for name in ("map", "embedding")}
    with pytest.raises(ValueError, match="all arrays of one item kind"):
        writer.write(ids, {"map": rows["map"]})
    with pytest.raises(ValueError, match="wanted"):
        writer.write(ids, {**rows, "map": rows["map"].float()})
    with pytest.raises(ValueError, match="wanted"):
        writer.write(ids, {**rows, "map": rows["map"][:2]})
    for wrong in ([ids[0], ids[1], ids[0]], [ids[0], ids[1], 10**7], ITEMS["image"][:3]):
        with pytest.raises(ValueError, match="is not to write"):
            writer.write(wrong, rows)
    broken = {**rows, "embedding": rows["embedding"].clone()}
    broken["embedding"][1, 2] = float("nan")
    with pytest.raises(UserError, match=f"embedding of image {ids[1]} is not finite"):
        writer.write(ids, broken)
    writer.write(ids, rows)
    with pytest.raises(ValueError, match="or not again"):
        writer.write(ids[:1], {name: values[:1] for name, values in rows.items()})
    writer.write([], {name: values[:0] for name, values in rows.items()})


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "features.h5"
    for items in ({"image": ITEMS["image"]}, {**ITEMS, "video": ["a"]}, {**ITEMS, "caption": []}):
        with pytest.raises(ValueError, match="item_ids"):
            FeatureWriter(path, ARRAYS, IDENTITY, items)
    with pytest.raises(ValueError, match="twice"):
        FeatureWriter(path, ARRAYS, IDENTITY, {**ITEMS, "caption": ["a", "b", "a"]})
    with pytest.raises(ValueError, match="identity size"):
        FeatureWriter(path, ARRAYS, {"size": (1, 2)}, ITEMS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("world", [1, 2])
def test_estimate_agrees_with_the_files(tmp_path: Path, world: int) -> None:
    arrays = {"map": ArraySpec((96, 7, 7), "bfloat16"), "embedding": ArraySpec((64,), "float32")}
    ids, path = np.arange(1000), tmp_path / "features.h5"
    for rank in range(world):
        writer = FeatureWriter(path, arrays, {"model": "m" * 200}, {"item": ids}, rank, world)
        count = len(writer.missing())
        rows = {name: torch.zeros(count, *spec.row_shape, dtype=spec.torch_dtype) for name, spec in arrays.items()}
        writer.write(writer.missing(), rows)
        writer.finish()
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert abs(size / estimate(arrays, {"item": 1000}) - 1) < 0.01
