"""Draw a run: loss and its parts, lr of every group, logit scale and recalls over steps, unfreeze events marked.

    python tools/plot_run.py runs/tiny [--output curves.png] [--html]

Reads metrics.jsonl and eval.jsonl, also of a run that is still going. Writes RUN_FOLDER/plot.png, and with --html the
page RUN_FOLDER/report/index.html. Needs matplotlib (the `report` extra).
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from convclip.command_line import run
from convclip.files import whole_file, writing
from convclip.schema import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours: told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#B0A000")
RECALLS = tuple(f"{way}_r{k}" for k in (1, 5, 10) for way in ("i2t", "t2i", "v2t", "t2v"))  # Both ways of each recall.
POINT = ("", ".")  # marker of a curve that is a line, and of one that is a single point
LEAST_GAP = 0.03  # markers of events closer than this share of the run would cover each other: they share one


@dataclass(frozen=True)
class Run:
    """What the files of a run folder say: logged steps, unfreeze events, evaluations, each in the order written."""

    name: str
    steps: list[dict[str, Any]]
    events: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]


def main(arguments: list[str] | None = None) -> int:
    """Draw the run that the command line names; 2 with one line on stderr when it cannot be drawn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_folder", type=Path, help="the --output_dir of a run")
    parser.add_argument("--output", type=Path, help="picture to write, PNG (default: RUN_FOLDER/plot.png)")
    parser.add_argument("--html", action="store_true", help="write RUN_FOLDER/report/index.html as well")
    return run("plot_run", plot, parser.parse_args(arguments))


def plot(options: argparse.Namespace) -> None:
    """Draw the run and say what was written."""
    found = read_run(options.run_folder)
    picture = draw(found)
    paths = {options.output or options.run_folder / "plot.png": picture}
    if options.html:
        paths[options.run_folder / "report" / "index.html"] = page(found, picture).encode()
    for path, content in paths.items():
        write(path, content)
        print(f"wrote {path}")


def read_run(folder: Path) -> Run:
    """Read a run folder; UserError when it holds no logged step."""
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is not a run folder: name the --output_dir of a run")
    rows = read_rows(folder / "metrics.jsonl")
    steps, events = [row for row in rows if "loss" in row], [row for row in rows if row.get("event") == "unfreeze"]
    if not steps:
        raise UserError(f"{folder / 'metrics.jsonl'} has no logged step yet")
    return Run(folder.resolve().name, steps, events, read_rows(folder / "eval.jsonl"))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file, none where it is absent; a last line without its end is still being written."""
    lines = path.read_text(encoding="utf-8-sig").split("\n")[:-1] if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UserError(f"{path} line {number} is not an object with a step")
        rows.append(row)
    return rows


def draw(run: Run) -> bytes:
    """The four panels as a PNG; UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install --editable '.[report]'") from None
    notes = [event_note(*item) for item in enumerate(run.events, 1)]
    figure = Figure(figsize=(13, 8.6 + 0.22 * len(notes)), dpi=120, layout="constrained")
    figure.suptitle(run.name, fontsize=14, fontweight="bold")
    panels = figure.subplots(2, 2, sharex=True).flat
    for panel, content in zip(panels, (draw_loss, draw_lr, draw_logit_scale, draw_recalls), strict=True):
        content(panel, run)
        finish(panel, run)
    if notes:
        figure.supxlabel("\n".join(notes), fontsize=9.5, x=0.01, ha="left", linespacing=1.5)
    return png(figure)


def draw_loss(panel: Axes, run: Run) -> None:
    """Loss and parts; where there are many points, thin, with a running mean over a fiftieth of them."""
    panel.set_title("loss")
    parts = sorted({key for row in run.steps for key in row if key.startswith("loss_")} - {"loss_scale"})
    for colour, key in zip(COLOURS, ["loss", *parts], strict=False):
        steps, values = series(run.steps, key)
        if len(values) < 100:
            panel.plot(steps, values, color=colour, label=key.removeprefix("loss_"), marker=POINT[len(values) == 1])
            continue
        window = len(values) // 50
        means = [sum(values[i : i + window]) / window for i in range(len(values) - window + 1)]
        panel.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        panel.plot(steps[window - 1 :], means, color=colour, label=f"{key.removeprefix('loss_')} (mean of {window})")
    steps, values = series(run.evaluations, "val_loss")
    if values:
        panel.plot(steps, values, "o--", color="#444444", markersize=4, linewidth=1, label="validation")
    leave_out_spikes(panel, [*zip(*series(run.steps, "loss"), strict=True), *zip(steps, values, strict=True)])


