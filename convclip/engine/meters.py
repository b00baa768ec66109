"""What a run reports: log lines, metrics.jsonl, eval.jsonl, TensorBoard; rank 0 alone writes."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convclip.devices import current_device
from convclip.distributed import all_reduce_max, all_reduce_mean, gather_objects, is_main, on_main
from convclip.files import CannotWrite, append_line, writing
from convclip.schema import UserError

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:  # the `report` extra is not installed
    SummaryWriter = None  # type: ignore[assignment,misc]  # asked for below, where it is used

logger = logging.getLogger("convclip")


class Diverged(UserError):
    """A run stopped because its loss, gradient or weights are not finite."""


class _LogFile(logging.FileHandler):
    """train.log; a line that cannot be written is told by the next row, not by a traceback for each."""

    problem: OSError | None = None

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            self.problem = error
        else:
            super().handleError(record)


class _Warnings(logging.Handler):
    """Warnings of a rank, beside its log: rank 0 keeps what it `said`, and a `listener` takes those of a rank that has
    no log of its own."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: deque[str] = deque(maxlen=1000)
        self.listener: Callable[[str], None] | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if self.listener is not None:
            self.listener(record.getMessage())
        else:
            self.said.append(record.getMessage())


WARNINGS = _Warnings()


class RunLog:
    """The files and lines of one run.

    `metrics`, `event` and `evaluation` are called on all ranks; where rank 0 cannot write, all raise CannotWrite.
    """

    def __init__(self, folder: Path, total_steps: int, first_step: int = 0) -> None:
        """`first_step`: steps done before; what TensorBoard has of later ones is of a run that was cut short."""
        self.folder, self.total_steps = folder, total_steps
        self.main = is_main()
        self._file: _LogFile | None = None
        is_heard = WARNINGS.listener is not None
        logger.setLevel(logging.INFO if self.main else logging.WARNING if is_heard else logging.ERROR)
        logger.propagate = False
        self._close_handlers()
        logger.addHandler(WARNINGS)
        if self.main:
            with writing(folder / "train.log"):
                self._file = _LogFile(folder / "train.log")
            for handler in (logging.StreamHandler(sys.stdout), self._file):
                handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
                logger.addHandler(handler)
        self.board = None
        if SummaryWriter is not None and self.main:
            with writing(folder / "tensorboard"):
                purge = first_step + 1 if first_step else 0
                self.board = SummaryWriter(folder / "tensorboard", purge_step=purge)
        if self.main and SummaryWriter is None:
            logger.info("no TensorBoard files: pip install 'convclip[report]' to get them")

    def metrics(self, row: dict[str, Any]) -> None:
        """One training step's figures: a line of metrics.jsonl, TensorBoard scalars and a log line."""
        self._write("metrics.jsonl", row, {"train": row})
        extra = "".join(
            f" {key.removeprefix('loss_')} {value:.3f}"
            for key, value in row.items()
            if key[:5] == "loss_" and key != "loss_scale"
        )
        scale = f" loss scale {row['loss_scale']:g}" if row.get("loss_scale") else ""
        norm = "-" if row["grad_norm"] is None else f"{row['grad_norm']:.3f}"
        eta = (self.total_steps - row["step"]) * row["step_seconds"]
        logger.info(
            f"step {row['step']}/{self.total_steps} epoch {row['epoch']} loss {row['loss']:.4f}{extra} "
            f"lr {max(row['lr'].values()):.2e} logit scale {row['logit_scale']:.2f} "
            f"grad norm {norm}{scale} {row['samples_per_s']:.1f} samples/s "
            f"data {row['data_share']:.0%} {row['memory_gib']:.2f} GiB ETA {clock(eta)}"
        )

    def event(self, row: dict[str, Any], line: str) -> None:
        """Something that happened between steps, such as an unfreeze event."""
        self._write("metrics.jsonl", row, {})
        logger.info(line)

    def evaluation(self, row: dict[str, Any], table: str) -> None:
        """One evaluation: a line of eval.jsonl, TensorBoard scalars and a printed table."""
        scalars = {f"eval_{protocol}": row.get(protocol, {}) for protocol in ("standard", "rowwise")}
        scalars |= {
            f"eval_ema_{protocol}": row.get("ema", {}).get(protocol, {}) for protocol in ("standard", "rowwise")
        }
        self._write("eval.jsonl", row, scalars)
        for line in table.splitlines():
            logger.info(line)

    def close(self) -> None:
        """Flush everything."""
        if self.board:
            self.board.close()
        self._close_handlers()

    def _close_handlers(self) -> None:
        for handler in list(logger.handlers):
            handler.close()
            logger.removeHandler(handler)

    def has_evaluation(self, step: int) -> bool:
        """Whether eval.jsonl has a row of this step, by rank 0; on all ranks."""
        path = self.folder / "eval.jsonl"
        return on_main(
            lambda: path.is_file() and any(json.loads(line)["step"] == step for line in path.read_text().splitlines())
        )

    def _write(self, name: str, row: dict[str, Any], scalars: dict[str, dict[str, Any]]) -> None:
        """A line of the file `name`, and what TensorBoard gets of it."""
        problem = None
        if self.main:
            try:
                append_line(self.folder / name, json.dumps(row))
                with writing(self.folder / "tensorboard"):
                    for prefix, values in scalars.items():
                        self._scalars(prefix, values, row["step"])
                if self._file is not None and self._file.problem is not None:
                    with writing(self.folder / "train.log"):
                        raise self._file.problem
            except CannotWrite as error:
                problem = error
        # One number on the device in most cases: sending objects at every row would take longer.
        if all_reduce_max(torch.tensor(float(problem is not None), device=current_device())):
            raise next(found for found in gather_objects(problem) if found is not None)

    def _scalars(self, prefix: str, row: dict[str, Any], step: int) -> None:
        if self.board:
            for key, value in row.items():
                for name, number in value.items() if isinstance(value, dict) else ((key, value),):
                    if isinstance(number, int | float) and key != "step":
                        label = f"{prefix}/{key}" if name == key else f"{prefix}/{key}/{name}"
                        self.board.add_scalar(label, number, step)


