"""Compare the training loss of a run with a reference's, step by step.

    python tools/compare_losses.py REFERENCE RUN [--plot losses.png]

Each of the two is a run folder of ours, its metrics.jsonl, or the out.log of open_clip_train (or the folder it is in).
Both count finished steps. At each logged step of the reference, the run's loss is taken, between two of its logged
steps by linear interpolation. Printed are

    MeanRelativeError        mean of |run - reference| / |reference|
    MeanAbsoluteError        mean of |run - reference|
    SignedMeanRelativeError  mean of (run - reference) / reference, as the seed's script prints it
    SignedMeanAbsoluteError  mean of run - reference, as the seed's script prints it

The seed's rule (relative <= 0.05 or absolute <= 0.0002) is applied to the first two: signed means let errors cancel,
and pass any run whose loss is lower. Exit code 0: passed, 1: not, 2: the input cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convclip.command_line import run
from convclip.data.local_files import refuse_irregular
from convclip.files import whole_file
from convclip.schema import UserError

MOST_RELATIVE, MOST_ABSOLUTE = 0.05, 0.0002
# open_clip_train: "Train Epoch: 0 [ 6464/591753 (1%)] … Loss: 4.0123 (4.1)"; with several parts, Loss is their sum.
OPEN_CLIP_LINE = re.compile(r"Train Epoch: (\d+) \[\s*(\d+)/(\d+) .*\bLoss: (\S+)")


@dataclass(frozen=True)
class Comparison:
    """Both losses at the same steps."""

    steps: np.ndarray
    reference: np.ndarray
    run: np.ndarray
    exact: int
    """Steps that both have logged; at the others the run's loss is interpolated."""

    def errors(self) -> dict[str, float]:
        """The four means by the names that are printed; inf or nan where a loss is, or is relative to zero."""
        difference = self.run - self.reference
        with np.errstate(all="ignore"):
            relative = difference / self.reference
        return {
            "MeanRelativeError": float(np.abs(relative).mean()),
            "MeanAbsoluteError": float(np.abs(difference).mean()),
            "SignedMeanRelativeError": float(relative.mean()),
            "SignedMeanAbsoluteError": float(difference.mean()),
        }


def main(arguments: list[str] | None = None) -> int:
    """Compare what the command line names; the exit code is the module's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path, help="run folder, metrics.jsonl or out.log to compare with")
    parser.add_argument("run", type=Path, help="run folder, metrics.jsonl or out.log to judge")
    parser.add_argument("--plot", type=Path, help="PNG of both curves (needs matplotlib)")
    return run("compare_losses", judge, parser.parse_args(arguments))


def judge(options: argparse.Namespace) -> int:
    """Print the errors and the verdict; 0 when the run passes, else 1."""
    comparison = compare(read_losses(options.reference), read_losses(options.run))
    if options.plot:
        plot(comparison, options.plot)
    errors = comparison.errors()
    for name, value in errors.items():
        print(f"{name}: {value:.6g}")
    relative, absolute = errors["MeanRelativeError"], errors["MeanAbsoluteError"]
    passed = relative <= MOST_RELATIVE or absolute <= MOST_ABSOLUTE
    steps = comparison.steps
    print(f"compared at {len(steps)} steps, {steps[0]} to {steps[-1]}; {comparison.exact} of them logged by both")
    print(
        f"{'pass' if passed else 'fail'}: mean relative error {relative:.6g} (limit {MOST_RELATIVE}) or "
        f"mean absolute error {absolute:.6g} (limit {MOST_ABSOLUTE})"
    )
    if not passed:
        print(advice(comparison))
    return 0 if passed else 1


def advice(comparison: Comparison) -> str:
    """For a run that fails: where its loss leaves the reference's, and which field of the recipe to look at first."""
    steps = comparison.steps
    with np.errstate(all="ignore"):
        # A loss that is not finite is off too.
        off = ~(np.abs(comparison.run / comparison.reference - 1) <= MOST_RELATIVE)
    if not np.isfinite(comparison.run).all():
        bad = steps[~np.isfinite(comparison.run)][0]
        return f"look first at: optim.lr and optim.clip_grad_norm, the run's loss is not finite at step {bad}"
    if off[0]:
        return (
            f"look first at: batch.global, for the losses differ from the first compared step {steps[0]} on; then at "
            "batch.accumulation (each loss compares fewer rows), model.init_logit_scale, and the first weights"
        )
    # Off for good: from there on, most of the steps are.
    later = next((number for number in np.flatnonzero(off) if off[number:].mean() > 0.5), int(off.argmax()))
    return (
        f"look first at: optim.lr and optim.warmup_steps, for the losses agree until step {steps[max(later - 1, 0)]}; "
        "then at epochs (the length of the cosine), optim.weight_decay, and the order of the data; --plot draws both"
    )


