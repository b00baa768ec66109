"""Every state that a kill can leave a run's folder in, recorded from one run that nothing stops.

A process that is killed leaves what it has asked the kernel to write. So the folder as it is right before a file
operation is what a kill before that operation leaves, and one run gives all of them.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.engine.outcome import contents

# What Python says of itself when it changes files; a rename over a file is os.rename too.
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_recorders: list[Recorder] = []


def copy_standing(folder: Path, place: Path) -> None:
    """Copy a run's folder while another rank may be writing into it: what is renamed meanwhile is left out."""
    place.mkdir(parents=True)
    for path in sorted(folder.rglob("*")):
        target = place / path.relative_to(folder)
        try:
            if path.is_dir():
                target.mkdir(parents=True, exist_ok=True)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, target)
        except FileNotFoundError:
            continue


class Recorder:
    """Copies `folder` to `into`/000, 001, … before each operation in it; one of equal copies is kept.

    `operations` counts all of them, `points` has (copy, the operation that did not happen any more).
    """

    def __init__(self, folder: Path, into: Path) -> None:
        self.folder, self.into = folder, into
        self.operations = 0
        self.points: list[tuple[Path, str]] = []
        self._seen: set[Any] = set()
        self._busy = False

    def before(self, operation: str, path: Any, torn: tuple[str, bytes] | None = None) -> None:
        """Take down the folder; with `torn`, a file of it (its place) ends in these bytes."""
        inside = isinstance(path, str | Path) and Path(path).is_relative_to(self.folder)
        # Of TensorBoard's files and the printed log nothing is read back.
        if not inside or "tensorboard" in str(path) or str(path).endswith("train.log") or self._busy:
            return
        if threading.current_thread() is not threading.main_thread():
            return
        self._busy = True
        self.operations += torn is None
        place = self.into / f"{len(self.points):03d}"
        copy_standing(self.folder, place)
        if torn is not None:
            with open(place / torn[0], "ab") as file:
                file.write(torn[1])
        content = tuple(sorted((name, data) for name, data in contents(place).items()))
        if content in self._seen:
            shutil.rmtree(place)
        else:
            self._seen.add(content)
            self.points.append((place, f"{operation} {Path(path).relative_to(self.folder)}"))
        self._busy = False


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Within it, file operations of this process are recorded, half-written lines and tensors too."""
    from convclip.models import checkpoint_files

    if not _recorders:
        sys.addaudithook(_heard)
    _recorders[:] = [recorder]
    write, fsync, save_file = os.write, os.fsync, checkpoint_files.save_file

    def recorded_write(file: int, data: bytes) -> int:
        path = os.readlink(f"/proc/self/fd/{file}")
        recorder.before("write", path)
        if Path(path).is_relative_to(recorder.folder):
            torn = (str(Path(path).relative_to(recorder.folder)), bytes(data[: len(data) // 2]))
            recorder.before("half a write", path, torn)
        return write(file, data)

    def recorded_fsync(file: int) -> None:
        recorder.before("fsync", os.readlink(f"/proc/self/fd/{file}"))
        fsync(file)

    def recorded_save(tensors: Any, path: Path, metadata: Any) -> None:
        recorder.before("save_file", path)
        if not Path(path).is_relative_to(recorder.folder):
            save_file(tensors, path, metadata=metadata)
            return
        recorder._busy = True
        save_file(tensors, path, metadata=metadata)
        data = Path(path).read_bytes()
        os.truncate(path, len(data) // 2)
        recorder._busy = False
        recorder.before("half of save_file", path)
        recorder._busy = True
        Path(path).write_bytes(data)
        recorder._busy = False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", recorded_write)
        patch.setattr(os, "fsync", recorded_fsync)
        patch.setattr(checkpoint_files, "save_file", recorded_save)
        try:
            yield
        finally:
            _recorders[:] = [_off]


def _heard(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES:
        _recorders[0].before("open", arguments[0])
    elif event in CHANGES:
        _recorders[0].before(event, arguments[0])


class _Off(Recorder):
    """An audit hook cannot be taken away again."""

    def __init__(self) -> None:
        self._busy = True

    def before(self, operation: str, path: Any, torn: tuple[str, bytes] | None = None) -> None:
        """Nothing."""


_off = _Off()
