"""Reading files that a user or a data set names: only regular ones, only up to a size.

A FIFO would wait for a writer and /dev/zero never ends; both are refused before they are opened.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import stat
import zlib
from pathlib import Path
from typing import Any

from convclip.schema import UserError

MAX_TEXT_BYTES = 1 << 31


def read_regular(path: str | Path, limit: int) -> bytes:
    """The bytes of a regular file. OSError: it cannot be read, is no regular file, or has more than `limit` bytes."""
    # stat before open: opening a FIFO waits for its other end.
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise OSError(None, "it is a folder")
    if not stat.S_ISREG(status.st_mode):
        raise OSError(None, "no regular file")
    if status.st_size > limit:
        raise OSError(None, f"more than {limit} bytes")
    with open(path, "rb") as file:
        return file.read(limit)


def read_json(path: str | Path, what: str) -> Any:
    """The content of a JSON file (UTF-8, 16 or 32, with or without byte-order mark), unpacked if it ends in .gz.

    Raises:
        UserError: one line that starts with `<what> <path>` and says why.
    """
    try:
        data = read_regular(path, MAX_TEXT_BYTES)
        if str(path).endswith(".gz"):
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
                data = file.read(MAX_TEXT_BYTES + 1)
            if len(data) > MAX_TEXT_BYTES:
                raise OSError(None, f"unpacked, it has more than {MAX_TEXT_BYTES} bytes")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{what} {path} cannot be read: {reason_of(error)}") from None
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} {path}: not JSON: {reason_of(error)}") from None


def reason_of(error: Exception) -> str:
    """Why a file cannot be read, without its name."""
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__


def refuse_irregular(path: str | Path, what: str) -> None:
    """UserError unless `path` is a regular file that is there."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise UserError(f"{what} {path} cannot be read: {reason_of(error)}") from None
    if not stat.S_ISREG(mode):
        kind = "it is a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise UserError(f"{what} {path} cannot be read: {kind}")
