"""What Linux says of processes: this one, those above it up to its launcher, those below it. No torch.

Where there is no /proc, nothing is known, and nothing follows from that.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

# By their names in a command line: a shell that somebody closes is none, and `nohup python launch/train.py` goes on.
LAUNCHERS = {
    *("deepspeed", "deepspeed.pt", "deepspeed.launcher.runner", "deepspeed.launcher.launch"),
    *("torchrun", "torch.distributed.run", "torch.distributed.launch", "accelerate"),
    *("srun", "slurmstepd", "mpirun", "mpiexec", "mpiexec.hydra", "hydra_pmi_proxy", "orted", "prted", "prterun"),
}
# `python -u -m deepspeed.launcher.launch …`: after it come arguments, which may be called anything.
_WORDS = 4


@dataclass(frozen=True)
class Process:
    """A process: `state` is R, S, D, T (stopped), Z (dead, not yet waited for) …; `ticks` of CPU time it used, and when
    it was `born`, in ticks since the machine started."""

    pid: int
    parent: int
    state: str
    ticks: int
    born: int

    @property
    def launcher(self) -> str | None:
        """Its name, where it is a launcher."""
        try:
            words = Path(f"/proc/{self.pid}/cmdline").read_bytes().split(b"\0")[:_WORDS]
        except OSError:
            return None
        # slurmstepd's reads `slurmstepd: [12.0]`.
        names = [word.decode("utf-8", "replace").rpartition("/")[2].partition(":")[0] for word in words]
        return next((name for name in names if name in LAUNCHERS), None)


def process(pid: int) -> Process | None:
    """That process as it is now; None where there is none, or no /proc."""
    try:
        values = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        return Process(pid, int(values[1]), values[0], int(values[11]) + int(values[12]), int(values[19]))
    except (OSError, ValueError, IndexError):
        return None


def started_at() -> float:
    """When this process started, in seconds of `time.time()`."""
    own = process(os.getpid())
    if own is None:
        return time.time()
    up = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - up + own.born / os.sysconf("SC_CLK_TCK")


def is_gone(then: Process) -> bool:
    """Whether that process has ended since."""
    now = process(then.pid)
    return now is None or now.born != then.born or now.state in "ZX"


def descendants(pid: int) -> list[int]:
    """The processes that `pid` started, and those that they started."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            children = (task / "children").read_text().split()
            found += [int(child) for child in children]
            found += [below for child in children for below in descendants(int(child))]
    return found


def cpu_seconds(*pids: int) -> float:
    """CPU time that these processes have used."""
    found = [each.ticks for each in map(process, pids) if each is not None]
    return sum(found) / os.sysconf("SC_CLK_TCK")


def thread_activity(thread: int) -> tuple[float, int]:
    """CPU seconds of a thread of this process, and how often it was switched to: a thread that waits for one thing, for
    however long, is not, and one that looks again and again is."""
    try:
        folder = Path(f"/proc/self/task/{thread}")
        values = (folder / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        lines = (folder / "status").read_text("utf-8", "replace").splitlines()
    except OSError:
        return 0.0, 0
    switches = sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)
    return (int(values[11]) + int(values[12])) / os.sysconf("SC_CLK_TCK"), switches


def memory_kills() -> int:
    """How many processes of this one's control group (cgroup v2) were killed for want of memory; 0 where unknown."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        groups = Path("/proc/self/cgroup").read_text().splitlines()
        place = next(line[3:] for line in groups if line.startswith("0::"))
        events = Path(f"/sys/fs/cgroup{place}/memory.events").read_text().splitlines()
        return int(next(line.split()[1] for line in events if line.startswith("oom_kill ")))
    return 0


class Launchers:
    """The launchers above this process, and what stands between: this rank, `launch.py`, the `deepspeed` runner."""

    def __init__(self) -> None:
        above: list[tuple[Process, str | None]] = []
        found = process(os.getppid())
        while found is not None and found.pid > 1:
            above.append((found, found.launcher))
            found = process(found.parent)
        last = max((number for number, (_, name) in enumerate(above) if name), default=-1)
        self._above = above[: last + 1]

    def gone(self) -> str | None:
        """Name and number of one that is no more; None while all of them live, or where there are none."""
        for then, name in self._above:
            if is_gone(then):
                return f"{name or 'a process of the launcher'}, pid {then.pid},"
        return None
