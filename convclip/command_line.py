"""What the scripts of launch/ and tools/ share: flags, a table of findings, and how they end. Imports no torch."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from convclip.schema import UserError

# Of each kind of finding, as many examples are shown.
EXAMPLES = 3


@dataclass
class Findings:
    """What a check found: by kind, how often, and the first examples."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, example: str, count: int = 1) -> None:
        """Note `count` more of a kind, one of which is `example`."""
        self.counts[kind] = self.counts.get(kind, 0) + count
        shown = self.examples.setdefault(kind, [])
        if len(shown) < EXAMPLES:
            # One line each, and no byte that a terminal would obey.
            shown.append("".join(c if c.isprintable() else "?" for c in example))

    @contextlib.contextmanager
    def catching(self, kind: str) -> Iterator[None]:
        """A UserError inside is a finding of this kind, and its line the example."""
        try:
            yield
        except UserError as error:
            self.add(kind, str(error))

    def take(self, other: Findings) -> None:
        """Add those of `other` behind these."""
        for kind, count in other.counts.items():
            self.add(kind, other.examples[kind][0], count)
            shown = self.examples[kind]
            shown += other.examples[kind][1 : 1 + EXAMPLES - len(shown)]

    def report(self) -> int:
        """Print the table; the exit code of the check, 0 for nothing found and 1 for anything."""
        if not self.counts:
            print("no findings")
            return 0
        print("   count  kind, and the first of it")
        for kind, count in self.counts.items():
            print(f"{count:>8,}  {kind}")
            for example in self.examples[kind]:
                print(f"{'':>8}    {example}")
        return 1


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """`--set KEY=VALUE`, any number of times, for any field of a recipe: a list under the name `overrides`."""
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="override a recipe field"
    )


def add_ema(parser: argparse.ArgumentParser) -> None:
    """`--ema`: the moving average of a run's weights in their place."""
    parser.add_argument(
        "--ema", action="store_true", help="take the moving average of the weights (of a run with optim.ema_decay)"
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
