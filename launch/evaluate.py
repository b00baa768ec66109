"""Evaluate a run or one of its checkpoints: `deepspeed launch/evaluate.py --checkpoint … --data … --output_dir …`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from convclip.command_line import add_ema, add_local_rank, add_overrides, run


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
    add_ema(parser)
    add_overrides(parser)
    add_local_rank(parser)
    return parser.parse_args()


def evaluate(arguments: argparse.Namespace) -> None:
    """Start this rank and evaluate."""
    from convclip.engine.guard import Guard
    from convclip.engine.zero.launcher import start_processes
    from convclip.run import evaluate_checkpoint
    from convclip.schema import StopConfig

    start_processes()
    with Guard(StopConfig(), stops=False):
        evaluate_checkpoint(
            arguments.checkpoint,
            arguments.data,
            arguments.output_dir,
            arguments.precision,
            arguments.overrides,
            arguments.zero_shot,
            arguments.ema,
        )


if __name__ == "__main__":
    sys.exit(run("convclip", evaluate, parse_arguments()))
