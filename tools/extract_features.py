"""Compute what a recipe keeps frozen once, into an HDF5 store: `deepspeed tools/extract_features.py --kind towers …`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from convclip.config import UserError, load_recipe

PRECISIONS = ("fp32", "bf16", "fp16")


def parse_arguments() -> argparse.Namespace:
    """The command line; what is frozen, its weights and its views come from the recipe."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--kind", choices=["towers"], default="towers", help="towers: the recipe's locked towers")
    parser.add_argument("--recipe", required=True, help="name of a recipe or path of a YAML file")
    parser.add_argument("--train_data", required=True, help="the training data, as for launch/train.py")
    parser.add_argument("--output", type=Path, required=True, help="the store; an unfinished one is gone on with")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="that of the ds_config of the run")
    parser.add_argument("--verify", action="store_true", help="compute a sample of a finished store again and compare")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Exit code 0, or 2 with one line on a user's mistake."""
    arguments = parse_arguments()
    try:
        data = f"data.train={json.dumps(arguments.train_data)}"
        recipe = load_recipe(arguments.recipe, [*arguments.overrides, data])
        if recipe.features.view_count is None:
            recipe = load_recipe(arguments.recipe, [*arguments.overrides, data, "features.views=1"])
        from convclip.engine.extraction import run_extraction

        run_extraction(recipe, arguments.output, arguments.precision, arguments.verify)
    except UserError as error:
        print(f"convclip: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
