"""What one host says of itself, and its part of an all-reduce: `tools/doctor.py --hostfile` runs it on every host.

    python -m convclip.engine.zero.host_report report SHARED_FILE
    python -m convclip.engine.zero.host_report reduce RANK WORLD ADDRESS PORT

Prints one JSON object. By hand it is of use where there is no ssh: run `reduce` on each host at once.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

from convclip.engine.agreement import versions

MEGABYTES, ROUNDS, TIMEOUT_S = 100, 3, 60


def report(shared: Path) -> dict[str, object]:
    """Name, address, clock, versions, and what it reads in the shared file."""
    try:
        token = shared.read_text()
    except OSError as error:
        token = f"cannot read {shared}: {error.strerror}"
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    return {
        "host": socket.gethostname(),
        # As the deepspeed launcher finds the address that ranks meet at.
        "address": subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=False).stdout.split()[:1],
        "port": port,
        "token": token,
        "versions": versions(),
        "time": time.time(),
    }


def reduce(rank: int, world: int, address: str, port: int) -> dict[str, object]:
    """Sum 100 MB over the hosts, one rank on each; the best seconds of three rounds after a first one."""
    import torch
    import torch.distributed as dist

    from convclip.engine.zero.accelerator import find_devices

    backend = find_devices().backend
    store = dist.TCPStore(address, port, world, rank == 0, timedelta(seconds=TIMEOUT_S))
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT_S))
    device = torch.device("cpu") if backend == "gloo" else torch.device("cuda", 0)
    values = torch.full((MEGABYTES * 250_000,), float(rank + 1), device=device)
    seconds = []
    for _ in range(1 + ROUNDS):
        dist.barrier()
        given, start = values.clone(), time.perf_counter()
        dist.all_reduce(given)
        # Reading a value waits for it.
        total = given[-1].item()
        seconds.append(time.perf_counter() - start)
    dist.destroy_process_group()
    if total != world * (world + 1) / 2:
        raise RuntimeError(f"rank {rank} got {total}")
    return {"backend": backend, "seconds": min(seconds[1:])}


def main() -> int:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    tasks.add_parser("report").add_argument("shared", type=Path)
    numbers = tasks.add_parser("reduce")
    for name, kind in (("rank", int), ("world", int), ("address", str), ("port", int)):
        numbers.add_argument(name, type=kind)
    given = vars(parser.parse_args())
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    print(json.dumps({"report": report, "reduce": reduce}[given.pop("task")](**given)))  # type: ignore[operator]
    return 0


if __name__ == "__main__":
    sys.exit(main())
