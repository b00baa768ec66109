"""Runs a function on every rank of a small gloo world, in processes kept for the whole test session."""

import atexit
import tempfile
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.distributed as dist

_pool = None


def run_in_world(world, function, *arguments):
    """[function(*arguments) of rank 0, of rank 1, …]; `function` stands at the top level of a module."""
    global _pool
    if _pool is None:
        _pool = ProcessPoolExecutor(2, mp_context=get_context("spawn"))
        atexit.register(_pool.shutdown)
    assert world <= 2
    with tempfile.TemporaryDirectory() as folder:
        # A rendezvous file instead of a port: nothing else on the machine can take it.
        meeting = (Path(folder) / "meeting").as_uri()
        runs = [_pool.submit(_on_rank, rank, world, meeting, function, arguments) for rank in range(world)]
        return [run.result(timeout=120) for run in runs]


def _on_rank(rank, world, meeting, function, arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    try:
        return function(*arguments)
    finally:
        dist.destroy_process_group()
