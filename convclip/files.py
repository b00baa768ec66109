"""Files that appear whole or not at all, rows that are appended, checksums. Imports no torch.

A file is written beside its target as `<name>.<host>-<pid>-<n>.part`, synced, and only then given its name: a kill, an
error or a full disk leaves what was there before. No two writers share a temporary. What a killed writer of this
machine left is removed by the next writer of the same file.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import re
import shutil
import socket
import zlib
from collections.abc import Iterator
from pathlib import Path

from convclip.schema import UserError

# Some network file systems cannot sync a folder, and some have no locks.
NOT_OFFERED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
_HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"
_numbers = itertools.count()
# Temporaries that this process is writing.
_being_written: set[Path] = set()


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


def _sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_OFFERED or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
