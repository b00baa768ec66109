"""Show what this machine can train with, and what stands in the way; with a hostfile, what several machines can.

    python tools/doctor.py
    python tools/doctor.py --hostfile HOSTFILE --shared FOLDER

Prints one table: Python, packages against the versions tested together, compiler, devices and precisions, memory, disk,
two processes talking. With `--hostfile` (deepspeed's: lines of `name slots=8`), of the hosts in it: whether ssh reaches
them, code and versions, whether all see FOLDER, where runs are to be written, clocks, and an all-reduce of 100 MB.
Each problem is one line that says what to do; the exit code is 1 when there is any.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
GIB = 1024**3
# Below these a demo, let alone COCO, does not run well: bytes of free disk, of free memory, of shared memory.
LEAST_DISK, LEAST_MEMORY, LEAST_SHARED = 10 * GIB, 4 * GIB, GIB // 2
REINSTALL = "pip install --constraint constraints.txt --editable '.[test,video,report]'"


@dataclass
class Findings:
    """Rows of the table (what, value) and the problems met on the way."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, what: str, value: str, problem: str | None = None) -> None:
        """One row; `problem` says what is wrong with it and what to do."""
        self.rows.append((what, value))
        if problem:
            self.problems.append(problem)


def main(arguments: list[str] | None = None) -> int:
    """Print the table and the problems; 0 when there is none, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hostfile", type=Path, help="the hosts of a run, as deepspeed takes them")
    parser.add_argument(
        "--shared", type=Path, default=Path(), help="a folder that all hosts should see (default: here)"
    )
    given = parser.parse_args(arguments)
    findings = Findings()
    if given.hostfile is not None:
        from convclip.engine.zero.hosts import look_at_hosts, read_hostfile

        try:
            hosts = read_hostfile(given.hostfile)
        except (OSError, ValueError) as error:
            print(f"doctor: --hostfile {given.hostfile}: {error}", file=sys.stderr)
            return 2
        look_at_hosts(findings.add, hosts, given.shared)
    else:
        look_at_python(findings)
        look_at_packages(findings, REPOSITORY / "constraints.txt")
        look_at_compiler(findings)
        look_at_devices(findings)
        look_at_memory_and_disk(findings, Path.cwd())
        look_at_two_processes(findings)
    width = max(len(what) for what, _ in findings.rows)
    for what, value in findings.rows:
        print(f"{what:{width}}  {value}")
    for problem in findings.problems:
        print(f"problem: {problem}")
    print(f"{len(findings.problems)} problem{'' if len(findings.problems) == 1 else 's'} found")
    return 1 if findings.problems else 0


def look_at_python(findings: Findings) -> None:
    """Version, machine and cores."""
    findings.add("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    findings.add("cores", str(cores))


def look_at_packages(findings: Findings, constraints: Path) -> None:
    """Installed versions of what `constraints` pins; another version than the tested one is shown, not a problem."""
    for line in constraints.read_text().splitlines():
        name, pinned, tested = line.split("#")[0].split(";")[0].strip().partition("==")
        if not pinned:
            continue
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            findings.add(name, "not installed", f"{name} is not installed: {REINSTALL}")
            continue
        # torch calls itself 2.15.0+cpu where it was built for one kind of device.
        findings.add(name, found if found.split("+")[0] == tested else f"{found} (tested with {tested})")


def look_at_compiler(findings: Findings) -> None:
    """What DeepSpeed needs to build its extension on first use: compiler, Python's headers, ninja on the PATH."""
    compiler = os.environ.get("CXX", "c++")
    found = shutil.which(compiler)
    findings.add(
        "C++ compiler",
        found or "none",
        None if found else f"no C++ compiler {compiler!r}: install one (Debian: apt install g++), or set CXX to yours",
    )
    headers = Path(sysconfig.get_path("include"), "Python.h")
    findings.add(
        "Python headers",
        str(headers) if headers.is_file() else "none",
        None if headers.is_file() else f"{headers} is missing: install them (Debian: apt install python3-dev)",
    )
    ninja = shutil.which("ninja")
    folder = Path(sys.executable).parent
    findings.add(
        "ninja on PATH",
        ninja or "none",
        None if ninja else f"ninja is not on the PATH: activate the environment (source {folder}/activate)",
    )


def look_at_devices(findings: Findings) -> None:
    """Devices and precisions, as DeepSpeed's accelerator reports them."""
    try:
        from convclip.engine.zero.accelerator import find_devices
    except ImportError as error:
        findings.add("devices", "unknown", f"DeepSpeed cannot be imported ({error}): {REINSTALL}")
        return
    devices = find_devices()
    findings.add("devices", f"{devices.count} x {devices.kind}, {devices.memory / GIB:.0f} GiB")
    findings.add("ranks talk over", devices.backend)
    findings.add("precisions", f"{', '.join(devices.precisions)} (of the files in ds_configs)")


def look_at_memory_and_disk(findings: Findings, folder: Path) -> None:
    """Free memory, free disk at `folder`, and the shared memory that loader workers hand batches through."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    findings.add(
        "memory",
        f"{memory / GIB:.1f} GiB",
        None
        if memory >= LEAST_MEMORY
        else f"{memory / GIB:.1f} GiB of memory is little: train with a smaller batch, as in --set batch.global=64",
    )
    disk = shutil.disk_usage(folder).free
    findings.add(
        f"free disk at {folder}",
        f"{disk / GIB:.0f} GiB",
        None
        if disk >= LEAST_DISK
        else f"{disk / GIB:.1f} GiB free at {folder}: checkpoints and shards need more, free some",
    )
    if os.path.isdir("/dev/shm"):
        shared = shutil.disk_usage("/dev/shm").free
        advice = "start the container with --shm-size=8g, or --set data.workers=0"
        findings.add(
            "free shared memory",
            f"{shared / GIB:.1f} GiB",
            None if shared >= LEAST_SHARED else f"{shared / GIB:.2f} GiB of shared memory: {advice}",
        )


def look_at_two_processes(findings: Findings, timeout_s: int = 60) -> None:
    """Start two processes that add up a number over gloo, as the ranks of a CPU run do."""
    try:
        from torch import multiprocessing
    except ImportError as error:
        findings.add("two processes", "not tried", f"torch cannot be imported ({error}): {REINSTALL}")
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            multiprocessing.spawn(add_up, args=(f"file://{folder}/meeting", timeout_s), nprocs=2)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            advice = "check the firewall and the host name (GLOO_SOCKET_IFNAME=lo helps on one machine)"
            findings.add("two processes", "failed", f"two processes could not talk over gloo ({reason}): {advice}")
            return
    findings.add("two processes", "talk over gloo")


def add_up(rank: int, meeting: str, timeout_s: int) -> None:
    """One of the two processes: contribute rank + 1, expect 3."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", meeting, timedelta(seconds=timeout_s), world_size=2, rank=rank)
    total = torch.tensor(rank + 1)
    dist.all_reduce(total)
    dist.destroy_process_group()
    if total != 3:
        raise RuntimeError(f"rank {rank} got {total.item()} as the sum of 1 and 2")


if __name__ == "__main__":
    sys.exit(main())
