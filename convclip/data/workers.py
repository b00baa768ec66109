"""What goes wrong in a data worker, in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from convclip.schema import UserError


@contextmanager
def plain_worker_errors() -> Iterator[None]:
    """Within it, a dead data worker and a UserError raised in a worker become a UserError of one line.

    torch tells of a worker's death by raising wherever the main process happens to be, so it must enclose the steps
    too, not only the reading of batches. Also a decorator.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"a data worker died ({str(error).splitlines()[0]}): memory may be short, lower data.workers or, in a "
            "container, enlarge /dev/shm"
        ) from error
    except UserError as error:
        # From a worker, torch wraps the message into its own traceback; the last line is ours.
        raise UserError(str(error).strip().splitlines()[-1].split("UserError: ")[-1]) from None