class StepClock:
    """Time of the steps since the last report, and the share of it spent waiting for data."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start a new stretch."""
        self.started, self.waited, self.steps = time.perf_counter(), 0.0, 0

    def waiting(self, iterator: Any) -> Any:
        """Next item of `iterator`, its time counted as waiting for data."""
        start = time.perf_counter()
        item = next(iterator)
        self.waited += time.perf_counter() - start
        return item

    def step_done(self) -> None:
        """Count a step."""
        self.steps += 1

    def report(self, global_batch: int) -> dict[str, float]:
        """samples_per_s, data_share and step_seconds of the stretch, which then starts anew."""
        seconds = max(time.perf_counter() - self.started, 1e-9)
        steps = max(self.steps, 1)
        figures = {
            "samples_per_s": self.steps * global_batch / seconds,
            "data_share": self.waited / seconds,
            "step_seconds": seconds / steps,
        }
        self.reset()
        return figures


class LossWatch:
    """Sees whether steps are sound: the loss finite on every rank, and no update skipped for a gradient that is not.

    What it decides is decided alike on all ranks, so `read` is a collective. It is called where steps are logged and
    saved; in between, losses stay on the device and nothing waits for them.
    """

    def __init__(self, max_bad_steps: int, skips_are_normal: bool = False) -> None:
        """`skips_are_normal`: fp16's loss scale finds its size by skipping updates."""
        self.max_bad_steps, self.skips_are_normal, self.bad_steps = max_bad_steps, skips_are_normal, 0
        self._unread: list[tuple[int, Tensor, bool]] = []

    @property
    def is_full(self) -> bool:
        """Whether so many steps are unread that they may be one bad step too many; alike on all ranks."""
        return len(self._unread) >= self.max_bad_steps

    def add(self, step: int, loss: Tensor, updated: bool) -> None:
        """A step's loss on this rank, still on the device, and whether weights were updated."""
        self._unread.append((step, loss, updated))

    def read(self) -> list[tuple[int, float]]:
        """Look at all steps since the last time: each with its mean loss over ranks.

        Errors: Diverged after max_bad_steps in a row that are not sound.
        """
        if not self._unread:
            return []
        own = torch.stack([loss for _, loss, _ in self._unread]).float()
        means, infinite = all_reduce_mean(torch.stack([own, (~own.isfinite()).float()])).tolist()
        for (step, _, updated), is_infinite, loss in zip(self._unread, infinite, own.tolist(), strict=True):
            self._judge(step, bool(is_infinite), loss, updated)
        steps = [step for step, _, _ in self._unread]
        self._unread.clear()
        return list(zip(steps, means, strict=True))

    def _judge(self, step: int, is_infinite: bool, loss: float, updated: bool) -> None:
        if not is_infinite and (updated or self.skips_are_normal):
            self.bad_steps = 0
            return
        self.bad_steps += 1
        what = "the gradient is not finite"
        if is_infinite:
            what = "loss is not finite on another rank" if math.isfinite(loss) else f"loss is {loss}"
        skipped = "" if updated else ", update skipped"
        logger.warning(f"step {step}: {what}{skipped} ({self.bad_steps} in a row)")
        if self.bad_steps >= self.max_bad_steps:
            raise Diverged(
                f"stopped at step {step}: {self.bad_steps} steps in a row without a finite loss and gradient; lower "
                f"optim.lr, set optim.clip_grad_norm, or use bf16 or fp32; the last good checkpoint is kept"
            )


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
