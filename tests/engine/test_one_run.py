"""One run, one folder: a second one is refused on all ranks; one that was taken over stops before it saves."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from convclip.schema import UserError
from tests.engine.small_run import make_files, train_here
from tests.processes import run_ranks

pytestmark = pytest.mark.launch

SMALL = ("batch.global=8", "max_steps=3", "checkpoint.every_steps=2")


def hold(folder: Path) -> int:
    """The number of a process that holds the lock of the run in `folder`."""
    from convclip.locks import Lock

    folder.mkdir(parents=True)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        Lock(folder / ".lock", folder, heartbeat=True).acquire()
        os.write(writing, b"1")
        signal.pause()
    os.read(reading, 1)
    return child


def refused(files: str, run: Path, overrides: tuple[str, ...] = SMALL) -> list[str]:
    """What each rank says of a run that is not let in."""
    from convclip.distributed import gather_objects

    with pytest.raises(UserError) as caught:
        train_here(files, str(run), 1, overrides)
    return gather_objects(str(caught.value))


def runs(files: str, folder: str) -> dict[str, Any]:
    from convclip.distributed import gather_objects, is_main, on_main
    from convclip.engine.trainer import Trainer

    run, found = Path(folder, "run"), {}
    child = on_main(lambda: hold(run))
    found["held"], found["files"] = refused(files, run), sorted(path.name for path in run.iterdir())
    if is_main():
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    # What a killed run of this machine left is no obstacle.
    found["steps"] = train_here(files, str(run), 1, SMALL)["steps"]
    found["released"] = not (run / ".lock").exists()

    plain, taken = Trainer._train_step, Path(folder, "taken")

    def train_step(self: Trainer, *arguments: Any) -> Any:
        if is_main() and self.state.step == 1:
            (taken / ".lock").write_text("train, host other, pid 7, since now")
        return plain(self, *arguments)

    Trainer._train_step = train_step
    try:
        found["taken"] = refused(files, taken)
    finally:
        Trainer._train_step = plain
    found["saved"] = gather_objects([path.name for path in taken.glob("checkpoints/step-*")])
    return found


def test_a_folder_has_one_run_at_a_time(tmp_path):
    found = run_ranks(2, runs, str(make_files(tmp_path / "files")), str(tmp_path))
    assert len(found["held"]) == 2 and found["held"][0] == found["held"][1]
    held = found["held"][0]
    assert f"--output_dir {tmp_path}/run: another process is writing it (" in held and ", pid " in held
    assert "\n" not in held and found["files"] == [".lock"]
    assert found["steps"] == 3 and found["released"]
    assert all("host other, pid 7, since now has taken it over" in said for said in found["taken"])
    assert found["saved"] == [[], []]
