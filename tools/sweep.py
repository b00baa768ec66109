"""Try settings of a recipe over one feature store, in one process start, and rank them by mean standard R@1.

    python tools/sweep.py --recipe … --ds_config … --train_data … --val_data … --output_dir sweeps/lr
        --set optim.lr=1e-4,3e-4,1e-3 --set optim.betas=[0.9,0.98],[0.9,0.95]
    … --random 40 --set optim.lr=log:1e-5..1e-2 --set optim.weight_decay=0..0.3
    … --set optim.lr=1e-4,1e-3 --set model.image.head=attention_pool,attention_pool_linear
    … --set loss.kind,model.init_logit_bias=[softmax,null],[sigmoid,-10]

Values make a grid; --random N draws points, from ranges too. A setting with one value is for all runs. What the store
depends on cannot be swept. Unfreeze events are left out, and are back in the command that trains the winner. The same
command goes on where it was stopped, and with more values it keeps the runs that are there. Under `deepspeed` the ranks
train each run together.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from convclip.command_line import add_local_rank, add_overrides, run
from convclip.config import UserError
from convclip.data.workers import plain_worker_errors
from convclip.sweep.points import Point, load_points, make_points, split_settings


def parse_arguments() -> argparse.Namespace:
    """The command line; everything else is a recipe field, reached by --set."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", required=True, help="name of a recipe or path of a YAML file")
    parser.add_argument("--ds_config", required=True, help="DeepSpeed configuration (JSON), as for launch/train.py")
    parser.add_argument("--train_data", required=True, help="the training data, as for launch/train.py")
    parser.add_argument("--val_data", required=True, help="the data that the ranking is by")
    parser.add_argument("--output_dir", required=True, help="the sweep's folder")
    parser.add_argument("--random", type=int, metavar="N", help="draw N points instead of the whole grid")
    parser.add_argument("--seed", type=int, default=0, help="with --random: which points (default: 0)")
    parser.add_argument("--epochs", type=int, help="epochs of each run; the winner's command has the recipe's own")
    add_overrides(parser)
    add_local_rank(parser)
    return parser.parse_args()


@plain_worker_errors()
def sweep_over(options: argparse.Namespace, fixed: list[str], points: list[Point]) -> None:
    """Check all points, fill the store, run, rank."""
    data = {"data.train": ("--train_data", options.train_data), "data.val": ("--val_data", options.val_data)}
    base, recipes = load_points(options.recipe, fixed, points, data)
    from convclip.distributed import is_main, on_main
    from convclip.engine.guard import Guard
    from convclip.engine.zero.launcher import start_processes
    from convclip.files import writing
    from convclip.locks import Lock
    from convclip.sweep.ranking import Progress, finish
    from convclip.sweep.runs import Sweep, check_points, fill_store, open_folder, run_points

    start_processes()
    folder = Path(options.output_dir)
    sweep = Sweep(base, options.ds_config, folder, options.epochs)
    work = check_points(sweep, points, recipes)
    with writing(folder, "--output_dir"):
        folder.mkdir(parents=True, exist_ok=True)
    lock = Lock(folder / "sweep.lock", f"--output_dir {folder}", heartbeat=True)
    on_main(lambda: lock.acquire() and None)
    try:
        with Guard(base.stop, stops=False):
            on_main(lambda: open_folder(sweep))
            fill_store(sweep)
            results = run_points(sweep, points, recipes, work, Progress(len(points)).report)
            if is_main():
                finish(sweep, results, data_words(options), fixed)
    finally:
        lock.release()


def data_words(options: argparse.Namespace) -> list[str]:
    """The flags that the winner's command has in common with this one."""
    names = ("ds_config", "recipe", "train_data", "val_data")
    return [word for name in names for word in (f"--{name}", getattr(options, name))]


def main(options: argparse.Namespace) -> None:
    """Refuse flags that do not go together, then sweep."""
    for flag in ("recipe", "ds_config", "output_dir"):
        if not getattr(options, flag):
            raise UserError(f"--{flag} is empty: give it a value")
    if options.epochs is not None and options.epochs < 1:
        raise UserError(f"--epochs {options.epochs}: train each run for one epoch at least")
    if options.seed and options.random is None:
        raise UserError("--seed goes with --random: add it, or leave --seed out")
    fixed, swept = split_settings(options.overrides)
    sweep_over(options, fixed, make_points(swept, options.random, options.seed))


if __name__ == "__main__":
    sys.exit(run("sweep", main, parse_arguments(), "; the same command goes on with the runs that are missing"))
