"""Compute what a recipe keeps frozen once, into an HDF5 store.

deepspeed tools/extract_features.py --kind towers --recipe … --train_data … --output features.h5
deepspeed tools/extract_features.py --kind xclip --teacher pytorch_model.bin.4 --recipe teachclip_msrvtt9k
    --train_data MSRVTT_train.9k.csv --set video.annotations=MSRVTT_data.json --set video.frame_store=frames …
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from convclip.command_line import add_local_rank, add_overrides, run
from convclip.config import Recipe, UserError, load_recipe, with_flags
from convclip.data.workers import plain_worker_errors

PRECISIONS = ("fp32", "bf16", "fp16")


def parse_arguments() -> argparse.Namespace:
    """The command line; what is frozen, its weights and its views come from the recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--kind", choices=["towers", "xclip"], default="towers", help="locked towers, or a teacher")
    parser.add_argument("--teacher", help="with --kind xclip: the X-CLIP checkpoint")
    parser.add_argument("--recipe", required=True, help="name of a recipe or path of a YAML file")
    parser.add_argument("--train_data", required=True, help="the training data, as for launch/train.py")
    parser.add_argument("--output", type=Path, required=True, help="the store; an unfinished one is gone on with")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="that of the ds_config of the run")
    parser.add_argument("--verify", action="store_true", help="compute a sample of a finished store again and compare")
    add_overrides(parser)
    add_local_rank(parser)
    return parser.parse_args()


@plain_worker_errors()
def extract(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """Refuse flags that do not go together, then extract, or verify and print the largest difference by array."""
    is_teacher = arguments.kind == "xclip"
    if is_teacher and arguments.teacher is None:
        raise UserError("--kind xclip: --teacher is needed, the X-CLIP checkpoint")
    if is_teacher and arguments.verify:
        raise UserError("--verify is for image recipes")
    if arguments.teacher is not None and not is_teacher:
        raise UserError("--teacher is for --kind xclip; the teacher of an image recipe is its own section")
    from convclip.devices import PRECISIONS
    from convclip.distributed import is_main
    from convclip.engine.agreement import refuse_other_recipe, refuse_unshared
    from convclip.engine.guard import Guard
    from convclip.engine.stored.extraction import VERIFIED_ITEMS
    from convclip.engine.zero.launcher import start_processes
    from convclip.run import open_task

    start_processes()
    with Guard(recipe.stop, stops=False):
        refuse_other_recipe(recipe)
        task, dtype, path = open_task(recipe), PRECISIONS[arguments.precision], arguments.output
        if not arguments.verify:
            refuse_unshared(path.parent, "--output")
        if arguments.verify:
            differences = task.verify(path, dtype)
            lines = [f"{n}: largest difference {d:.3g} over {VERIFIED_ITEMS} items" for n, d in differences.items()]
        elif is_teacher:
            task.extract_teacher(path, arguments.teacher, arguments.precision)
            lines = [f"{path}: done; train with --set 'video.teachers=[{path}]'"]
        else:
            task.extract(path, dtype)
            lines = [f"{path}: done; train with --set features={path}"]
    if is_main():
        print("\n".join(lines))


def main(arguments: argparse.Namespace) -> None:
    """Load the recipe as of a run that stores, and extract."""
    overrides = with_flags(arguments.overrides, {"data.train": ("--train_data", arguments.train_data)})
    recipe = load_recipe(arguments.recipe, overrides)
    if recipe.features.mode == "live":
        # As a run that stores: views are the recipe's, or one.
        recipe = load_recipe(arguments.recipe, [*overrides, "features.mode=fill"])
    extract(recipe, arguments)


if __name__ == "__main__":
    sys.exit(run("convclip", main, parse_arguments(), "; the same command goes on with what is missing"))
