"""Whether the loss is higher after an unfreeze event than before it: pure arithmetic on the mean losses of steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

# Steps before and after an event whose mean losses are compared; fewer where another event or the run's end is nearer.
SPAN = 10
# A mean loss so much higher than before is reported.
TOLERATED = 1.1


class Rise(NamedTuple):
    """The mean loss before and after the event at optimizer step `start`, and of how many steps each is the mean."""

    start: int
    before: float
    after: float
    steps_before: int
    steps_after: int


class LossRises:
    """Finds the events after which the mean loss rose by more than a tenth.

    `recent` is what a checkpoint needs to go on alike: the losses of the last steps, the last one's at the end. Steps
    count from 1, as in the log: the event at start s comes between step s and step s + 1.
    """

    def __init__(self, starts: Iterable[int], total_steps: int, recent: Sequence[float] = ()) -> None:
        """`starts`: the optimizer steps before which events come. `recent`: the losses of a run that goes on."""
        self.recent = list(recent)
        self._edges = sorted({0, total_steps, *(start for start in starts if start < total_steps)})

    def add(self, losses: Iterable[tuple[int, float]]) -> Iterator[Rise]:
        """Take the (step, loss) that follow, each the mean over ranks; a loss that is not finite begins anew."""
        for step, loss in losses:
            self.recent = [*self.recent, loss][-2 * SPAN :] if math.isfinite(loss) else []
            for event in range(1, len(self._edges) - 1):
                rise = self._look(step, *self._edges[event - 1 : event + 2])
                if rise is not None:
                    yield rise

    def _look(self, step: int, begin: int, start: int, end: int) -> Rise | None:
        """The rise at `start`, looked at when `step` is the last to compare; events or ends at `begin` and `end`."""
        after = min(SPAN, end - start)
        if step != start + after or len(self.recent) <= after:
            return None
        later, earlier = self.recent[-after:], self.recent[:-after][-min(SPAN, start - begin) :]
        means = sum(earlier) / len(earlier), sum(later) / len(later)
        return Rise(start, *means, len(earlier), len(later)) if means[1] > TOLERATED * means[0] else None