def leave_out_spikes(panel: Axes, points: list[tuple[int, float]]) -> None:
    """End the y axis below the few values that would flatten all the others; the title says so."""
    finite = sorted((value, step) for step, value in points if math.isfinite(value))
    if len(finite) < 20:
        return
    (lowest, _), (usual, _), (highest, step) = finite[0], finite[len(finite) * 49 // 50 - 1], finite[-1]
    span = (usual - lowest) or abs(usual) or 1.0
    if highest > usual + 2 * span:
        bottom = min(v for line in panel.lines for v in cast(Any, line.get_ydata()) if math.isfinite(v))
        panel.set_ylim(bottom - span / 20, usual + span / 4)
        panel.set_title(f"{panel.get_title()} (up to {highest:.4g} at step {step:,})")


def draw_lr(panel: Axes, run: Run) -> None:
    """lr of the groups; groups that share a curve, as a part's decay and no_decay ones do, share a line."""
    panel.set_title("learning rate")
    curves: dict[tuple, list[str]] = {}
    for name in dict.fromkeys(name for row in run.steps for name in row.get("lr", {})):
        # A log axis has no zero, which the schedule reaches at its end.
        points = tuple((row["step"], row["lr"][name]) for row in run.steps if row.get("lr", {}).get(name))
        if points:
            curves.setdefault(points, []).append(group_label(name, points[0][0], run.events))
    for number, (points, names) in enumerate(curves.items()):
        # Groups opened at different times often end on one curve: the earlier, wider line shows beside the later.
        colour, width = COLOURS[number % len(COLOURS)], max(1.2, 3.6 - 0.8 * number)
        style: dict[str, Any] = {"color": colour, "linewidth": width, "marker": POINT[len(points) == 1]}
        panel.plot(*zip(*points, strict=True), label=", ".join(dict.fromkeys(names)), **style)
    panel.set_yscale("log")
    if curves:
        # Two decades below the lowest curve's peak: the cosine's end goes down without end on a log axis.
        peaks = [max(rate for _, rate in points) for points in curves]
        panel.set_ylim(bottom=max(min(rate for points in curves for _, rate in points), min(peaks) / 100) / 1.5)


def group_label(name: str, first_step: int, events: list[dict[str, Any]]) -> str:
    """A parameter group as the plot names it: part of the model, layer, and the number of the event that opened it."""
    part, *more = name.removesuffix(".no_decay").removesuffix(".decay").split(".")
    shown = " ".join([part, *(f"layer {int(word[5:])}" for word in more if word.startswith("layer"))])
    at = [f" at {n}" for n, row in enumerate(events, 1) if row.get("tower") == part and row["step"] <= first_step]
    is_opened = any(word.startswith("event") for word in more)
    return f"{shown} (opened{at[-1] if at else ''})" if is_opened else shown


def draw_logit_scale(panel: Axes, run: Run) -> None:
    """exp(logit_scale), the factor on the cosines."""
    panel.set_title("logit scale")
    steps, values = series(run.steps, "logit_scale")
    panel.plot(steps, values, color=COLOURS[0], marker=POINT[len(values) == 1])
    leave_out_spikes(panel, list(zip(steps, values, strict=True)))


def draw_recalls(panel: Axes, run: Run) -> None:
    """Standard recalls; row-wise ones only where there are no others, and named."""
    protocol = "rowwise" if run.evaluations and not any(row.get("standard") for row in run.evaluations) else "standard"
    rows = [{**row.get(protocol, {}), "step": row["step"]} for row in run.evaluations]
    panel.set_title(f"{protocol} recall, %")
    for number, key in enumerate(RECALLS):
        steps, values = series(rows, key)
        if values:
            way, k = key.split("_r")
            label = f"{way.upper().replace('2', '→')} R@{k}"
            # The wider, paler line shows beside the other way's where the two are equal.
            style: dict[str, Any] = {"linestyle": "--", "marker": "s", "linewidth": 1.2, "markersize": 3}
            if way.endswith("t"):
                style = {"linestyle": "-", "marker": "o", "linewidth": 3, "markersize": 6, "alpha": 0.5}
            panel.plot(steps, values, color=COLOURS[number // 4], label=label, **style)
    if panel.lines:
        panel.set_ylim(bottom=0)
    else:
        style = {"ha": "center", "color": "#777777", "backgroundcolor": "white", "zorder": 3}
        panel.text(0.5, 0.5, "no evaluation yet", transform=panel.transAxes, **style)
        panel.set_yticks([])


def finish(panel: Axes, run: Run) -> None:
    """Events, grid, axis labels and a legend below the panel, where it covers nothing."""
    for step, label in markers(run.events, max(row["step"] for row in run.steps + run.evaluations)):
        panel.axvline(step, color="#666666", linestyle=":", linewidth=1.2)
        where: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "xytext": (0, 2)}
        style: dict[str, Any] = {
            "textcoords": "offset points",
            "ha": "center",
            "va": "bottom",
            "fontsize": 9,
            "color": "#444444",
        }
        panel.annotate(label, (step, 1.0), **where, **style)
    # The event numbers stand between panel and title.
    panel.set_title(panel.get_title(), pad=18 if run.events else 6)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelbottom=True)
    panel.locator_params(axis="x", integer=True)
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    panel.set_xlabel("step", fontsize=9)
    if panel.get_legend_handles_labels()[0]:
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, frameon=False, fontsize=9)


