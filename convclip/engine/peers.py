"""What the ranks of a run say to one another beside their collectives: over the process group's TCP store.

A call of a store whose machine is cut off, or whose process stands still, may not come back. So a thread of its own
makes the calls, and nobody waits for it: what it last learned, and when, is there to read.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

from convclip.distributed import gather_objects, rank, world_size
from convclip.engine.procfs import Process, process

BEAT_SECONDS = 1.0
# Rank 0 may hold the store: it leaves when the others know, or after so long.
PARTING_SECONDS = 5.0
# Each time others of a process have names of their own in the store.
_opened = itertools.count()


@dataclass(frozen=True)
class Ending:
    """Why all ranks end: one `line`, the exit `code`, the rank that it is said `by`, and those that are to be killed
    where they do not end themselves. A run that was stopped before its first step is `planned`."""

    line: str
    code: int
    by: int
    culprits: tuple[int, ...] = ()
    planned: bool = False


class Place(NamedTuple):
    """Where a rank is."""

    host: str
    pid: int
    process: Process | None


class Peers:
    """The other ranks, while open. A world of one has none, and says everything to itself.

    `beat` is what this rank says of itself each second. `ending` is why all ranks end now, once one has said so.
    `heard` is when the store last answered, and `next_moved` when the beat of `next`, the rank that this one listens
    to, last did, from `next_beat`; with `listens_to_all`, `beats` has what all say. Times are of `time.monotonic()`.
    """

    def __init__(self, on_lines: Callable[[list[str]], None] = lambda lines: None) -> None:
        """A collective: all ranks open it, in their main threads. Rank 0's gets the warnings of the others."""
        self.rank, self.world = rank(), world_size()
        own = Place(socket.gethostname(), os.getpid(), process(os.getpid()))
        self.places: list[Place] = gather_objects(own)
        self.next = (self.rank + 1) % self.world
        self.beat: dict[str, Any] = {}
        self.beats: dict[int, dict[str, Any]] = {}
        self.listens_to_all = False
        self.left: set[int] = set()
        self.ending: Ending | None = None
        self.heard = self.next_moved = time.monotonic()
        self.next_beat, self._on_lines = b"", on_lines
        self._wanted: Ending | None = None
        self._lines: list[tuple[float, str]] = []
        self._taken = 0
        self._prefix = f"convclip/{next(_opened)}"
        self._wake, self._closed, self._lock = threading.Event(), threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)
        if self.world > 1:
            self._thread.start()

    def end_all(self, ending: Ending) -> None:
        """Ask all ranks, this one too, to end now; the first to ask is heard."""
        if self.world == 1:
            self.ending = ending
        self._wanted = ending
        self._wake.set()

    def warn(self, line: str) -> None:
        """Give rank 0 a warning for its log, a moment later: by then it has said what all ranks say alike."""
        with self._lock:
            self._lines.append((time.monotonic(), line))

    def flush(self) -> None:
        """Wait until rank 0 can have the warnings of this rank; on rank 0, until it has those that are there."""
        done = threading.Event()
        self._flushed = done
        self._wake.set()
        if self._thread.is_alive():
            done.wait(PARTING_SECONDS)

    def close(self) -> None:
        """Leave, after a run that went well."""
        self._closed.set()
        self._wake.set()
        if self._thread.is_alive():
            # It may be in a call that does not return; it ends with the process then.
            self._thread.join(2 * BEAT_SECONDS)

    def name(self, number: int) -> str:
        """`rank 3 (host h)`."""
        return f"rank {number} (host {self.places[number].host})"

    _flushed: threading.Event | None = None

    def _run(self) -> None:
        store: dist.Store | None = None
        while True:
            closes, flushed = self._closed.is_set(), self._flushed
            try:
                store = store or dist.PrefixStore(self._prefix, _connect())
                self._exchange(store)
                self.heard = time.monotonic()
                if closes:
                    store.set(f"left/{self.rank}", "")
                if flushed is not None:
                    self._flushed = None
                    flushed.set()
            except (RuntimeError, ValueError):  # torch's DistError is the first; a torn beat
                store = None
            if closes:
                return
            self._wake.wait(BEAT_SECONDS)
            self._wake.clear()

    def _exchange(self, store: dist.Store) -> None:
        store.set(f"beat/{self.rank}", json.dumps({**self.beat, "number": time.monotonic()}))
        self._listen(store)
        self._pass_lines(store)
        if self._wanted is not None and not store.check(["end"]):
            store.set("end", json.dumps(asdict(self._wanted)))
        if self.ending is None and store.check(["end"]):
            ending = Ending(**json.loads(store.get("end")))
            store.add("parted", 1)
            deadline = time.monotonic() + PARTING_SECONDS
            while self.rank == 0 and store.add("parted", 0) < self.world and time.monotonic() < deadline:
                time.sleep(0.05)
            self._pass_lines(store)
            self.ending = ending

    def _listen(self, store: dist.Store) -> None:
        key = f"beat/{self.next}"
        beat = store.get(key) if store.check([key]) else b""
        now = time.monotonic()
        if beat != self.next_beat:
            self.next_beat, self.next_moved = beat, now
        for number in range(self.world):
            # Of the others on this machine, one may be seen to be gone.
            is_near = number == self.next or self.places[number].host == self.places[self.rank].host
            if is_near and number not in self.left and store.check([f"left/{number}"]):
                self.left.add(number)
        if self.listens_to_all:
            keys = [f"beat/{number}" for number in range(self.world)]
            if store.check(keys):
                self.beats = {number: json.loads(value) for number, value in enumerate(store.multi_get(keys))}

    def _pass_lines(self, store: dist.Store) -> None:
        """Warnings from the other ranks to rank 0."""
        until = time.monotonic() - BEAT_SECONDS
        if self._flushed is not None or self._wanted is not None or self.ending is not None or self._closed.is_set():
            until = float("inf")
        with self._lock:
            lines = [line for since, line in self._lines if since <= until]
            self._lines = self._lines[len(lines) :]
        for line in lines:
            store.set(f"line/{store.add('lines', 1)}", json.dumps([self.rank, line]))
        if self.rank == 0:
            count = store.add("lines", 0)
            keys = [f"line/{number}" for number in range(self._taken + 1, count + 1)]
            # A number is given out before its line is there.
            if keys and store.check(keys):
                self._taken = count
                self._on_lines(_merged([json.loads(store.get(key)) for key in keys]))


def _merged(said: list[tuple[int, str]]) -> list[str]:
    """`rank 3: …`, and `ranks 1, 2: …` for what several say."""
    by_line: dict[str, list[int]] = {}
    for number, line in said:
        by_line.setdefault(line, []).append(number)
    return [
        f"rank{'s' if len(set(numbers)) > 1 else ''} {', '.join(map(str, sorted(set(numbers))))}: {line}"
        for line, numbers in by_line.items()
    ]


def _connect() -> dist.Store:
    """A connection of its own: the process group's is blocked while the main thread waits in it."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10), wait_for_workers=False)
