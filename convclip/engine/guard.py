"""Sees to it that a run's process ends when it should: at a signal, when its launcher is gone. A thread of its own.

A signal is noted at once, even while the main thread waits in a collective: Python's own handlers would only run after
it. The first one asks: the training loop stops where `PlannedStop` says so; before the first step there is nothing to
save, and all ranks end. A second one ends this process at once.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import select
import signal
import socket
import sys
import threading
import time
from types import TracebackType
from typing import Literal, NoReturn

from convclip.engine.launched_by import Launchers, started_at
from convclip.engine.peers import Peers
from convclip.schema import StopConfig

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Ctrl-C reaches the ranks from the terminal, and as SIGTERM or SIGINT from the launcher: one wish, not two.
SAME_WISH_SECONDS = 5.0
# From when its launcher is gone, for a process to end by itself.
ALONE_SECONDS = 30.0
_POLL_SECONDS = 0.5


class Guard:
    """Watches over one process of a run, from `with` to the end of it; `stop` is the recipe's section.

    `wish` says why the run should stop, once something asks for it. `phase` is the run's: a planned stop is possible
    while it is `train`.
    """

    def __init__(self, stop: StopConfig) -> None:
        self.stop, self.peers = stop, Peers()
        self.wish: str | None = None
        self.phase: Literal["start", "train", "end"] = "start"
        self.deadline = time_limit(stop)
        self._asked: float | None = None
        self._alone: float | None = None
        self._launchers = Launchers()
        self._closed = threading.Event()

    def __enter__(self) -> Guard:
        """From the main thread. The handlers stay: a launcher may repeat a signal to a process that is ending."""
        self._reading, self._writing = socket.socketpair()
        self._writing.setblocking(False)
        signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, _nothing)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.phase = "end"
        self._closed.set()
        # To wake the thread; no signal has this number.
        self._writing.send(b"\0")
        self._thread.join(2 * _POLL_SECONDS)
        self.peers.close()

    def _run(self) -> None:
        while not self._closed.is_set():
            ready, _, _ = select.select([self._reading], [], [], _POLL_SECONDS)
            for number in os.read(self._reading.fileno(), 100) if ready else b"":
                if number in SIGNALS:
                    self._signal(signal.Signals(number))
            self._look_up()
            if self.phase == "start" and self.wish is None and time.time() > self.deadline:
                self._ask("its time limit")
            if self.peers.end is not None:
                self._end_before_training(self.peers.end)

    def _signal(self, number: signal.Signals) -> None:
        """A first signal asks, a second one does not wait. SIGUSR1 is a warning only: Slurm sends SIGTERM after it."""
        now, before = time.monotonic(), self._asked
        if number != signal.SIGUSR1:
            self._asked = now if before is None else before
            if before is not None and now - before > SAME_WISH_SECONDS:
                end(128 + number, f"{number.name} again: stopped at once, without a checkpoint")
        if self.wish is None and self.phase == "train" and self.peers.rank == 0:
            say(
                f"{number.name}: stopping after this step, with a checkpoint; the same again, "
                f"{SAME_WISH_SECONDS:g} s from now or later, stops at once"
            )
        self._ask(number.name)

    def _look_up(self) -> None:
        """A launcher that is gone asks too, and does not wait for long."""
        now = time.monotonic()
        if self._alone is None:
            gone = self._launchers.gone()
            if gone is None:
                return
            self._alone = now
            self._ask(f"its launcher's end ({gone} is gone)")
        elif now - self._alone > ALONE_SECONDS:
            end(1, f"the launcher is gone, and the run did not come to its end in {ALONE_SECONDS:g} s: stopped at once")

    def _ask(self, why: str) -> None:
        if self.wish is not None or self.phase == "end":
            return
        self.wish = f"{why} at {self.peers.name(self.peers.rank)}"
        if self.phase == "start":
            self.peers.end_all(self.wish)

    def _end_before_training(self, why: str) -> None:
        code = self.stop.exit_code
        line = f"stopped by {why}, before the first step: nothing to save; the same command starts again"
        end(code, line if self.peers.rank == 0 else None)


def time_limit(stop: StopConfig) -> float:
    """When the run has to be over, in seconds of `time.time()`: the recipe's, else Slurm's, else never."""
    if stop.time_limit_minutes is not None:
        return started_at() + 60 * stop.time_limit_minutes
    with contextlib.suppress(ValueError):
        return float(os.environ.get("SLURM_JOB_END_TIME", ""))
    return float("inf")


def say(line: str) -> None:
    """A line on stderr, past all locks and buffers."""
    with contextlib.suppress(OSError):
        sys.stderr.flush()
        os.write(2, f"convclip: {line}\n".encode())


def end(code: int, line: str | None = None) -> NoReturn:
    """End this process and its data workers now, whatever its main thread does."""
    if line is not None:
        say(line)
    for child in multiprocessing.active_children():
        with contextlib.suppress(OSError):
            child.kill()
    os._exit(code)


def _nothing(*_: object) -> None:
    """A handler must be there for the wake-up; the thread does the rest."""
