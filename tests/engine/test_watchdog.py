"""A rank that stands still, is stopped, or fails ends the run in bounded time, with one line that names it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from convclip.engine import failures, watchdog
from convclip.engine.procfs import process
from convclip.engine.trainer import Trainer
from convclip.engine.watchdog import EXIT_CODE, Watchdog
from convclip.engine.whereabouts import Whereabouts
from tests.engine.small_run import arguments, make_files
from tests.engine.test_planned_stop import calling
from tests.processes import end_of_ranks

HOST = os.uname().nodename
FAST = ("batch.global=8", "max_steps=9", "log_every=1", "evaluation.every_epochs=0", "stop.watchdog_s=8")


def in_step(rank: int, work: Callable[[], Any]) -> None:
    """Do `work` on that rank before the third step."""
    if os.environ["RANK"] == str(rank):
        calling("_train_step", 2, work)


def stop_rank_1() -> None:
    in_step(1, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def stop_rank_0() -> None:
    in_step(0, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def kill_rank_1() -> None:
    in_step(1, lambda: os.kill(os.getpid(), signal.SIGKILL))


def sleep_on_rank_1() -> None:
    in_step(1, lambda: time.sleep(300))


def other_collectives() -> None:
    """Rank 1 takes part in a collective of another group than rank 0."""
    import torch
    import torch.distributed as dist

    def wait_alone() -> None:
        dist.broadcast(torch.zeros(1), 0, group=groups[0])

    plain, groups = Trainer._start, []

    def start(self: Trainer, *given: Any) -> None:
        groups.append(dist.new_group(backend="gloo"))
        plain(self, *given)

    Trainer._start = start
    in_step(1, wait_alone)


def fail_on_rank_1() -> None:
    def fail() -> None:
        from convclip.engine.meters import logger

        logger.warning("a warning of rank 1 alone")
        raise ValueError("a picture\nthat is none")

    in_step(1, fail)


def mistake_on_rank_1() -> None:
    def fail() -> None:
        from convclip.schema import UserError

        raise UserError("shard 7 is damaged: make it anew")

    in_step(1, fail)


def warn_alike() -> None:
    """A warning of all ranks, and one of rank 1 alone, in the last step."""
    from convclip.engine.meters import logger

    def warn() -> None:
        logger.warning("of all")
        if os.environ["RANK"] == "1":
            logger.warning("of one")

    calling("_train_step", 8, warn)


def work_on_rank_0() -> None:
    """Rank 0 is busy for longer than the watchdog waits, while rank 1 waits for it."""

    def work() -> None:
        until = time.monotonic() + 20
        while time.monotonic() < until:
            sum(range(10_000))

    in_step(0, work)


@pytest.fixture
def ends(tmp_path):
    files = make_files(tmp_path / "files")

    def run(prepare: Callable[[], None]) -> tuple[list[int], list[str], str]:
        words = arguments(files, tmp_path / "run", *(word for each in FAST for word in ("--set", each)))
        started = time.monotonic()
        ended = end_of_ranks("launch/train.py", *words, world=2, prepare=prepare)
        print(f"{prepare.__name__}: {time.monotonic() - started:.1f} s, {[rank.returncode for rank in ended]}")
        log = (tmp_path / "run" / "train.log").read_text()
        print(log[-600:], *(rank.stderr[-1500:] for rank in ended), sep="\n---\n")
        return [rank.returncode for rank in ended], [rank.stderr for rank in ended], log

    return run


CASES: dict[Callable[[], None], tuple[list[int], str]] = {
    stop_rank_1: ([EXIT_CODE, -9], "(its process is stopped), last heard of after step "),
    stop_rank_0: ([-9, EXIT_CODE], "(its process is stopped); with it the ranks' store"),
    sleep_on_rank_1: ([EXIT_CODE, EXIT_CODE], "at test_watchdog.<lambda>, line"),
    other_collectives: ([EXIT_CODE, EXIT_CODE], "in broadcast after step 2"),
    kill_rank_1: ([EXIT_CODE, -9], "ended without a word: killed"),
}


@pytest.mark.launch
@pytest.mark.parametrize(
    "prepare",
    [case if case is stop_rank_1 else pytest.param(case, marks=pytest.mark.full) for case in CASES],
    ids=lambda case: case.__name__,
)
def test_a_rank_that_is_waited_for_in_vain_ends_the_run(ends, prepare):
    codes, said, log = ends(prepare)
    expected, what = CASES[prepare]
    assert codes == expected
    lines = [line for text in said for line in text.splitlines() if line.startswith("convclip: ") and what in line]
    assert lines and lines[0].removeprefix("convclip: ") in log
    assert f"(host {HOST}, pid " in lines[0] and "Traceback" not in "".join(said)


@pytest.mark.launch
@pytest.mark.parametrize("prepare", [fail_on_rank_1, pytest.param(mistake_on_rank_1, marks=pytest.mark.full)])
def test_the_error_of_one_rank_is_one_line_of_rank_0(ends, prepare):
    codes, said, log = ends(prepare)
    is_mistake = prepare is mistake_on_rank_1
    what = "shard 7 is damaged: make it anew" if is_mistake else "ValueError: a picture that is none"
    line = f"rank 1 (host {HOST}) stopped after step 2: {what}"
    assert codes == ([2, 2] if is_mistake else [1, 1])
    assert said[0].splitlines()[-1] == f"convclip: {line}" and "Traceback" not in said[0]
    assert ("Traceback" in said[1]) is not is_mistake and log.splitlines()[-1].endswith(line)
    assert is_mistake or "rank 1: a warning of rank 1 alone" in log


@pytest.mark.full
@pytest.mark.launch
def test_progress_is_life(ends):
    codes, _, log = ends(work_on_rank_0)
    assert codes == [0, 0] and "done: 9 steps" in log


@pytest.mark.full
@pytest.mark.launch
def test_warnings_of_all_ranks_are_in_the_log_once(ends):
    codes, _, log = ends(warn_alike)
    assert codes == [0, 0]
    assert [line.split(" ", 1)[1] for line in log.splitlines() if " of " in line and "step" not in line][-2:] == [
        "of all",
        "rank 1: of one",
    ]


def watched(**beats: dict[str, Any]) -> tuple[Watchdog, Any]:
    """Rank 0's watchdog after a long time without a move, with what two other ranks say of themselves."""
    now = time.monotonic()
    own = process(os.getpid())
    places = [SimpleNamespace(host=host, pid=7, process=own) for host in ("one", "one", "two")]
    peers: Any = SimpleNamespace(
        rank=0, world=3, places=places, next=1, heard=now, next_moved=now, next_beat=b"", left=set(), beat={},
        listens_to_all=False, beats={0: {}, 1: beats["first"], 2: beats["second"]},
    )  # fmt: skip
    watch = Watchdog(peers, 20.0)
    watch.whereabouts = SimpleNamespace(place="here", collective="all_reduce", still=lambda: 21.0, look=lambda: None)
    return watch, peers


