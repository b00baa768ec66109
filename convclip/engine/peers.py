"""What the ranks of a run say to one another beside their collectives: over the process group's TCP store.

A call of a store whose machine is cut off, or whose process stands still, may not come back. So a thread of its own
makes the calls, and nobody waits for it: what it last learned, and when, is there to read.
"""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time
from datetime import timedelta

import torch.distributed as dist

from convclip.distributed import gather_objects, rank, world_size

BEAT_SECONDS = 1.0
# Rank 0 may hold the store: it leaves when the others know, or after so long.
_PARTING_SECONDS = 5.0
# Each time others of a process have names of their own in the store.
_opened = itertools.count()


class Peers:
    """The other ranks, while open. A world of one has none, and says everything to itself."""

    def __init__(self) -> None:
        """A collective: all ranks open it, in their main threads."""
        self.rank, self.world = rank(), world_size()
        self._prefix = f"convclip/{next(_opened)}"
        self.places: list[tuple[str, int]] = gather_objects((socket.gethostname(), os.getpid()))
        # Why all ranks end now, once one has said so.
        self.end: str | None = None
        self._end_wanted: str | None = None
        self._wake, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        if self.world > 1:
            self._thread.start()

    def end_all(self, why: str) -> None:
        """Ask all ranks, this one too, to end now: each finds `why` in `end`."""
        if self.world == 1:
            self.end = why
        self._end_wanted = why
        self._wake.set()

    def close(self) -> None:
        """Say nothing more."""
        self._closed.set()
        self._wake.set()
        if self._thread.is_alive():
            # It may be in a call that does not return; it ends with the process then.
            self._thread.join(2 * BEAT_SECONDS)

    def name(self, number: int) -> str:
        """`rank 3 (host h)`."""
        return f"rank {number} (host {self.places[number][0]})"

    def _run(self) -> None:
        store: dist.Store | None = None
        while not self._closed.is_set():
            try:
                store = store or dist.PrefixStore(self._prefix, _connect())
                self._beat(store)
            except RuntimeError:  # torch's DistError too
                store = None
            self._wake.wait(BEAT_SECONDS)
            self._wake.clear()

    def _beat(self, store: dist.Store) -> None:
        if self._end_wanted is not None and not store.check(["end"]):
            store.set("end", self._end_wanted)
        if self.end is None and store.check(["end"]):
            why = store.get("end").decode()
            store.add("parted", 1)
            deadline = time.monotonic() + _PARTING_SECONDS
            while self.rank == 0 and store.add("parted", 0) < self.world and time.monotonic() < deadline:
                time.sleep(0.05)
            self.end = why


def _connect() -> dist.Store:
    """A connection of its own: the process group's is blocked while the main thread waits in it."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10), wait_for_workers=False)
    return store
