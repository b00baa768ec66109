"""One case of the campaign: a kind of damage and a seed, tried within a time limit, and what came of it.

A kind is `kind(folder, rng) -> outcome`: it writes something broken into the empty `folder`, gives it to convclip and
returns COUNTED or RIGHT, or lets the UserError pass. `Wrong` says that the result differs and nobody was told.
"""

from __future__ import annotations

import contextlib
import io
import logging
import random
import resource
import signal
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from convclip.schema import UserError

REFUSED, COUNTED, RIGHT, FAILED = "refused", "counted", "right", "failed"
OUTCOMES = (REFUSED, COUNTED, RIGHT, FAILED)
LONGEST_LINE = 600
# Bytes that a case may take beyond what the process has when it begins.
MEMORY = 3 << 30

Kind = Callable[[Path, random.Random], str]


class Wrong(Exception):
    """The result differs from the undamaged one, and nobody was told."""


class TimedOut(BaseException):
    """Beyond the time limit; no `except Exception` of the code under test takes it."""


@dataclass(frozen=True)
class Verdict:
    """What came of a case; `detail` is the message of a refusal, or what is wrong."""

    outcome: str
    detail: str = ""


def judge(name: str, kind: Kind, seed: int, number: int, limit: int) -> Verdict:
    """Case `number` of a kind under `seed`, the same damage every time, in at most `limit` seconds."""
    rng = random.Random(f"{name} {seed} {number}")
    with tempfile.TemporaryDirectory(prefix="campaign-") as folder, _quiet():
        try:
            with _limit(limit):
                outcome = kind(Path(folder), rng)
        except UserError as error:
            message = str(error)
            if len(message.splitlines()) != 1 or "\n" in message:
                return Verdict(FAILED, f"a message of several lines, or of none: {message[:300]!r}")
            if len(message) > LONGEST_LINE:
                return Verdict(FAILED, f"a message of {len(message)} characters: {message[:300]!r}")
            return Verdict(REFUSED, message)
        except Wrong as error:
            return Verdict(FAILED, f"silently wrong: {error}")
        except TimedOut:
            return Verdict(FAILED, f"not done in {limit} seconds")
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            place = traceback.extract_tb(error.__traceback__)[-1]
            ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "/convclip/" in frame.filename]
            where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else f"{place.filename}:{place.lineno}"
            return Verdict(FAILED, f"{type(error).__name__} at {where}: {str(error)[:200]!r}")
    return Verdict(outcome)


def share_out(cases: int, weights: Mapping[str, int]) -> dict[str, int]:
    """How many of `cases` each kind gets, at least one each, in proportion to its weight; rounded up."""
    total = sum(weights.values())
    return {name: max(1, -(-cases * weight // total)) for name, weight in weights.items()}


def table(results: Mapping[str, Counter[str]]) -> str:
    """Kind x outcome, with sums."""
    total: Counter[str] = sum(results.values(), Counter())
    rows = [("kind", *OUTCOMES, "cases")]
    for name, counts in [*results.items(), ("all", total)]:
        rows.append((name, *(str(counts[outcome]) for outcome in OUTCOMES), str(sum(counts.values()))))
    return "\n".join(f"{row[0]:<16}" + "".join(f"{cell:>9}" for cell in row[1:]) for row in rows)


@contextlib.contextmanager
def _limit(seconds: int) -> Iterator[None]:
    """The time a case may take, and the memory: what the process has, and MEMORY more."""

    def stop(number: int, frame: object) -> None:
        raise TimedOut

    before = signal.signal(signal.SIGALRM, stop)
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (has + MEMORY, hard))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No logs, warnings and progress bars of a thousand cases."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
