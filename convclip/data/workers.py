"""What goes wrong in a data worker, in one line."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from convclip.schema import UserError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def leave_signals_to_main(_: int) -> None:
    """`worker_init_fn` of a DataLoader: a signal to all processes of a run, from the terminal, a launcher or Slurm,
    stops none of its workers. The main process needs them until it stops, and ends them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_end_with_main, args=(os.getppid(),), daemon=True).start()


def _end_with_main(main: int) -> None:
    while signal.sigwaitinfo(SIGNALS).si_pid != main:
        pass
    os._exit(0)


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
