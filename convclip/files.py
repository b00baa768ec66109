"""Files that appear whole or not at all, rows that are appended, locks between processes, checksums. Imports no torch.

A file is written beside its target as `<name>.<host>-<pid>-<n>.part`, synced, and only then given its name: a kill, an
error or a full disk leaves what was there before. No two writers share a temporary. What a killed writer of this
machine left is removed by the next writer of the same file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import os
import re
import shutil
import socket
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from convclip.schema import UserError

# Some network file systems cannot sync a folder, and some have no locks.
_NOT_OFFERED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
_POLL_SECONDS = 0.05
_HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"
_numbers = itertools.count()
# Temporaries that this process is writing, and (process, lock file) that it holds; the process, as forks copy both.
_being_written: set[Path] = set()
_held: set[tuple[int, str]] = set()


class CannotWrite(UserError):
    """A file or folder could not be written: no permission, a full disk, a folder where a file should be."""


@contextlib.contextmanager
def writing(path: str | Path, flag: str = "") -> Iterator[None]:
    """An OSError inside becomes a CannotWrite that names `flag`, the user's way to say `path`, and `path`."""
    try:
        yield
    except OSError as error:
        raise CannotWrite(f"{flag} {path} cannot be written: {error.strerror or error}".lstrip()) from None


@contextlib.contextmanager
def whole_file(path: str | Path, flag: str = "") -> Iterator[Path]:
    """Yields a path to write; at the end, what is there is synced and renamed to `path`, over what `path` was.

    On any exception the temporary is removed and `path` stays as it was. Errors: CannotWrite for an OSError, in the
    body too; `flag` (such as `--plot`) is named in it.
    """
    path = Path(path)
    with writing(path, flag), _temporary(path) as part:
        yield part
        publish(part, path)


@contextlib.contextmanager
def whole_folder(path: str | Path, flag: str = "") -> Iterator[Path]:
    """Yields an empty folder to fill; at the end, it is synced and renamed to `path`, which is absent or empty.

    On any exception it is removed. Errors: CannotWrite as for `whole_file`. Parents of `path` are made.
    """
    # `..` and a slash at the end have no name to put a temporary beside.
    path = Path(os.path.abspath(path))
    with writing(path, flag), _temporary(path) as part:
        # What a killed writer of convclip 0.1.0 left.
        shutil.rmtree(path.with_name(path.name + ".part"), ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        for folder, _, names in os.walk(part):
            for name in names:
                _sync(Path(folder, name))
            _sync(Path(folder))
        publish(part, path)


def publish(temporary: Path, path: Path) -> None:
    """Rename a written file, or a folder of synced files, to its final name, once its content is on the disk."""
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder if it is there; under another name first, so that nobody finds a part of it."""
    away = path.with_name(path.name + ".old.part")
    shutil.rmtree(away, ignore_errors=True)
    if path.exists():
        os.replace(path, away)
        shutil.rmtree(away, ignore_errors=True)


def write_text(path: str | Path, text: str, flag: str = "") -> None:
    """Write a small UTF-8 file whole or not at all. Errors: CannotWrite."""
    with whole_file(path, flag) as part:
        part.write_text(text, encoding="utf-8")


def append_line(path: str | Path, text: str) -> None:
    """Append one line; once this returns, a kill does not lose it. Errors: CannotWrite, and then no part of it stays.

    A kill while it is written leaves at most a torn last line, which the next line does not continue.
    """
    data = (text.rstrip("\n") + "\n").encode("utf-8")
    with writing(path):
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            before = os.fstat(file).st_size
            if before and os.pread(file, 1, before - 1) != b"\n":
                data = b"\n" + data
            try:
                while data:
                    data = data[os.write(file, data) :]
            except OSError:
                os.ftruncate(file, before)
                raise
        finally:
            os.close(file)


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; the file is read piece by piece."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


class Lock:
    """At most one process writes `target` at a time: whoever holds the lock file `path`. A context manager.

    The lock is the kernel's, so it ends with the process, however that ends, and forked workers do not keep it. The
    file says who holds it (program, host, process, since); it is removed at the end, and one that a killed process
    left does no harm. A second Lock in the same process is let in. Where the file system has no locks, all are.

    Errors: UserError in one line where another process holds it, unless `wait`; CannotWrite for a folder that cannot
    be written.
    """

    def __init__(self, path: str | Path, target: str | Path, wait: bool = False) -> None:
        self.path, self.target, self.wait = Path(path), target, wait
        self._file: int | None = None
        self._key: tuple[int, str] | None = None

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
        with contextlib.suppress(OSError):  # On a full disk the lock holds without a name on it.
            os.ftruncate(file, 0)
            os.write(file, f"{program}, host {socket.gethostname()}, pid {os.getpid()}, since {since}".encode())
        self._file, self._key = file, key
        _held.add(key)
        return self

    def release(self) -> None:
        """Give the lock back; nothing where it is not held, as in a forked process."""
        if self._file is None or self._key is None or self._key[0] != os.getpid():
            return
        with contextlib.suppress(OSError):
            # Before the lock is let go: later, it might be the next one's.
            if _is_at(self._file, self.path):
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
        try:
            # Not flock: worker processes forked from this one would hold that lock on after its death.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NOT_OFFERED:
                return file
            holder = os.pread(file, 1000, 0).decode("utf-8", "replace")
            os.close(file)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            if self.wait:
                return None
            raise UserError(
                f"{self.target}: another process is writing it{f' ({holder})' if holder else ''}: "
                "wait for it or stop it, or name another place"
            ) from None
        # Who held it before may have removed the file between our opening and our locking it.
        if _is_at(file, self.path):
            return file
        os.close(file)
        return None


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A name beside `path` that no other writer uses; what is there after an exception is removed."""
    part = path.with_name(f"{path.name}.{_HOST}-{os.getpid()}-{next(_numbers)}.part")
    _remove_leftovers(path)
    _being_written.add(part)
    try:
        yield part
    except BaseException:
        _remove(part)
        raise
    finally:
        _being_written.discard(part)


def _remove_leftovers(path: Path) -> None:
    """Remove the temporaries of `path` whose process, one of this machine, lives no more."""
    pattern = re.compile(rf"{re.escape(path.name)}\.{_HOST}-(\d+)-\d+\.part")
    try:
        names = os.listdir(path.parent)
    except OSError:  # Writing will say what is wrong with the folder.
        return
    for name in names:
        found = pattern.fullmatch(name)
        if found and path.with_name(name) not in _being_written and not _lives(int(found[1])):
            _remove(path.with_name(name))


def _lives(process: int) -> bool:
    """Whether another process of that number runs here. This one's own temporaries are in `_being_written`."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _remove(part: Path) -> None:
    """Remove a file or a folder as far as that is possible: the error that led here is the one to report."""
    if part.is_dir():
        shutil.rmtree(part, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            part.unlink()


def _is_at(file: int, path: Path) -> bool:
    """Whether `path` is the open file."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_OFFERED or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
