"""What the scripts of launch/ and tools/ share: two flags, and how they end. Imports no torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from convclip.schema import UserError


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """`--set KEY=VALUE`, any number of times, for any field of a recipe: a list under the name `overrides`."""
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="override a recipe field"
    )


def add_local_rank(parser: argparse.ArgumentParser) -> None:
    """`--local_rank`, which the deepspeed launcher adds; the rank itself is read from the environment."""
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)


def run(
    name: str, work: Callable[[argparse.Namespace], int | None], options: argparse.Namespace, interrupted: str = ""
) -> int:
    """Exit code of `work(options)`: what it returns (None is 0), 2 after a UserError, 130 after Ctrl-C.

    The last two print one line on stderr: `name: ` with the error, or with `interrupted` and what comes of it now.
    """
    try:
        return work(options) or 0
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted{interrupted}", file=sys.stderr)
        return 130
