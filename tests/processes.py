"""Processes for tests: ranks of a small world, scripts, and the real launcher.

Most of a process's start is the import of torch, DeepSpeed and open_clip: two fresh ranks took 13 s on a busy machine,
two forked ones 0.3 s. So ranks and scripts are forked from a server that has imported them. The
launchers themselves, and what depends on a fresh interpreter, start real commands (`run`, `launch`).
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import os
import random
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch

from tests.conftest import FULL, REPOSITORY

SECONDS = 400
# The last ones are what DeepSpeed's first engine and a run's first log row import.
PRELOADED = [
    "convclip.run",
    "convclip.clip",
    "convclip.engine.trainer",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch.utils.tensorboard",
]


@functools.cache
def forked() -> ForkServerContext:
    """Starts processes that have imported what is slow to import."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def free_port() -> int:
    """A TCP port that nobody listens on, and that no connection is given while the ranks start: it lies below those."""
    candidates = list(range(20_000, 32_000))
    random.SystemRandom().shuffle(candidates)
    for port in candidates:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port from 20000 to 32000")


def run_ranks(world: int, target: Callable[..., Any], *arguments: Any) -> Any:
    """Call `target(*arguments)` on `world` ranks that train under DeepSpeed over gloo; rank 0's result."""
    given = {**os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return _on_ranks(world, _train_rank, given, target, arguments)[0]


def run_in_world(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """[function(*arguments) of rank 0, of rank 1, …], in a gloo group without DeepSpeed."""
    with tempfile.TemporaryDirectory() as folder:
        # A rendezvous file instead of a port: nothing else on the machine can take it.
        meeting = (Path(folder) / "meeting").as_uri()
        return _on_ranks(world, _plain_rank, dict(os.environ), world, meeting, function, arguments)


def run_script(script: str, *arguments: str, world: int | None = None) -> subprocess.CompletedProcess:
    """A script of the repository as `python script arguments` at its root; with `world`, so many ranks of it.

    The ranks find in the environment, and before the arguments, what the deepspeed launcher puts there. Exit code and
    stderr are the first bad rank's.
    """
    ranks = end_of_ranks(script, *arguments, world=world)
    bad = next((rank for rank in ranks if rank.returncode), ranks[0])
    said = "".join(rank.stdout for rank in ranks)
    return subprocess.CompletedProcess([script, *arguments], bad.returncode, said, bad.stderr)


def end_of_ranks(
    script: str, *arguments: str, world: int | None = None, prepare: Callable[[], None] | None = None
) -> list[subprocess.CompletedProcess]:
    """How each rank of `run_script` ends; each calls `prepare` before it runs the script."""
    shared = dict(os.environ)
    if world is not None:
        shared |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(world or 1):
            outputs = [Path(folder) / f"{rank}.{name}" for name in ("stdout", "stderr")]
            given, words = shared, arguments
            if world is not None:
                given = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                words = (f"--local_rank={rank}", *arguments)
            ranks.append((forked().Process(target=_script, args=(script, words, given, *outputs, prepare)), outputs))
            ranks[-1][0].start()
        deadline = time.monotonic() + SECONDS
        for child, _ in ranks:
            child.join(deadline - time.monotonic())
        if any(child.is_alive() for child, _ in ranks):
            for child, _ in ranks:
                child.kill()
                child.join()
            raise subprocess.TimeoutExpired(script, SECONDS)
        # A negative code names the signal, as in subprocess.
        return [
            subprocess.CompletedProcess([script], child.exitcode or 0, *(output.read_text() for output in outputs))
            for child, outputs in ranks
        ]


def run(command: list[str]) -> subprocess.CompletedProcess:
    """Run a command at the repository's root."""
    return subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=SECONDS, check=False, env=dict(os.environ)
    )


def run_launched(world: int, script: str, *arguments: str) -> subprocess.CompletedProcess:
    """A script on `world` ranks: in `make test-full` under the real deepspeed launcher, whose start is what takes time;
    test_training.py uses it in `make test` too."""
    return run(launch(world, script, *arguments)) if FULL else run_script(script, *arguments, world=world)


def launch(world: int, script: str, *arguments: str) -> list[str]:
    """The command that runs `script` under the real deepspeed launcher."""
    launcher = Path(sys.executable).with_name("deepspeed")
    options = ["--num_gpus", str(world), "--master_port", str(free_port()), "--log_level", "error"]
    return [str(launcher), *options, script, *arguments]


def _on_ranks(world: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(rank, …)` returns on every rank; a rank's error is raised here, with its traceback."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _keep_result, (Path(folder), work, arguments), nprocs=world, start_method=_forked_by_torch()
        )
        return [torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(world)]


def _forked_by_torch() -> str:
    """torch makes its own context of that name; the server is one for the process."""
    forked()
    return "forkserver"


def _keep_result(rank: int, folder: Path, work: Callable[..., Any], arguments: tuple) -> None:
    torch.save(work(rank, *arguments), folder / str(rank))


def _train_rank(rank: int, given: Mapping[str, str], target: Callable[..., Any], arguments: tuple) -> Any:
    os.environ.update(given, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    # What is imported by now stays: DeepSpeed collects garbage at each start of stage 3, half a second otherwise.
    gc.freeze()
    from convclip.engine.zero.launcher import start_processes

    start_processes()
    result = target(*arguments)
    # A rank that leaves early takes the others' connections with it.
    torch.distributed.barrier()
    return result


def _plain_rank(
    rank: int, given: Mapping[str, str], world: int, meeting: str, function: Callable[..., Any], arguments: tuple
) -> Any:
    os.environ.update(given)
    torch.set_num_threads(1)
    minute = timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=minute)
    try:
        return function(*arguments)
    finally:
        torch.distributed.destroy_process_group()


def _script(
    script: str,
    arguments: tuple[str, ...],
    given: Mapping[str, str],
    stdout: Path,
    stderr: Path,
    prepare: Callable[[], None] | None,
) -> None:
    for stream, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), stream)
    os.environ.clear()
    os.environ.update(given)
    os.chdir(REPOSITORY)
    gc.freeze()
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(REPOSITORY / Path(script).parent))
    if prepare is not None:
        prepare()
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        # A forked process leaves without them.
        atexit._run_exitfuncs()
