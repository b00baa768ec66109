"""One writer at a time: a lock between processes, on one machine or several. Imports no torch.

The kernel's lock decides where there is one, and ends with the process, however that ends. It is not enough where a
file system has no locks, or keeps them on one machine: there the lock file's time, renewed while its holder lives,
tells a holder from what a dead one left.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import sys
import threading
import time
from pathlib import Path

from convclip.files import NOT_OFFERED, writing
from convclip.schema import UserError

_POLL_SECONDS = 0.05
# A holder renews its file's time so often; one whose file has stood still for SILENCE_SECONDS is dead.
BEAT_SECONDS = 3.0
SILENCE_SECONDS = 15.0
# (process, lock file) that this process holds; the process, as forks copy this.
_held: set[tuple[int, str]] = set()


class Lock:
    """At most one process writes `target` at a time: whoever holds the lock file `path`. A context manager.

    Forked workers do not keep it. The file says who holds it (program, host, process, since); it is removed at the
    end, and one that a killed process left does no harm. A second Lock in the same process is let in.

    Without `heartbeat`, for short work, all are let in where the file system has no locks. With it, a file that names
    another machine's process, or any where there are no locks, is watched first: renewed, it is refused; else it is
    taken over, and `taken_over` says from whom.

    Errors: UserError in one line where another process holds it, unless `wait`; CannotWrite for a folder that cannot
    be written.
    """

    def __init__(self, path: str | Path, target: str | Path, wait: bool = False, heartbeat: bool = False) -> None:
        self.path, self.target, self.wait, self.heartbeat = Path(path), target, wait, heartbeat
        self.taken_over = ""
        self._file: int | None = None
        self._key: tuple[int, str] | None = None
        self._name = ""
        self._ended = threading.Event()

    def acquire(self) -> Lock:
        """Take the lock."""
        key = (os.getpid(), os.path.realpath(self.path))
        # The kernel would drop the process's lock when any second handle of the file is closed.
        if key in _held:
            return self
        with writing(self.path):
            while (file := self._try()) is None:
                time.sleep(_POLL_SECONDS)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        program = Path(sys.argv[0]).stem or "python"
        self._name = f"{program}, {_host()} pid {os.getpid()}, since {since}"
        with contextlib.suppress(OSError):  # On a full disk the lock holds without a name on it.
            os.ftruncate(file, 0)
            os.write(file, self._name.encode())
        self._file, self._key = file, key
        _held.add(key)
        if self.heartbeat:
            self._ended.clear()
            threading.Thread(target=self._beat, args=(file,), daemon=True).start()
        return self

    def check(self) -> None:
        """UserError where another process has taken the lock over, as it may from one that stood still for long."""
        if self._file is None:
            return
        try:
            holder = self.path.read_text("utf-8", "replace")
        except FileNotFoundError:
            holder = "a process that is done by now"
        except OSError:
            holder = ""
        if holder not in (self._name, ""):
            raise UserError(f"{self.target}: {holder} has taken it over from this process: stopping before a write")

    def release(self) -> None:
        """Give the lock back; nothing where it is not held, as in a forked process."""
        if self._file is None or self._key is None or self._key[0] != os.getpid():
            return
        self._ended.set()
        with contextlib.suppress(OSError):
            # Before the lock is let go: later, it might be the next one's.
            if _is_at(self._file, self.path) and self._holder(self._file) == self._name:
                self.path.unlink()
        os.close(self._file)
        _held.discard(self._key)
        self._file = self._key = None

    def __enter__(self) -> Lock:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _try(self) -> int | None:
        """The open, locked file; None where it has to be tried again."""
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        offered = True
        try:
            # Not flock: worker processes forked from this one would hold that lock on after its death.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            offered = error.errno not in NOT_OFFERED
            holder = self._holder(file)
            if offered:
                os.close(file)
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                if self.wait:
                    return None
                raise self._refusal(holder) from None
        # Who held it before may have removed the file between our opening and our locking it.
        if not _is_at(file, self.path):
            os.close(file)
            return None
        holder = self._holder(file)
        if self.heartbeat and holder and not (offered and f" {_host()} " in holder):
            try:
                self._watch(file, holder)
            except BaseException:
                os.close(file)
                raise
            self.taken_over = holder
        return file

    def _watch(self, file: int, holder: str) -> None:
        """Return once the file's holder is known to be dead. Errors: UserError: it lives."""
        print(f"{self.target}: looking for {SILENCE_SECONDS:.0f} s whether {holder} lives", file=sys.stderr, flush=True)
        seen, until = self._time(), time.monotonic() + SILENCE_SECONDS
        while time.monotonic() < until:
            time.sleep(_POLL_SECONDS)
            # Its end removes the file; a new one is another's.
            if self._time() != seen or self._holder(file) != holder:
                raise self._refusal(holder)

    def _time(self) -> int | None:
        """When the file at `path` was renewed, in ns; None where there is none."""
        try:
            return os.stat(self.path).st_mtime_ns
        except OSError:
            return None

    def _beat(self, file: int) -> None:
        """Renew the file's time until the lock is released."""
        while not self._ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(file)

    def _refusal(self, holder: str) -> UserError:
        return UserError(
            f"{self.target}: another process is writing it{f' ({holder})' if holder else ''}: "
            "wait for it or stop it, or name another place"
        )

    @staticmethod
    def _holder(file: int) -> str:
        """What the holder wrote into its file."""
        return os.pread(file, 1000, 0).decode("utf-8", "replace")


def _host() -> str:
    return f"host {socket.gethostname()},"


def _is_at(file: int, path: Path) -> bool:
    """Whether `path` is the open file."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False