def markers(events: list[dict[str, Any]], last_step: int) -> list[tuple[int, str]]:
    """(step, label) of the event lines: numbers from 1, joined where lines would touch."""
    placed: list[tuple[int, str]] = []
    for number, event in enumerate(events, 1):
        if placed and event["step"] - placed[-1][0] <= LEAST_GAP * last_step:
            placed[-1] = (placed[-1][0], f"{placed[-1][1]}, {number}")
        else:
            placed.append((event["step"], str(number)))
    return placed


def event_note(number: int, event: dict[str, Any]) -> str:
    """What an event's number stands for."""
    return (
        f"{number}: at step {event['step']:,} (epoch {event.get('epoch')}) the {event.get('tower')} tower opens: "
        f"{event.get('opened')}, {event.get('parameters', 0):,} parameters, lr x {event.get('lr_scale', 1):g}"
    )


def series(rows: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """(steps, values) of the rows that have a number under `key`."""
    points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
    return [step for step, _ in points], [value for _, value in points]


def png(figure: Figure) -> bytes:
    """The figure as PNG bytes."""
    figure.savefig(buffer := io.BytesIO(), format="png")
    return buffer.getvalue()


def page(run: Run, picture: bytes) -> str:
    """A page of its own: the curves, every evaluation under the protocols it has, and the events."""
    notes = "<br>\n".join(html.escape(event_note(*item)) for item in enumerate(run.events, 1))
    events = f"<h2>Unfreeze events</h2>\n<p>{notes}</p>\n" if notes else ""
    style = "body{font-family:sans-serif;margin:2em} td,th{padding:.2em .8em;text-align:right} img{max-width:100%}"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(run.name)}</title><style>{style}</style></head><body>
<h1>{html.escape(run.name)}</h1>
<img alt="curves of the run" src="data:image/png;base64,{base64.b64encode(picture).decode()}">
<h2>Retrieval, %</h2>
{recall_table(run)}
{events}</body></html>
"""


def recall_table(run: Run) -> str:
    """Every evaluation's recalls, a row for each protocol it has and a column for each recall that any of them has."""
    rows = [(row, protocol) for row in run.evaluations for protocol in ("standard", "rowwise") if row.get(protocol)]
    keys = [key for key in RECALLS if any(key in row[protocol] for row, protocol in rows)]
    if not keys:
        return "<p>no evaluation yet</p>"
    head, body = "".join(f"<th>{name.replace('_r', ' R@').upper()}</th>" for name in keys), ""
    for row, protocol in rows:
        cells = "".join(f"<td>{row[protocol][key]:.2f}</td>" if key in row[protocol] else "<td></td>" for key in keys)
        epoch = html.escape(str(row.get("epoch")))
        body += f"<tr><td>{row['step']:,}</td><td>{epoch}</td><td>{protocol}</td>{cells}</tr>\n"
    return f"<table><tr><th>step</th><th>epoch</th><th>protocol</th>{head}</tr>\n{body}</table>"


def write(path: Path, content: bytes) -> None:
    """Write a file so that it appears whole or not at all."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
        part.write_bytes(content)


if __name__ == "__main__":
    sys.exit(main())