def compare(reference: dict[int, float], run: dict[int, float]) -> Comparison:
    """Losses by step at the reference's steps that the run spans; UserError when it spans none of them."""
    run_steps = sorted(run)
    steps = [step for step in sorted(reference) if run_steps[0] <= step <= run_steps[-1]]
    if not steps:
        raise UserError(
            f"no step in common: the reference has steps {min(reference)} to {max(reference)}, "
            f"the run {run_steps[0]} to {run_steps[-1]}"
        )
    interpolated = np.interp(steps, run_steps, [run[step] for step in run_steps])
    exact = sum(step in run for step in steps)
    return Comparison(np.array(steps), np.array([reference[step] for step in steps]), interpolated, exact)


def read_losses(path: Path) -> dict[int, float]:
    """{finished steps: loss} of a run folder or log; of a step logged again after a resume, the last counts."""
    if os.path.isdir(path):
        candidates = [path / name for name in ("metrics.jsonl", "out.log") if (path / name).is_file()]
        if not candidates:
            raise UserError(f"{path} holds neither metrics.jsonl nor out.log")
        path = candidates[0]
    # A pipe would wait for a writer, a device never ends.
    refuse_irregular(path, "log")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    losses = _of_metrics(path, text) if text.lstrip().startswith("{") else _of_open_clip(path, text)
    if not losses:
        raise UserError(f"{path} has no logged loss: give a metrics.jsonl, or an out.log with 'Train Epoch' lines")
    return losses


def _of_metrics(path: Path, text: str) -> dict[int, float]:
    losses, lines = {}, text.split("\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else {}
            if "loss" in row:
                losses[int(row["step"])] = float(row["loss"])
        except (ValueError, TypeError, KeyError):
            # A last line without its end is still being written.
            if number < len(lines):
                raise UserError(f"{path} line {number} is not an object with a step and a loss") from None
    return losses


def _of_open_clip(path: Path, text: str) -> dict[int, float]:
    """open_clip logs samples seen in the epoch; its first line of an epoch has one step's, the global batch."""
    found = OPEN_CLIP_LINE.findall(text)
    rows = [(int(epoch), int(samples), int(size), loss) for epoch, samples, size, loss in found]
    batch = min((samples for _, samples, _, _ in rows), default=1)
    losses = {}
    for epoch, samples, size, loss in rows:
        if not batch or samples % batch:
            raise UserError(
                f"{path}: {samples} samples are no multiple of the first line's {batch}: is its start cut off?"
            )
        try:
            losses[epoch * (size // batch) + samples // batch] = float(loss)
        except ValueError:
            raise UserError(f"{path}: loss {loss!r} is not a number") from None
    return losses


def plot(comparison: Comparison, path: Path) -> None:
    """Both curves and their relative difference, as a PNG that appears whole; UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install --editable '.[report]'") from None
    figure = Figure(figsize=(9, 6), dpi=120, layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    style = {"marker": "." if len(comparison.steps) < 50 else "", "linewidth": 1.2}
    above.plot(comparison.steps, comparison.reference, color="#0072B2", label="reference", **style)
    above.plot(comparison.steps, comparison.run, color="#D55E00", label="run", **style)
    above.set(ylabel="loss", title=f"mean relative error {comparison.errors()['MeanRelativeError']:.4g}")
    above.legend()
    with np.errstate(all="ignore"):
        below.plot(comparison.steps, comparison.run / comparison.reference - 1, color="#444444", **style)
    below.axhspan(-MOST_RELATIVE, MOST_RELATIVE, color="#009E73", alpha=0.15)
    below.set(ylabel="run / reference - 1", xlabel="step")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    with whole_file(path, "--plot") as part:
        figure.savefig(part, format="png")


if __name__ == "__main__":
    sys.exit(main())
