"""The ranking of a sweep: lines, a table, a picture of lr against recall, and the command that trains the winner."""

from __future__ import annotations

import io
import math
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convclip.config import UserError
from convclip.distributed import is_main, world_size
from convclip.engine.meters import clock
from convclip.files import CannotWrite, whole_file, write_text
from convclip.sweep.points import Point, shown
from convclip.sweep.runs import Result, Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours: told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# More lines than these are points without a legend.
MOST_LINES = len(COLOURS)
LR = "optim.lr"


def ranked(results: Sequence[Result]) -> list[Result]:
    """The best mean standard R@1 first, equal ones in their order; those without figures last."""
    return sorted(results, key=lambda result: -result.best.get("mean_r1", -1.0))


def figures_line(result: Result) -> str:
    """What a point came to, in one line."""
    if result.failed:
        return f"failed: {result.failed}"
    best = result.best
    return f"mean R@1 {best['mean_r1']:.2f} (I2T {best['i2t_r1']:.2f} T2I {best['t2i_r1']:.2f}) at step {best['step']}"


def table(results: Sequence[Result], command: str) -> str:
    """Ranked results as Markdown, with the winner's command."""
    keys = list(dict.fromkeys(key for result in results for key in result.settings))
    head = ["", *keys, "mean R@1", "I2T R@1", "T2I R@1", "step", "seconds"]
    rows = [head, ["---"] * len(head)]
    for place, result in enumerate(results, 1):
        best = result.best
        cells = [str(place), *[shown(result.settings[key]) if key in result.settings else "" for key in keys]]
        if result.failed:
            cells += [result.failed, "", "", ""]
        else:
            cells += [*(f"{best[key]:.2f}" for key in ("mean_r1", "i2t_r1", "t2i_r1")), str(best["step"])]
        rows.append([*cells, f"{result.seconds:.1f}"])
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + f"\n\nStandard protocol; each run's best step. The winner:\n\n```\n{command}\n```\n"


def train_command(sweep: Sweep, winner: Result, words: Sequence[str], fixed: Sequence[str]) -> str:
    """The line that trains the winner by its recipe, with its unfreeze events; `words`: the flags of the sweep.

    Without events the run is the sweep's own and reads its store; with them it fills one of its own, which may end
    before a layer that an event opens.
    """
    overrides = [*fixed, *Point(tuple(winner.settings.items())).overrides]
    if sweep.base.features.mode != "store":
        overrides.append("features=fill" if sweep.base.freezing.unfreeze else f"features={sweep.store}")
    ranks = [] if world_size() == 1 else ["--num_gpus", str(world_size())]
    given = [part for override in overrides for part in ("--set", override)]
    place = ["--output_dir", str(sweep.folder / "winner")]
    return shlex.join(["deepspeed", *ranks, "launch/train.py", *words, *place, *given])


def finish(sweep: Sweep, results: Sequence[Result], words: Sequence[str], fixed: Sequence[str]) -> None:
    """Print the ranking and the winner's command; write sweep.md and sweep.png. Errors: UserError without figures."""
    order = ranked(results)
    if not order[0].best:
        raise UserError(f"no run of {len(order)} has figures; the first: {order[0].failed}")
    command = train_command(sweep, order[0], words, fixed)
    write_text(sweep.folder / "sweep.md", table(order, command), "--output_dir")
    print()
    for place, result in enumerate(order, 1):
        print(f"{place:>4}  {label(result)}: {figures_line(result)}")
    try:
        draw(sweep.folder / "sweep.png", results)
        print(f"\ntable: {sweep.folder / 'sweep.md'}    picture: {sweep.folder / 'sweep.png'}")
    except CannotWrite:
        raise
    except UserError as error:
        print(f"\ntable: {sweep.folder / 'sweep.md'}    no picture: {error}")
    print(f"train the winner:\n{command}")


class Progress:
    """A line for each point, on the main rank."""

    def __init__(self, total: int) -> None:
        self.total, self.started, self.count, self.made = total, time.monotonic(), 0, 0

    def report(self, result: Result) -> None:
        """Say what came of a point, and when the last one will be done."""
        self.count += 1
        self.made += not result.kept
        if not is_main():
            return
        took = "kept" if result.kept else f"{result.seconds:.1f} s"
        left = (time.monotonic() - self.started) / max(self.made, 1) * (self.total - self.count)
        print(
            f"[{self.count}/{self.total}] {label(result)}: {figures_line(result)}; {took}, ETA {clock(left)}",
            flush=True,
        )


def label(result: Result) -> str:
    """The settings of a result."""
    return Point(tuple(result.settings.items())).label


def horizontal_field(results: Sequence[Result]) -> str | None:
    """What the picture has as its horizontal axis: the lr where it is swept, else the first field of numbers."""
    numbers = [
        key
        for key in dict.fromkeys(key for result in results for key in result.settings)
        if all(_is_number(result.settings.get(key)) for result in results)
    ]
    return LR if LR in numbers else next(iter(numbers), None)


def draw(path: Path, results: Sequence[Result]) -> None:
    """Write the picture (PNG). Errors: UserError without matplotlib, and where no field of numbers is swept."""
    across = horizontal_field(results)
    if across is None:
        raise UserError("no field of numbers is swept, so there is nothing to draw recall against")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install --editable '.[report]'") from None
    figure = Figure(figsize=(8, 5.2), dpi=120, layout="constrained")
    panel = figure.subplots()
    _draw_lines(panel, across, results)
    panel.set_xlabel(across)
    panel.set_ylabel("mean standard R@1, %")
    values = [result.settings[across] for result in results]
    if min(values) > 0 and max(values) / min(values) >= 5:
        panel.set_xscale("log")
        panel.xaxis.set_minor_formatter(lambda value, _: "")
    panel.set_ylim(bottom=0, top=1.08 * max(result.best.get("mean_r1", 0.0) for result in results) or 1.0)
    panel.set_title(path.parent.resolve().name, fontweight="bold")
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    if panel.get_legend_handles_labels()[0]:
        panel.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    figure.savefig(buffer := io.BytesIO(), format="png")
    with whole_file(path, "--output_dir") as part:
        part.write_bytes(buffer.getvalue())


def _draw_lines(panel: Axes, across: str, results: Sequence[Result]) -> None:
    """A line for each combination of the other settings; the winner ringed, points without figures at the bottom."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for result in results:
        others = " ".join(f"{key}={shown(value)}" for key, value in result.settings.items() if key != across)
        if result.best:
            lines.setdefault(others, []).append((result.settings[across], result.best["mean_r1"]))
    if len(lines) <= MOST_LINES:
        for colour, (others, points) in zip(COLOURS, lines.items(), strict=False):
            panel.plot(*zip(*sorted(points), strict=True), "o-", color=colour, label=others or None, clip_on=False)
    else:
        points = [point for line in lines.values() for point in line]
        panel.plot(*zip(*points, strict=True), "o", color=COLOURS[0], clip_on=False)
    failed = [result.settings[across] for result in results if not result.best]
    if failed:
        panel.plot(failed, [0.0] * len(failed), "x", color="#777777", label="diverged or refused", clip_on=False)
    winner = ranked(results)[0]
    if winner.best:
        style: dict[str, Any] = {"markersize": 15, "markerfacecolor": "none", "markeredgecolor": "#444444"}
        panel.plot(
            winner.settings[across], winner.best["mean_r1"], "o", label=f"best: {winner.best['mean_r1']:.2f}", **style
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
