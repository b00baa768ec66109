"""What is said of a rank that fails, and where: one line, past the locks and buffers of a process in trouble."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from pathlib import Path

from convclip.schema import UserError

# What gloo, NCCL and the store raise on a rank whose peer has gone.
_BROKEN = re.compile(
    r"closed by peer|reset by peer|broken pipe|connection refused|timed out|\bgloo\b|\bNCCL\b|failed to recv|"
    r"recvValue|sendBytes|DistNetworkError|DistStoreError",
    re.IGNORECASE,
)
_LOG_SECONDS = 2.0


def connection_broke(error: BaseException) -> bool:
    """Whether a rank that raises this has only lost the connection to another, which knows better why."""
    return isinstance(error, RuntimeError) and _BROKEN.search(f"{type(error).__name__} {error}") is not None


def describe(name: str, step: int, error: BaseException) -> str:
    """`rank 1 (host h) stopped after step 12: ValueError: …`, one line."""
    text = str(UserError(str(error)))
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return f"{name} stopped after step {step}: {kind}{text}"


def say(line: str) -> None:
    """A line on stderr."""
    with contextlib.suppress(OSError):
        os.write(2, f"convclip: {line}\n".encode())


def write_log(path: Path, line: str) -> None:
    """A line at the end of a log file, where there is one; a disk that does not answer is waited for briefly."""

    def write() -> None:
        with contextlib.suppress(OSError):
            file = os.open(path, os.O_WRONLY | os.O_APPEND)
            os.write(file, f"{time.strftime('%H:%M:%S')} {line}\n".encode())
            os.close(file)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    writer.join(_LOG_SECONDS)
