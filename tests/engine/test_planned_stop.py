"""A run that is asked to stop: all ranks after one step, with a checkpoint, and on to the same weights to the bit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from convclip.engine import guard as guards
from convclip.engine.guard import Guard, time_limit
from convclip.engine.planned_stop import PlannedStop, how_to_go_on
from convclip.engine.trainer import Trainer
from convclip.schema import StopConfig
from tests.conftest import REPOSITORY
from tests.engine.outcome import differences, outcome
from tests.engine.small_run import arguments, make_files, train_here
from tests.processes import end_of_ranks, launch, run_ranks
from tests.video import small_video

# Seven steps, three an epoch, with events and evaluations at steps 3 and 6.
SMALL = ("batch.global=8", "max_steps=7", "checkpoint.keep_last=1", "optim.ema_decay=0.6")
VIDEO_PLACES = {"in a step": ("_train_step", 0, 2), "in an evaluation": ("_figures", 4, 4)}
VIDEO = ("max_steps=7", "checkpoint.keep_last=1")
# Where a signal comes, and the steps done then. What a rank knows before a step, all know after it.
PLACES: dict[str, tuple[str, int, int]] = {
    "in a step": ("_train_step", 0, 2),
    "before an event": ("_open_due", 3, 5),
    "in an evaluation": ("_figures", 3, 3),
    "in a save": ("_save", 3, 4),
}


def calling(name: str, step: int, work: Callable[[], None]) -> Callable[[], None]:
    """From now on the trainer's method `name` does `work` first where `step` steps are done; call it to undo that."""
    plain = getattr(Trainer, name)

    def method(self: Trainer, *given: Any, **named: Any) -> Any:
        if self.state.step == step:
            work()
        return plain(self, *given, **named)

    setattr(Trainer, name, method)
    return lambda: setattr(Trainer, name, plain)


def ask(guard: Guard, number: signal.Signals) -> None:
    """Send this process a signal, and wait until the guard has noted it."""
    os.kill(os.getpid(), number)
    while guard.wish is None:
        time.sleep(0.01)


def stop_everywhere(files: str, folder: str, stage: int, places: list[str]) -> dict[str, Any]:
    """{place: what differs of a run that was stopped there and resumed}; a signal reaches the last rank only."""

    def train(output: Path, resume: str = "never", guard: Guard | None = None) -> dict[str, Any]:
        return train_here(files, str(output), stage, SMALL, resume, guard)

    return stop_and_resume(train, Path(folder), {place: PLACES[place] for place in places})


def stop_videos(files: str, folder: str) -> dict[str, Any]:
    """As `stop_everywhere`, of video runs."""

    def train(output: Path, resume: str = "never", guard: Guard | None = None) -> dict[str, Any]:
        return small_video.train_here(files, str(output), VIDEO, 1, resume, guard)

    return stop_and_resume(train, Path(folder), VIDEO_PLACES)


def stop_and_resume(train: Callable[..., dict[str, Any]], folder: Path, places: dict[str, Any]) -> dict[str, Any]:
    """`train(folder, resume, guard)` whole, and stopped at each of the places and resumed: what differs."""
    from convclip.distributed import on_main, rank, world_size

    whole, run, found = folder / "whole", folder / "run", {}
    train(whole)
    for place, (name, step, stopped_at) in places.items():
        on_main(lambda: shutil.rmtree(run, ignore_errors=True))
        with Guard(StopConfig()) as guard:
            undo = calling(name, step, lambda g=guard: ask(g, signal.SIGUSR1) if rank() == world_size() - 1 else None)
            summary = train(run, guard=guard)
            undo()
        host, last = os.uname().nodename, world_size() - 1
        assert summary["stopped"] == f"SIGUSR1 at rank {last} (host {host})"
        assert summary["steps"] == stopped_at, place
        assert on_main(lambda: (run / "latest").read_text()) == f"checkpoints/step-{stopped_at:08d}\n"
        # A guard changes nothing of a run that nobody asks to stop.
        with Guard(StopConfig()) as guard:
            summary = train(run, "auto", guard)
        assert "stopped" not in summary
        found[place] = on_main(lambda: differences(outcome(whole), outcome(run)))
    return found


@pytest.mark.launch
@pytest.mark.parametrize(
    ("world", "stage", "places"),
    [
        (2, 1, ["in a step", "in an evaluation"]),
        (1, 0, ["in an evaluation"]),
        pytest.param(2, 3, list(PLACES), marks=pytest.mark.full),
        pytest.param(1, 2, list(PLACES), marks=pytest.mark.full),
    ],
)
def test_a_stopped_run_goes_on_to_the_bit(tmp_path, world, stage, places):
    found = run_ranks(world, stop_everywhere, str(make_files(tmp_path / "files")), str(tmp_path), stage, places)
    assert found == {place: [] for place in places}


