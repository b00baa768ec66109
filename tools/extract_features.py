"""Compute what a recipe keeps frozen once, into an HDF5 store.

deepspeed tools/extract_features.py --kind towers --recipe … --train_data … --output features.h5
deepspeed tools/extract_features.py --kind xclip --teacher pytorch_model.bin.4 --recipe teachclip_msrvtt9k
    --train_data MSRVTT_train.9k.csv --set video.annotations=MSRVTT_data.json --set video.frame_store=frames …
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from convclip.config import Recipe, UserError, load_recipe

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
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def extract(recipe: Recipe, arguments: argparse.Namespace) -> None:
    """Refuse flags that do not go together, then extract."""
    if arguments.kind == "xclip":
        if recipe.video is None:
            raise UserError(f"--kind xclip: recipe {recipe.name} is not for videos; use one with a video section")
        if arguments.teacher is None:
            raise UserError("--kind xclip: --teacher is needed, the X-CLIP checkpoint")
        if arguments.verify:
            raise UserError("--verify is for image recipes")
        from convclip.video.video_extraction import run_xclip_extraction

        run_xclip_extraction(recipe, arguments.output, arguments.teacher, arguments.precision)
        return
    if arguments.teacher is not None:
        raise UserError("--teacher is for --kind xclip; the teacher of an image recipe is its own section")
    if recipe.video is not None:
        if arguments.verify:
            raise UserError("--verify is for image recipes")
        from convclip.video.video_extraction import run_towers_extraction

        run_towers_extraction(recipe, arguments.output, arguments.precision)
        return
    from convclip.engine.stored.extraction import run_extraction

    run_extraction(recipe, arguments.output, arguments.precision, arguments.verify)


def main() -> int:
    """Exit code 0, or 2 with one line on a user's mistake."""
    arguments = parse_arguments()
    try:
        data = f"data.train={json.dumps(arguments.train_data)}"
        recipe = load_recipe(arguments.recipe, [*arguments.overrides, data])
        if recipe.video is None and recipe.features.view_count is None:
            recipe = load_recipe(arguments.recipe, [*arguments.overrides, data, "features.views=1"])
        extract(recipe, arguments)
    except UserError as error:
        print(f"convclip: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
