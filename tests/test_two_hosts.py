"""Two hosts on one wire: training, a disk that is not shared, a wire that is slow or cut, a host that goes on alone."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from tests.engine.small_run import arguments, make_files, train_here, weights_of
from tests.hosts import Host, two_hosts, why_not
from tests.processes import free_port, run_ranks

pytestmark = [pytest.mark.full, pytest.mark.launch]

SMALL = ("--set", "batch.global=8", "--set", "max_steps=6", "--set", "checkpoint.every_steps=1")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def hosts(tmp_path):
    if why_not():
        pytest.skip(why_not())
    with two_hosts(tmp_path) as found:
        yield found


def train(files: Path, run: Path, hosts: tuple[Host, ...], *more: str):
    port = free_port()
    given = arguments(files, run, *SMALL, *more, ds_config="zero2_fp32")
    return [host.torchrun(len(hosts), *given, first=hosts[0], port=port) for host in hosts]


def ends(runs, seconds: float = 300) -> list[tuple[int, str]]:
    """(exit code, output) of each, within so many seconds."""
    until = time.monotonic() + seconds
    found = []
    for run in runs:
        said, _ = run.communicate(timeout=max(1.0, until - time.monotonic()))
        found.append((run.returncode, said))
    return found


def test_two_hosts_train_as_one(files, tmp_path, hosts):
    run_ranks(2, train_here, str(files), str(tmp_path / "one"), 2, tuple(SMALL[1::2]))
    hosts[0].slow_down()
    done = ends(train(files, tmp_path / "two", hosts))
    assert [code for code, _ in done] == [0, 0], done
    expected, found = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not any(host.pids() for host in hosts)


def test_a_disk_of_its_own_is_refused_before_anything_is_written(files, tmp_path, hosts):
    run = tmp_path / "disks" / "run"
    run.parent.mkdir()
    hosts[1].private = run.parent
    done = ends(train(files, run, hosts))
    assert all(code for code, _ in done), done
    assert f"--output_dir {run}: rank 1 (host beta) does not see what rank 0 (host alpha) wrote there" in done[0][1]
    assert "Traceback" not in done[0][1].split("torch.distributed.elastic")[0]
    assert not any((run / name).exists() for name in ("recipe.yaml", "checkpoints", ".ranks"))