@pytest.mark.full
@pytest.mark.launch
def test_a_stopped_video_run_goes_on_to_the_bit(tmp_path):
    run_ranks(1, small_video.with_stores, tmp_path)
    assert run_ranks(2, stop_videos, str(tmp_path), str(tmp_path)) == {place: [] for place in VIDEO_PLACES}


def interrupt_and_terminate() -> None:
    """Ctrl-C as it reaches a rank under the deepspeed launcher, in the second step of rank 0."""

    def both() -> None:
        if os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)

    calling("_train_step", 1, both)


def terminate_twice() -> None:
    """A second signal some time after the first, in a step that does not end."""

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(100)

    guards.SAME_WISH_SECONDS = 0.2
    calling("_train_step", 1, twice)


def terminate_before_training() -> None:
    """While rank 1 makes its model; rank 0 then waits for it."""
    from convclip.engine.task import ImageTextTask

    plain = ImageTextTask.initial_model

    def initial_model(self: ImageTextTask) -> Any:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(100)
        return plain(self)

    ImageTextTask.initial_model = initial_model


@pytest.mark.launch
def test_exit_codes_and_lines(tmp_path):
    files = make_files(tmp_path / "files")

    def ends(name: str, prepare: Callable[[], None], world: int, *more: str) -> list[subprocess.CompletedProcess]:
        words = arguments(files, tmp_path / name, *(word for each in SMALL for word in ("--set", each)), *more)
        return end_of_ranks("launch/train.py", *words, world=world, prepare=prepare)

    ended = ends("asked", interrupt_and_terminate, 2, "--set", "stop.exit_code=85", "--resume", "auto")
    assert [rank.returncode for rank in ended] == [85, 85], ended[0].stderr
    assert "convclip: SIGINT: stopping after this step, with a checkpoint; the same again, 5 s" in ended[0].stderr
    line = next(line for line in ended[0].stdout.splitlines() if "stopped at step" in line)
    said = f"stopped at step 3 of 7 by SIGINT at rank 0 (host {os.uname().nodename}); the checkpoint of step 3 goes on"
    assert said in line and line.endswith("--resume auto") and line.count("--resume") == 1
    assert line in (tmp_path / "asked" / "train.log").read_text()
    assert (tmp_path / "asked" / "checkpoints" / "step-00000003" / "state.json").is_file()

    (ended,) = ends("twice", terminate_twice, 1)
    assert ended.returncode == 128 + signal.SIGTERM, ended.stderr
    assert ended.stderr.splitlines()[-1].endswith("SIGTERM again: stopped at once, without a checkpoint")
    assert "Traceback" not in ended.stderr

    ended = ends("before", terminate_before_training, 2)
    assert [rank.returncode for rank in ended] == [0, 0]
    said = f"convclip: stopped by SIGTERM at rank 1 (host {os.uname().nodename}), before the first step"
    assert [said in rank.stderr for rank in ended] == [True, False]


def test_a_time_limit_leaves_time_for_the_checkpoint(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    guard = SimpleNamespace(phase="start", wish=None, deadline=1100.0)
    stop, steps = PlannedStop(guard), 0
    while not stop.due():
        # The fifth step saves.
        now[0] += 20.0 if steps == 5 else 2.0
        steps += 1
    # Twice the longest step, and a twentieth of the time: from 1055 on, which is known before a step, then one more.
    assert now[0] < 1100 - 20 and 1055 <= now[0] <= 1060 and stop.why == "its time limit"


def test_slurm_says_when_its_job_ends(monkeypatch):
    assert time_limit(StopConfig()) == float("inf")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1700000000")
    assert time_limit(StopConfig()) == 1700000000.0
    # Of the process's age, which is that of the tests here.
    assert time.time() - 3600 * 24 < time_limit(StopConfig(time_limit_minutes=1.0)) <= time.time() + 60


@pytest.mark.parametrize(("name", "is_seen"), [("torchrun", True), ("shell.py", False)])
def test_a_launcher_that_is_gone_is_noticed_and_a_shell_is_not(tmp_path, name, is_seen):
    child = (
        "import time\nfrom convclip.engine.procfs import Launchers\nabove = Launchers()\n"
        "print(above.gone(), flush=True)\n"
        "end = time.time() + (60 if LAUNCHER else 0.3)\n"
        "while above.gone() is None and time.time() < end: time.sleep(0.02)\nprint(above.gone(), flush=True)"
    ).replace("LAUNCHER", str(is_seen))
    script = tmp_path / name
    script.write_text(f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])\n")
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert parent.stdout is not None
    before = parent.stdout.readline()
    parent.kill()
    assert (before, parent.stdout.readline()) == ("None\n", f"{name}, pid {parent.pid},\n" if is_seen else "None\n")
    parent.wait()
    parent.stdout.close()


