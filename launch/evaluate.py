"""Evaluate a run or one of its checkpoints: `deepspeed launch/evaluate.py --checkpoint … --data … --output_dir …`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from convclip.config import UserError


def parse_arguments() -> argparse.Namespace:
    """The command line; model, tokenizer and transform come from the run's own recipe."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="a run's folder (its best) or a checkpoint of it"
    )
    parser.add_argument("--data", required=True, help="evaluation shards ('val-{000000..000004}.tar') or a CSV file")
    parser.add_argument("--output_dir", type=Path, required=True, help="eval.jsonl is written here")
    parser.add_argument("--zero_shot", type=Path, help="folder of classnames.txt, templates.txt and pictures by class")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Exit code 0, or 2 with one line on a user's mistake."""
    arguments = parse_arguments()
    try:
        from convclip.engine.zero.launcher import start_processes
        from convclip.run import evaluate_checkpoint

        start_processes()
        evaluate_checkpoint(
            arguments.checkpoint,
            arguments.data,
            arguments.output_dir,
            arguments.precision,
            arguments.overrides,
            arguments.zero_shot,
        )
    except UserError as error:
        print(f"convclip: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
