"""When a run stops before its last step, all ranks after the same one, so that they can save a checkpoint together."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from convclip.devices import RandomState
from convclip.distributed import barrier, gather_objects, is_main, world_size
from convclip.engine.guard import Guard

T = TypeVar("T")
# Of the time limit, held back for a checkpoint; at most so much.
SLACK_SHARE, SLACK_SECONDS = 0.05, 30.0


class PlannedStop:
    """Asks all ranks, between any two steps, whether one of them has to stop; without a guard there is never a stop.

    A signal may reach one rank only. What a rank knows before a step is sent over gloo while the step runs, and read
    after it, so that no step and no GPU waits. All ranks must ask at the same places.
    """

    def __init__(self, guard: Guard | None = None) -> None:
        """A collective: it makes a process group."""
        self.guard, self.why = guard, ""
        self._group: dist.ProcessGroup | None = None
        if guard is not None and world_size() > 1:
            self._group = cast("dist.ProcessGroup", dist.new_group(backend="gloo"))
        self._answer: tuple[torch.Tensor, Any] | None = None
        self._started = self._last = time.time()
        self._longest = 0.0

    def due(self, step: int | None = None) -> bool:
        """Whether to stop here, after `step` steps; the same on all ranks. `why` then says it."""
        guard = self.guard
        if guard is None or self.why:
            return bool(self.why)
        if step is not None:
            guard.step = step
        if guard.phase == "start":
            guard.phase, self._last = "train", time.time()
        if self._answer is None:
            self._ask(guard)
        if not self._wait():
            self._ask(guard)
            return False
        self._answer = None
        self.why = next(wish for wish in gather_objects(guard.wish) if wish)
        return True

    def unless_due(self, encode: Callable[..., Any], work: Callable[[Callable[..., Any]], T]) -> T | None:
        """`work(encode)`, where all ranks call `encode` as many times; None where a stop is due at one of these calls.

        For evaluations: the run that goes on makes up for it. The generators are then as if it had not begun.
        """
        if self.guard is None or self.guard.phase == "start":
            return work(encode)
        random = RandomState.now()

        def encode_or_stop(*arguments: Any, **named: Any) -> Any:
            if self.due():
                raise _Due
            return encode(*arguments, **named)

        try:
            return work(encode_or_stop)
        except _Due:
            random.restore()
            return None

    def line(self, step: int, total: int, saved: int) -> str:
        """What the log says of a run that stopped after `step` of `total` steps, and last saved after `saved`."""
        at = f"stopped at step {step} of {total} by {self.why}"
        if not saved:
            return f"{at}: nothing is saved; the same command starts again"
        return f"{at}; the checkpoint of step {saved} goes on, with the same launcher: {how_to_go_on()}"

    def close(self) -> None:
        """After the last step: from here on, a signal changes nothing."""
        if self._answer is not None:
            self._wait()
            self._answer = None
        if self.guard is not None:
            self.guard.phase = "end"
            # Those of the others are in the store before rank 0 looks there for the last time.
            self.guard.pass_warnings()
            barrier()
            if is_main():
                self.guard.pass_warnings()

    def _ask(self, guard: Guard) -> None:
        """Send what this rank knows."""
        now = time.time()
        self._longest, self._last = max(self._longest, now - self._last), now
        # Until the answer is read there is one step more; saves and the ends of evaluations lie between two, too.
        slack = min(SLACK_SECONDS, SLACK_SHARE * (guard.deadline - self._started)) + 2 * self._longest
        if guard.wish is None and now + slack > guard.deadline:
            guard.wish = "its time limit"
        own = torch.tensor([guard.wish is not None], dtype=torch.int32)
        work = dist.all_reduce(own, dist.ReduceOp.MAX, self._group, async_op=True) if self._group is not None else None
        self._answer = own, work

    def _wait(self) -> bool:
        assert self._answer is not None
        found, work = self._answer
        if work is not None:
            work.wait()
        return bool(found.item())


class _Due(Exception):
    """Raised through an evaluation that a stop cuts short."""


def how_to_go_on() -> str:
    """The command, but for its launcher, that takes a stopped run up again."""
    words = [word for word in sys.argv if not word.startswith("--local_rank")]
    kept = [
        word
        for before, word in zip(["", *words], words, strict=False)
        if not (before == "--resume" or word == "--resume" or word.startswith("--resume="))
    ]
    return shlex.join([*kept, "--resume", "auto"])