def test_a_run_whose_launcher_is_gone_is_ended_after_a_while(monkeypatch):
    ended: list[Any] = []
    monkeypatch.setattr(guards, "end", lambda *said: ended.append(said))
    guard = Guard(StopConfig())
    guard.phase = "train"
    monkeypatch.setattr(guard._launchers, "gone", lambda: "deepspeed, pid 7,")
    guard._look_up(time.monotonic())
    assert guard.wish is not None and guard.wish.startswith("its launcher's end (deepspeed, pid 7, is gone) at rank 0")
    guard._look_up(time.monotonic())
    assert not ended
    monkeypatch.setattr(guards, "ALONE_SECONDS", 0.0)
    guard._look_up(time.monotonic())
    assert [code for code, _ in ended] == [1] and "the launcher is gone" in ended[0][1]


def test_a_warning_of_slurm_is_no_first_of_two_signals(monkeypatch):
    ended: list[Any] = []
    monkeypatch.setattr(guards, "end", lambda *said: ended.append(said))
    monkeypatch.setattr(guards, "SAME_WISH_SECONDS", 0.0)
    guard = Guard(StopConfig())
    guard.phase = "train"
    guard._signal(signal.SIGUSR1)
    guard._signal(signal.SIGUSR1)
    guard._signal(signal.SIGTERM)
    assert not ended and guard.wish is not None and guard.wish.startswith("SIGUSR1")
    guard._signal(signal.SIGINT)
    assert ended == [(130, "SIGINT again: stopped at once, without a checkpoint")]


def test_the_command_that_goes_on(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["launch/train.py", "--local_rank=1", "--resume", "never", "--recipe", "my demo"])
    assert how_to_go_on() == "launch/train.py --recipe 'my demo' --resume auto"
    monkeypatch.setattr(sys, "argv", ["launch/train.py", "--resume=auto", "--recipe", "demo"])
    assert how_to_go_on() == "launch/train.py --recipe demo --resume auto"


def to_runner(number: signal.Signals) -> Callable[[subprocess.Popen], None]:
    return lambda runner: runner.send_signal(number)


def to_group(runner: subprocess.Popen) -> None:
    os.killpg(runner.pid, signal.SIGINT)


@pytest.mark.full
@pytest.mark.launch
@pytest.mark.parametrize(
    "stop",
    [to_runner(signal.SIGKILL), to_runner(signal.SIGTERM), to_group],
    ids=["runner killed", "runner terminated", "Ctrl-C"],
)
def test_under_the_real_launcher(tmp_path, stop):
    files, run = make_files(tmp_path / "files"), tmp_path / "run"
    more = ("--set", "epochs=100000", "--set", "checkpoint.every_epochs=0", "--set", "evaluation.every_epochs=0")
    command = launch(2, "launch/train.py", *arguments(files, run, *more, "--set", "data.workers=1"))
    with (tmp_path / "said").open("w") as said:
        runner = subprocess.Popen(command, cwd=REPOSITORY, stdout=said, stderr=said, start_new_session=True)
        while "step 20/" not in (tmp_path / "said").read_text():
            assert runner.poll() is None, (tmp_path / "said").read_text()
            time.sleep(0.1)
        stop(runner)
        asked = time.monotonic()
        runner.wait()
        while (left := run_of(run)) and time.monotonic() < asked + 100:
            time.sleep(0.1)
    print(f"all ended after {time.monotonic() - asked:.1f} s")
    text = (tmp_path / "said").read_text()
    assert not left, text
    line = next(line for line in text.splitlines() if "stopped at step" in line)
    assert (run / "latest").read_text() in f"checkpoints/step-{int(line.split()[4]):08d}\n"
    assert "DataLoader worker" not in text and "again: stopped at once" not in text


def run_of(folder: Path) -> list[int]:
    """Processes with that folder on their command line, but for those that are dead."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder).encode() in (path / "cmdline").read_bytes():
                found.append(int(path.name))
        except OSError:
            continue
    return found
