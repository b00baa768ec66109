"""Sees to it that a process of a run ends when it should: at a signal, with its launcher, with the other ranks.

A thread of its own does, as the main one may wait in a collective, where Python runs no handler. The first signal asks:
the training loop stops where `PlannedStop` says so; before the first step there is nothing to save, and all ranks end.
A second one ends this process at once. A rank that fails tells the others why, and rank 0's log has that line.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import select
import signal
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Literal, NoReturn

from convclip.engine.failures import connection_broke, describe, say, write_log
from convclip.engine.meters import WARNINGS, logger
from convclip.engine.peers import Ending, Peers
from convclip.engine.procfs import Launchers, is_gone, started_at
from convclip.engine.watchdog import EXIT_CODE, Watchdog
from convclip.schema import StopConfig, UserError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Ctrl-C reaches the ranks from the terminal, and as SIGTERM or SIGINT from the launcher: one wish, not two.
SAME_WISH_SECONDS = 5.0
# From when its launcher is gone, for a process to end by itself; also from when it has failed.
ALONE_SECONDS = 30.0
# For a rank to fail by itself before it is ended for another's failure, and for that one's line to arrive.
OWN_END_SECONDS, LINE_SECONDS = 3.0, 10.0
_POLL_SECONDS = 0.5


class Guard:
    """Watches over one process of a run, from `with` to the end of it; `stop` is the recipe's section.

    `wish` says why the run should stop, once something asks for it. `phase` is the run's: a planned stop is possible
    while it is `train`. `step` is how many steps are done.
    """

    def __init__(self, stop: StopConfig, folder: Path | None = None, stops: bool = True) -> None:
        """A collective, in the main thread. `folder` is the run's; without `stops` signals mean what they always do."""
        self.stop, self.folder, self.stops = stop, folder, stops
        self.peers = Peers(self._lines_of_others)
        self.watchdog = Watchdog(self.peers, stop.watchdog_s)
        self.wish: str | None = None
        self.phase: Literal["start", "train", "end", "failed"] = "start"
        self.step = 0
        self.deadline = time_limit(stop)
        self._asked: float | None = None
        self._alone: float | None = None
        self._launchers = Launchers()
        self._closed, self._ending_since = threading.Event(), 0.0
        self._reading, self._writing = socket.socketpair()
        self._writing.setblocking(False)

    def __enter__(self) -> Guard:
        """From the main thread. The handlers stay: a launcher may repeat a signal to a process that is ending."""
        if self.stops:
            signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
            for number in SIGNALS:
                signal.signal(number, _nothing)
        WARNINGS.listener = self.peers.warn if self.peers.rank else None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and self.peers.world > 1:
            self._fail(error)
            # The thread goes on: it ends a process that hangs on its way out.
            self.peers.close()
            return
        self.phase = "end"
        self._closed.set()
        # To wake the thread; no signal has this number.
        self._writing.send(b"\0")
        self._thread.join(2 * _POLL_SECONDS)
        self.peers.close()
        WARNINGS.listener = None

    def pass_warnings(self) -> None:
        """Bring the warnings of the other ranks into rank 0's log; to be called by all, with a barrier between."""
        self.peers.flush()

    def _run(self) -> None:
        looked = 0.0
        while not self._closed.is_set():
            ready, _, _ = select.select([self._reading], [], [], _POLL_SECONDS)
            for number in os.read(self._reading.fileno(), 100) if ready else b"":
                if number in SIGNALS:
                    self._signal(signal.Signals(number))
            now = time.monotonic()
            if self.stops:
                self._look_up(now)
                if self.phase == "start" and time.time() > self.deadline:
                    self._ask("its time limit")
            if self.peers.ending is not None:
                self._obey(self.peers.ending, now)
            elif self.peers.world > 1 and now - looked > 2 * _POLL_SECONDS and self.phase != "failed":
                looked = now
                ending = self.watchdog.look(self.step)
                if ending is not None:
                    self._end_all(ending)

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

    def _look_up(self, now: float) -> None:
        """A launcher that is gone asks too, and does not wait for long."""
        if self._alone is None:
            gone = self._launchers.gone()
            if gone is None:
                return
            self._alone = now
            self._ask(f"its launcher's end ({gone} is gone)")
        elif now - self._alone > ALONE_SECONDS:
            end(1, f"the launcher is gone, and the run did not come to its end in {ALONE_SECONDS:g} s: stopped at once")

    def _ask(self, why: str) -> None:
        if self.wish is not None or self.phase in ("end", "failed"):
            return
        self.wish = f"{why} at {self.peers.name(self.peers.rank)}"
        if self.phase == "start":
            line = f"stopped by {self.wish}, before the first step: nothing to save; the same command starts again"
            self.peers.end_all(Ending(line, self.stop.exit_code, self.peers.rank, planned=True))

    def _end_all(self, ending: Ending) -> None:
        """By the store; where that does not answer, each rank comes to the same end by itself."""
        self.peers.end_all(ending)
        self._await_ending(LINE_SECONDS)
        self.peers.ending = self.peers.ending or ending
        self._obey(self.peers.ending, time.monotonic())

    def _obey(self, ending: Ending, now: float) -> None:
        """Come to the end that another rank, or this one, has called for."""
        peers = self.peers
        if self.phase == "failed":
            if now - self._ending_since > ALONE_SECONDS:
                end(ending.code)
            return
        self._ending_since = self._ending_since or now
        if not ending.planned and not ending.culprits and now - self._ending_since < OWN_END_SECONDS:
            # Another rank has raised an error. So may this one, for the same reason.
            return
        if peers.rank not in ending.culprits:
            self._kill(ending.culprits)
        self._end_by(ending, self.phase != "start")

    def _kill(self, culprits: tuple[int, ...]) -> None:
        """Those of this machine that do not end by themselves, as their threads do where they can."""
        until = time.monotonic() + OWN_END_SECONDS
        for number, there in self.watchdog.near():
            while number in culprits and not is_gone(there) and time.monotonic() < until:
                time.sleep(_POLL_SECONDS / 5)
            if number in culprits and not is_gone(there):
                with contextlib.suppress(OSError):
                    os.kill(there.pid, signal.SIGKILL)

    def _end_by(self, ending: Ending, has_log: bool) -> NoReturn:
        """End this process, with the line on stderr once for each machine, and in train.log by the first rank."""
        near = [self.peers.rank, *(number for number, _ in self.watchdog.near())]
        speaker = min(set(near) - set(ending.culprits), default=min(near))
        is_speaker = self.peers.rank == speaker
        if is_speaker and has_log and (speaker == 0 or 0 in ending.culprits):
            self._record(ending.line)
        end(ending.code, ending.line if is_speaker else None)

    def _fail(self, error: BaseException) -> None:
        """The main thread is leaving with an error: say so to the others; does not return where it is not its own."""
        peers, self._ending_since = self.peers, time.monotonic()
        trained = self.phase != "start"
        self.phase = "failed"
        if connection_broke(error):
            self._await_ending(LINE_SECONDS, until_gone=OWN_END_SECONDS)
            if peers.ending is None:
                gone = self.watchdog.gone_ranks()
                line = self.watchdog.about_gone(gone) if gone else describe(peers.name(peers.rank), self.step, error)
                ending = Ending(line, EXIT_CODE, peers.rank, tuple(gone))
                peers.end_all(ending)
                self._await_ending(OWN_END_SECONDS)
                peers.ending = peers.ending or ending
            self._end_by(peers.ending, trained)
        code = 2 if isinstance(error, UserError) else 1
        ending = Ending(describe(peers.name(peers.rank), self.step, error), code, peers.rank)
        peers.end_all(ending)
        self._await_ending(LINE_SECONDS)
        if peers.rank == 0 and trained:
            self._record((peers.ending or ending).line)

    def _await_ending(self, seconds: float, until_gone: float = float("inf")) -> None:
        """Wait until a rank has said why all end; once a rank of this machine is gone, no longer than `until_gone`."""
        started = time.monotonic()
        while self.peers.ending is None and (waited := time.monotonic() - started) < seconds:
            if waited > until_gone and self.watchdog.gone_ranks():
                return
            time.sleep(_POLL_SECONDS / 5)

    def _record(self, line: str) -> None:
        """A line of train.log, of a run that has begun: before that, the folder may be another run's."""
        if self.folder is not None:
            write_log(self.folder / "train.log", line)

    def _lines_of_others(self, lines: list[str]) -> None:
        for line in lines:
            if line.partition(": ")[2] not in WARNINGS.said:
                logger.warning(line)


def time_limit(stop: StopConfig) -> float:
    """When the run has to be over, in seconds of `time.time()`: the recipe's, else Slurm's, else never."""
    if stop.time_limit_minutes is not None:
        return started_at() + 60 * stop.time_limit_minutes
    with contextlib.suppress(ValueError):
        return float(os.environ.get("SLURM_JOB_END_TIME", ""))
    return float("inf")


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
