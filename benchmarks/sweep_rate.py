"""How many settings a minute tools/sweep.py tries, and what a run of it spends its time on.

    python benchmarks/sweep_rate.py --recipe lite0.yaml --ds_config ds_configs/zero0_fp32.json --train_data …
        --val_data … --output_dir /tmp/rate --epochs 3 --set features=features.h5 --set optim.lr=3e-4,1e-3,3e-3,1e-2

Takes the command line of tools/sweep.py. The first run, which also computes what is frozen of the evaluation set, is
told apart. CPU seconds are the process's own: other work on the machine disturbs them less than wall time. With --live,
the evaluations run the frozen towers each time, as those of launch/train.py do.
"""

from __future__ import annotations

import functools
import runpy
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import convclip.sweep.runs as runs
from convclip.engine.stored.frozen_retrieval import FrozenRetrieval
from convclip.engine.task import ImageTextTask, Retrieval
from convclip.engine.trainer import Trainer
from convclip.engine.zero.staged_engine import StagedEngine

SWEEP = Path(__file__).resolve().parent.parent / "tools" / "sweep.py"
# What is timed of a run; the rest is the loop's own and the run's folder.
PARTS = {
    "run": (runs, "_run"),
    "model and weights": (ImageTextTask, "initial_model"),
    "data, store and tokenizer": (ImageTextTask, "open"),
    "DeepSpeed engine": (StagedEngine, "start"),
    "steps": (Trainer, "_train_step"),
    "evaluations": (Trainer, "_evaluate"),
}
spent: dict[str, list[list[float]]] = defaultdict(list)


def timed(name: str, function: Callable) -> Callable:
    """`function`, its wall and CPU seconds added to the present run's in `spent`."""

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        if name == "run":
            for part in PARTS:
                spent[part].append([0.0, 0.0])
        start, cpu = time.perf_counter(), time.process_time()
        try:
            return function(*arguments, **named)
        finally:
            # What comes before the first run is no run's.
            if spent["run"]:
                spent[name][-1][0] += time.perf_counter() - start
                spent[name][-1][1] += time.process_time() - cpu

    return call


def main() -> int:
    """Run the sweep, then print the table; its exit code."""
    if "--live" in sys.argv:
        sys.argv.remove("--live")
        FrozenRetrieval.figures = Retrieval.figures  # type: ignore[method-assign]
    for name, (owner, attribute) in PARTS.items():
        setattr(owner, attribute, timed(name, getattr(owner, attribute)))
    code = 0
    try:
        runpy.run_path(str(SWEEP), run_name="__main__")
    except SystemExit as end:
        code = int(end.code or 0)
    if len(spent["run"]) > 1:
        print(f"\nfirst run: {spent['run'][0][0]:.2f} s, CPU {spent['run'][0][1]:.2f} s; medians of the others:")
        for part, seconds in spent.items():
            wall, cpu = (statistics.median(run[kind] for run in seconds[1:]) for kind in (0, 1))
            rate = f", {60 / wall:.1f} settings a minute, by CPU time {60 / cpu:.1f}" if part == "run" else ""
            print(f"{part:<26} {wall:7.2f} s  CPU {cpu:7.2f} s{rate}")
    return code


if __name__ == "__main__":
    sys.exit(main())
