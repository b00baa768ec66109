"""Train a recipe: `deepspeed launch/train.py --ds_config … --recipe …` (or torchrun, srun, mpirun, python)."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from convclip.command_line import add_local_rank, add_overrides, run
from convclip.config import Recipe, UserError, list_recipes, load_recipe, with_flags
from convclip.schema import model_rows


def parse_arguments() -> argparse.Namespace:
    """The command line; everything else is a recipe field, reached by --set."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--recipe", help="name of a recipe (--list_recipes) or path of a YAML file")
    parser.add_argument("--ds_config", help="DeepSpeed configuration (JSON): ZeRO, precision, offload")
    parser.add_argument("--train_data", help="training shards ('train-{000000..000117}.tar') or a CSV file")
    parser.add_argument("--val_data", help="evaluation shards or a CSV file; without it nothing is evaluated")
    parser.add_argument("--output_dir", help="the run's folder")
    parser.add_argument("--resume", default="never", help="never (default), auto, or the path of a checkpoint")
    parser.add_argument(
        "--resume_other_data", action="store_true", help="with --resume: go on though the training data are others"
    )
    add_overrides(parser)
    parser.add_argument("--list_recipes", action="store_true", help="print the recipes and stop")
    parser.add_argument("--list_models", action="store_true", help="print the released models and stop")
    parser.add_argument(
        "--plan", action="store_true", help="print what the recipe (with --resume: the resumed run) will do and stop"
    )
    parser.add_argument("--json", action="store_true", help="with --plan: as one JSON object")
    parser.add_argument("--plot", metavar="FILE", help="with --plan: draw the learning rates (.png, .pdf or .svg)")
    add_local_rank(parser)
    return parser.parse_args()


def check_arguments(arguments: argparse.Namespace) -> None:
    """Refuse flags that are empty, as an unset variable of a shell leaves them, or that nothing would read."""
    for flag in ("recipe", "ds_config", "train_data", "val_data", "output_dir", "resume", "plot"):
        if getattr(arguments, flag) == "":
            raise UserError(f"--{flag} is empty: give it a value, or leave it out")
    for flag in ("json", "plot"):
        if getattr(arguments, flag) and not arguments.plan:
            raise UserError(f"--{flag} goes with --plan: add it, or leave --{flag} out")
    if arguments.resume_other_data and arguments.resume == "never":
        raise UserError("--resume_other_data goes with --resume: add --resume auto, or leave it out")


def print_recipes() -> None:
    """One line per recipe that comes with the package."""
    for name in list_recipes():
        print(f"{name:<32} {load_recipe(name).description}")


def print_models() -> None:
    """The table of what `model.open_clip` may name, one line per model."""
    rows = model_rows()
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_plan(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """The plan, on a meta device: no data, no weights, no process group; with --resume what it would go on from."""
    config, plot = None, arguments.plot
    if arguments.ds_config is not None:
        from convclip.engine.zero.ds_config import load_ds_config

        config = load_ds_config(arguments.ds_config)
    from convclip.engine.plan.plan import check_plot_path, format_plan, plot_plan
    from convclip.engine.zero.ranks import planned_world
    from convclip.run import plan_recipe, plan_resume

    if plot is not None:
        check_plot_path(Path(plot))
    world = planned_world(os.environ)
    plan = plan_recipe(recipe, config, world)
    if arguments.resume != "never":
        plan["notes"] += plan_resume(recipe, config, world, arguments.resume, arguments.output_dir)
    print(json.dumps(plan) if arguments.json else format_plan(plan))
    if plot is not None:
        plot_plan(plan, Path(plot))


def train(recipe: Recipe, arguments: argparse.Namespace) -> int:
    """Build the parts and run; the exit code."""
    for flag in ("ds_config", "train_data", "output_dir"):
        if getattr(arguments, flag) is None:
            raise UserError(f"--{flag} is needed to train")
    from convclip.engine.guard import Guard
    from convclip.engine.zero.launcher import start_processes
    from convclip.run import train_recipe

    start_processes()
    folder, other_data = Path(arguments.output_dir), arguments.resume_other_data
    with Guard(recipe.stop, folder) as guard:
        summary = train_recipe(recipe, arguments.ds_config, folder, arguments.resume, other_data, guard=guard)
    return recipe.stop.exit_code if "stopped" in summary else 0


def main(arguments: argparse.Namespace) -> int | None:
    """Print the recipes, the released models or a plan, or train; the exit code."""
    check_arguments(arguments)
    if arguments.list_recipes:
        print_recipes()
        return None
    if arguments.list_models:
        print_models()
        return None
    if arguments.recipe is None:
        raise UserError(f"--recipe is needed, one of: {', '.join(list_recipes())}, or a YAML file")
    data = {"data.train": ("--train_data", arguments.train_data), "data.val": ("--val_data", arguments.val_data)}
    recipe = load_recipe(arguments.recipe, with_flags(arguments.overrides, data))
    if arguments.plan:
        print_plan(recipe, arguments)
        return None
    return train(recipe, arguments)


if __name__ == "__main__":
    sys.exit(run("convclip", main, parse_arguments(), "; --resume auto goes on from the last checkpoint"))
