"""Locks between processes, on one machine and, by their heartbeat, on several."""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from pathlib import Path

import pytest

from convclip import locks
from convclip.files import CannotWrite
from convclip.locks import Lock
from convclip.schema import UserError
from tests.test_files import die, failing, in_child, names


def test_a_lock_has_one_holder_whom_others_name(tmp_path):
    lock = tmp_path / ".x.lock"

    def refused() -> None:
        with pytest.raises(UserError) as caught:
            Lock(lock, "the target").acquire()
        message = str(caught.value)
        assert re.fullmatch(
            rf"the target: another process is writing it \(\S+, host \S+, pid {os.getppid()}, since [\d -]+[\d:]+\): "
            "wait for it or stop it, or name another place",
            message,
        ), message

    with Lock(lock, "the target") as held:
        assert in_child(refused) == 0
        # A second one in this process shares it, and its end does not end the first.
        with Lock(lock, "the target"):
            pass
        assert in_child(refused) == 0
        # A forked worker has no part in it: neither its release nor its end gives the lock away.
        assert in_child(held.release) == 0
        assert in_child(refused) == 0 and lock.exists()
    assert names(tmp_path) == []
    with Lock(lock, "the target"):
        pass
    with pytest.raises(CannotWrite, match=r"absent/a\.lock cannot be written"):
        Lock(tmp_path / "absent" / "a.lock", "it").acquire()


def test_a_killed_holder_frees_the_lock_though_its_workers_live(tmp_path):
    lock = tmp_path / ".x.lock"
    reading, writing = os.pipe()

    def holder() -> None:
        Lock(lock, "it").acquire()
        worker = os.fork()
        if worker == 0:  # Lives on until the test closes the pipe.
            os.close(writing)
            os.read(reading, 1)
            os._exit(0)
        die()

    assert in_child(holder) == -signal.SIGKILL and lock.exists()
    with Lock(lock, "it"):
        assert f"pid {os.getpid()}," in lock.read_text()
    os.close(writing)
    os.close(reading)
    assert names(tmp_path) == []


def test_those_who_wait_come_one_after_the_other(tmp_path):
    """Each adds one to a number by reading and writing it; a turn that is not alone would lose some."""
    counter, turns, processes = tmp_path / "count", 25, 4
    counter.write_text("0")

    def work() -> None:
        for _ in range(turns):
            with Lock(tmp_path / "lock", counter, wait=True):
                counter.write_text(str(int(counter.read_text()) + 1))

    children = []
    for _ in range(processes):
        child = os.fork()
        if child == 0:
            locks._POLL_SECONDS = 0.001
            try:
                work()
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * processes
    assert counter.read_text() == str(turns * processes) and names(tmp_path) == ["count"]


@pytest.fixture
def quick(monkeypatch):
    """A heart that beats in milliseconds."""
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(locks, "SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(locks, "_POLL_SECONDS", 0.01)


def beating(path: Path) -> Lock:
    return Lock(path, "the run", heartbeat=True)


def on_another_machine(monkeypatch) -> None:
    """As one that shares the folder, whose kernel knows nothing of the first one's locks."""
    monkeypatch.setattr(locks.socket, "gethostname", lambda: "other")
    monkeypatch.setattr(locks.fcntl, "lockf", lambda *_: None)
    locks._held.clear()


@pytest.mark.parametrize("where", ["another machine", "no locks"])
def test_a_living_holder_is_refused_where_the_kernel_does_not_know_it(tmp_path, monkeypatch, quick, where):
    path = tmp_path / ".lock"

    def second() -> None:
        if where == "another machine":
            on_another_machine(monkeypatch)
        else:
            monkeypatch.setattr(locks.fcntl, "lockf", failing(errno.ENOLCK))
            locks._held.clear()
        with pytest.raises(
            UserError, match=r"the run: another process is writing it \(.*, host .*, pid \d+, since"
        ) as caught:
            beating(path).acquire()
        assert "\n" not in str(caught.value)

    with beating(path) as first:
        assert in_child(second) == 0
        first.check()
    assert names(tmp_path) == []


def test_a_dead_holder_of_another_machine_is_taken_over_and_named(tmp_path, monkeypatch, quick, capsys):
    path = tmp_path / ".lock"
    assert in_child(lambda: (beating(path).acquire(), die())) == -signal.SIGKILL
    dead = path.read_text()
    # On its own machine the kernel knows at once.
    started = time.monotonic()
    with beating(path) as lock:
        assert not lock.taken_over and time.monotonic() - started < locks.SILENCE_SECONDS
    path.write_text(dead)
    on_another_machine(monkeypatch)
    with beating(path) as lock:
        assert lock.taken_over == dead and "host other, pid" in path.read_text()
    assert f"whether {dead} lives" in capsys.readouterr().err
    assert names(tmp_path) == []


def test_one_that_stood_still_finds_out_before_it_writes(tmp_path, monkeypatch, quick):
    path = tmp_path / ".lock"
    monkeypatch.setattr(locks, "BEAT_SECONDS", 100.0)
    with beating(path) as first:
        first.check()

        def second() -> None:
            on_another_machine(monkeypatch)
            beating(path).acquire()
            # And dies with the lock.
            die()

        assert in_child(second) == -signal.SIGKILL
        with pytest.raises(UserError, match=r"the run: .*host other, .*has taken it over from this process"):
            first.check()
        path.unlink()
        with pytest.raises(UserError, match="the run: a process that is done by now has taken it over"):
            first.check()
        path.write_text("another's, host other, pid 1, since now")
    # What is no longer its own it leaves there.
    assert "host other" in path.read_text()


def test_a_lock_that_is_not_held_has_nothing_to_check(tmp_path):
    beating(tmp_path / ".lock").check()
    assert names(tmp_path) == []