def beat(still: float, collective: str = "", place: str = "convclip.data.loader.epoch, line 3") -> dict[str, Any]:
    return {"step": 4, "still": still, "collective": collective, "place": place}


def test_who_is_named():
    watch, peers = watched(first=beat(30.0), second=beat(25.0, "all_reduce"))
    found = watch.look(4)
    assert found is not None and found.culprits == (1,) and peers.listens_to_all
    assert found.line == (
        "no rank has moved on for 21 s: rank 0 (host one, pid 7), rank 2 (host two, pid 7) in all_reduce after step 4; "
        "rank 1 (host one, pid 7) at convclip.data.loader.epoch, line 3 after step 4"
    )
    found = watched(first=beat(30.0, "broadcast"), second=beat(25.0, "all_reduce"))[0].look(4)
    assert found is not None and found.culprits == () and "rank 1 (host one, pid 7) in broadcast" in found.line
    # One of them works.
    assert watched(first=beat(3.0), second=beat(25.0, "all_reduce"))[0].look(4) is None


def test_a_rank_of_another_machine_is_silent(monkeypatch):
    watch, peers = watched(first=beat(0.0), second=beat(0.0))
    peers.next, peers.next_beat = 2, b'{"step": 3, "collective": "all_gather"}'
    now = time.monotonic()
    peers.next_moved, watch._since = now - 21, now - 100
    found = watch.look(4)
    assert found is not None and found.culprits == (2,)
    assert "rank 2 (host two, pid 7) has been silent for 21 s (stopped, dead or cut off)" in found.line
    assert found.line.endswith("last heard of after step 3 in all_gather")
    # This process was stopped itself, and has only now come back.
    watch._looked -= 60
    watch.whereabouts.forget = lambda: None
    assert watch.look(4) is None


def test_where_a_thread_stands_and_whether_it_moves(monkeypatch):
    here, seen = Whereabouts(), []
    # CPU seconds of the main thread, its switches, CPU seconds of what it started, of all its threads.
    used = [[0.0, 0, 0.0, 0.0]]
    monkeypatch.setattr(here, "_measure", lambda: tuple(used[-1]))

    def look() -> None:
        for work in (None, None, 0, 1, 2, 3, None):
            if work is not None:
                used.append([value + 1000 * (number == work) for number, value in enumerate(used[-1])])
            before = here._since
            here.look()
            seen.append(here._since != before)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    # At first it has just come there. Outside of a collective, work of other threads is none.
    assert seen == [True, False, True, True, True, False, False]
    assert here.place.startswith("threading.") and here.collective == ""


def test_what_a_broken_connection_looks_like():
    broken = [
        RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4321"),
        RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:3384, unhandled system error"),
        RuntimeError("Timed out waiting 1800000ms for recv operation to complete"),
    ]
    own = [RuntimeError("shape mismatch"), ValueError("connection closed by peer"), MemoryError()]
    assert all(map(failures.connection_broke, broken)) and not any(map(failures.connection_broke, own))


def test_a_kill_for_want_of_memory_is_told(monkeypatch):
    monkeypatch.setattr(watchdog, "memory_kills", lambda: 3)
    watch, _ = watched(first=beat(0.0), second=beat(0.0))
    assert watch.about_gone([1]) == "rank 1 (host one, pid 7) ended without a word: killed"
    monkeypatch.setattr(watchdog, "memory_kills", lambda: 4)
    assert watch.about_gone([1]).endswith("; the kernel has killed 1 of this machine's processes for want of memory")


def test_a_log_line_goes_only_where_a_log_is(tmp_path: Path):
    failures.write_log(tmp_path / "train.log", "lost")
    assert not list(tmp_path.iterdir())
    (tmp_path / "train.log").write_text("10:00:00 first\n")
    failures.write_log(tmp_path / "train.log", "second")
    assert (tmp_path / "train.log").read_text().splitlines()[1].endswith(" second")
