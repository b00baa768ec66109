"""Whole-or-nothing files and appended rows: against kills, full disks and other processes."""

import errno
import hashlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from convclip import files, locks
from convclip.files import CannotWrite, append_line, sha256_of, whole_file, whole_folder, write_text
from convclip.locks import Lock

REPOSITORY = Path(__file__).parent.parent
# Where a file is renamed or synced by hand, and why.
BY_HAND = {
    "convclip/files.py": {"os.replace(", "os.fsync("},
    "convclip/locks.py": {"fcntl.lockf("},
    # Rows of a part that is resumed: each commit syncs them before the bytes that call them done.
    "convclip/features/writer.py": {"os.fsync("},
}


def in_child(work) -> int:
    """Run `work` in a forked process; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def failing(number: int):
    """A system call that fails with this errno."""

    def call(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def half_then_die(path: Path) -> None:
    with whole_file(path) as part:
        part.write_text("half")
        die()


def test_nothing_is_renamed_or_synced_by_hand():
    found = {}
    for folder in ("convclip", "tools", "launch"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            calls = re.findall(
                r"os\.(?:replace|rename|renames|fsync|fdatasync)\(|fcntl\.(?:lockf|flock)\(|FileLock\(",
                path.read_text(encoding="utf-8"),
            )
            if calls:
                found[str(path.relative_to(REPOSITORY))] = set(calls)
    assert found == BY_HAND


def test_files_imports_no_torch():
    code = "import sys, convclip.locks; sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'filelock')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


def test_a_file_appears_at_the_end_and_is_synced_before_its_name(tmp_path, monkeypatch):
    calls = []
    replace, sync = os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("sync"), sync(file)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    path = tmp_path / "a.txt"
    with whole_file(str(path)) as part:
        part.write_text("new")
        assert not path.exists() and part.parent == tmp_path
    assert path.read_text() == "new" and names(tmp_path) == ["a.txt"]
    assert calls == ["sync", "replace", "sync"]
    write_text(path, "é\n")
    assert path.read_bytes() == "é\n".encode()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError(errno.ENOSPC, "No space left on device")])
def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    expected = CannotWrite if isinstance(error, OSError) else error
    with pytest.raises(expected) as caught, whole_file(path, "--plot") as part:
        part.write_text("half")
        raise error
    if expected is CannotWrite:
        assert str(caught.value) == f"--plot {path} cannot be written: No space left on device"
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_full_at_the_sync_or_the_rename_is_one_line(tmp_path, monkeypatch, call):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    monkeypatch.setattr(os, call, failing(errno.ENOSPC))
    with pytest.raises(CannotWrite, match=f"^{path} cannot be written: No space left on device$"):
        write_text(path, "new")
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for place in ("folder", "file/a", "absent/a", "n" * 300):
        with pytest.raises(CannotWrite, match=re.escape(f"{tmp_path / place} cannot be written: ")):
            write_text(tmp_path / place, "text")
    assert names(tmp_path) == ["file", "folder"] and not names(tmp_path / "folder")
    (tmp_path / "folder" / "a").write_text("mine")
    for place in ("folder", "file"):
        with pytest.raises(CannotWrite, match=place), whole_folder(tmp_path / place) as part:
            (part / "b").write_text("")
    assert names(tmp_path) == ["file", "folder"] and names(tmp_path / "folder") == ["a"]


@pytest.mark.parametrize("place", ["body", "fsync", "replace"])
def test_a_kill_leaves_the_old_file_and_the_next_writer_cleans_up(tmp_path, place):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def work() -> None:
        if place == "body":
            half_then_die(path)
        setattr(os, place, die)
        write_text(path, "new")

    assert in_child(work) == -signal.SIGKILL
    assert path.read_text() == "old" and len(names(tmp_path)) == 2
    # Of another file, of another machine, and not of ours: no business of this writer's.
    others = ["b.txt.00000000-1-0.part", "a.txt.part", f"b.txt.{files._HOST}-1-0.part"]
    for name in others:
        (tmp_path / name).write_text("")
    write_text(path, "new")
    assert path.read_text() == "new" and names(tmp_path) == sorted(["a.txt", *others])


def test_writers_of_one_file_do_not_share_a_temporary(tmp_path):
    path = tmp_path / "a.txt"
    with whole_file(path) as first, whole_file(path) as second:
        first.write_text("first")
        second.write_text("second")
        # Another process neither takes nor removes what this one is writing.
        assert in_child(lambda: write_text(path, "third")) == 0
        assert path.read_text() == "third" and first != second
        assert (first.read_text(), second.read_text()) == ("first", "second")
    assert path.read_text() == "first" and names(tmp_path) == ["a.txt"]


def test_a_folder_appears_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target = tmp_path / "deep" / "out"
    (tmp_path / "deep" / "out.part").mkdir(parents=True)  # convclip 0.1.0's leftover
    for error in (KeyboardInterrupt, OSError):
        with pytest.raises((KeyboardInterrupt, CannotWrite)), whole_folder("deep/out/") as part:
            (part / "a").write_text("half")
            raise error
        assert names(target.parent) == []

    def killed() -> None:
        with whole_folder(target) as part:
            (part / "a").write_text("half")
            die()

    assert in_child(killed) == -signal.SIGKILL and not target.exists()
    synced = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.readlink(f"/proc/self/fd/{file}")), sync(file)))
    target.mkdir()  # An empty folder of the user's is no obstacle.
    with whole_folder(target) as part:
        (part / "sub").mkdir()
        (part / "sub" / "a").write_text("whole")
    assert (target / "sub" / "a").read_text() == "whole" and names(target.parent) == ["out"]
    if sys.platform == "linux":
        assert {Path(path).name for path in synced} >= {"a", "sub", part.name, "deep"}


def test_appended_rows(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    assert in_child(lambda: (append_line(path, "one"), append_line(path, "twö\n"), die())) == -signal.SIGKILL
    assert path.read_text() == "one\ntwö\n"
    path.write_text(path.read_text() + '{"torn')
    append_line(path, "three")
    assert path.read_text().splitlines() == ["one", "twö", '{"torn', "three"]
    before = path.read_bytes()
    write, calls = os.write, []

    def fills_up(file: int, data: bytes) -> int:
        calls.append(data)
        if len(calls) > 1:
            failing(errno.ENOSPC)()
        return write(file, data[:2])

    monkeypatch.setattr(os, "write", fills_up)
    with pytest.raises(CannotWrite, match=f"^{path} cannot be written: No space left on device$"):
        append_line(path, "four")
    monkeypatch.undo()
    assert len(calls) == 2 and path.read_bytes() == before


def test_sha256(tmp_path):
    data = os.urandom(3 * 2**20 + 17)
    (tmp_path / "weights").write_bytes(data)
    assert sha256_of(str(tmp_path / "weights")) == hashlib.sha256(data).hexdigest()


def test_a_file_system_without_locks_or_synced_folders_does_not_stop_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(locks.fcntl, "lockf", failing(errno.ENOLCK))
    with Lock(tmp_path / "lock", "it"):
        pass
    sync = os.fsync

    def files_only(file: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{file}"):
            failing(errno.EINVAL)()
        sync(file)

    monkeypatch.setattr(os, "fsync", files_only)
    write_text(tmp_path / "a", "text")
    assert names(tmp_path) == ["a"]
