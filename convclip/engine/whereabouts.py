"""Where the main thread of a process is, and for how long it has not moved on."""

from __future__ import annotations

import os
import sys
import threading
import time
from types import FrameType

from convclip.devices import on_accelerator
from convclip.engine.procfs import cpu_seconds, descendants, thread_activity

# Modules whose functions wait for other ranks, and the names of what waits for them without saying so.
_COLLECTIVES = ("torch.distributed.", "deepspeed.comm.")
_WAITS = {"wait", "synchronize"}
# Less is nothing: of a second, and times a second.
LEAST_CPU, LEAST_SWITCHES = 0.01, 1.0
# gloo's own threads at work, with the main one in a collective; an accelerator's driver that waits by asking again.
LEAST_TRANSFER, SPINNING = 0.1, 0.95


class Whereabouts:
    """`look` from another thread, every second or so. `place` is the innermost function, `collective` the name of what
    the main thread, or one that does its backward pass, waits for other ranks in, if it does."""

    def __init__(self) -> None:
        """From the main thread."""
        self.place, self.collective = "", ""
        self._main, self._thread = threading.get_ident(), threading.get_native_id()
        self._stacks: object = None
        self._since = self._looked = time.monotonic()
        self._used = self._measure()

    def look(self) -> None:
        """Look again."""
        now, frames = time.monotonic(), sys._current_frames()
        stacks = [_stack(frame) for ident, frame in frames.items() if ident == self._main]
        stacks += [s for ident, f in frames.items() if ident != self._main and _collective(s := _stack(f))]
        if not stacks:
            return
        own = next((place for place in stacks[0] if _module(place[0]).startswith("convclip.")), stacks[0][0])
        self.place = _name(stacks[0][0]) + (f" (in {_name(own)})" if own is not stacks[0][0] else "")
        self.collective = next(filter(None, map(_collective, stacks)), "")
        seen = [[(id(frame.f_code), lasti) for frame, lasti in stack] for stack in stacks]
        used = self._measure()
        if seen != self._stacks or self._is_busy(used, max(now - self._looked, 1e-3)):
            self._since = now
        self._stacks, self._used, self._looked = seen, used, now

    def still(self) -> float:
        """Seconds for which nothing has changed: the same functions, at the same place, and no work done."""
        return time.monotonic() - self._since

    def forget(self) -> None:
        """This process itself did not run for a while: the time counts from now on."""
        self._since = self._looked = time.monotonic()

    def _measure(self) -> tuple[float, int, float, float]:
        """CPU seconds of the main thread and its switches; CPU seconds of the processes below this one; of this one."""
        own = os.getpid()
        return (*thread_activity(self._thread), cpu_seconds(*descendants(own)), cpu_seconds(own))

    def _is_busy(self, used: tuple[float, int, float, float], seconds: float) -> bool:
        cpu, switches, below, process = ((a - b) / seconds for a, b in zip(used, self._used, strict=True))
        if self.collective:
            return not on_accelerator() and process > LEAST_TRANSFER
        if below > LEAST_CPU:
            return True
        spins = on_accelerator() and cpu > SPINNING
        return not spins and (cpu > LEAST_CPU or switches > LEAST_SWITCHES)


def _stack(frame: FrameType | None) -> list[tuple[FrameType, int]]:
    """Frames from the innermost out, and where each stands."""
    found = []
    while frame is not None:
        found.append((frame, frame.f_lasti))
        frame = frame.f_back
    return found


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _name(place: tuple[FrameType, int]) -> str:
    frame = place[0]
    return f"{_module(frame)}.{frame.f_code.co_name}, line {frame.f_lineno}"


def _collective(stack: list[tuple[FrameType, int]]) -> str:
    """The outermost public function of torch.distributed that the stack stands in; "" for none."""
    inner, module = stack[0][0], _module(stack[0][0])
    found = ""
    for frame, _ in stack:
        if _module(frame).startswith(_COLLECTIVES):
            name = frame.f_code.co_name
            if not name.startswith("_") and name not in ("wrapper", "log_wrapper"):
                found = name
    # The answer of a collective that was started before.
    name = inner.f_code.co_name.removeprefix("_")
    if not found and name in _WAITS and module.startswith(("deepspeed.", "convclip.engine.planned_stop")):
        found = name
    return found
