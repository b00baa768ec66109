"""The processes that started this one, up to its launcher: whether one of them is gone. By Linux's /proc; no torch."""

from __future__ import annotations

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
            now = process(then.pid)
            if now is None or now.born != then.born or now.state in "ZX":
                return f"{name or 'a process of the launcher'}, pid {then.pid},"
        return None
