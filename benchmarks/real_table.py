"""The table and the figure of real_towers.py, from the run folders that it made; also while it is still running.

    python benchmarks/real_table.py real_towers/runs [--output benchmarks/real_towers.md]

Recalls are those of each run's last evaluation, in the standard protocol: mean ± standard deviation over seeds.
Training time is the sum of the steps' own times, without start-up, evaluation and the feature store; wall time is that
of the whole process, of each that was not killed. A run's time to 90 % is the training time up to the first evaluation
whose mean R@1 is at least 0.9 of its last.
What stands under `## Notes` in an earlier file of that name is kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from convclip.command_line import run
from convclip.files import whole_file, write_text
from convclip.schema import UserError

NOTES = "\n## Notes\n"
# What a run's folder has beside its own files: a row for each time that the run was started.
LAUNCHES = "launches.jsonl"
# Measured outside convclip: Lite0 average-pooled at 224 px + MiniLM mean-pooled, frozen, a linear head on each.
LINE = (27.0, 21.9)
RECALLS = ("i2t_r1", "i2t_r10", "t2i_r1", "t2i_r10")
SEEN = 0.9


class Experiment(NamedTuple):
    """A recipe, which training pictures it gets, and the seed's figures of the recipe that it mirrors.

    `part`: all, or first or second half. `seeds`: standard I2T R@1 and T2I R@1 on COCO val2017, worked out from the
    row-wise ones that the seed gives (README); None where the seed has no such run.
    """

    name: str
    part: str
    seeds: tuple[float, float] | None

    @property
    def recipe(self) -> str:
        return f"flickr8k_{self.name}"


# In the order in which they run: what everything else starts from comes first.
EXPERIMENTS = (
    Experiment("release", "first", None),
    Experiment("nofreeze", "all", (40.60, 29.39)),
    Experiment("unfreeze", "all", (47.75, 34.52)),
    Experiment("cliptext_unfreeze", "all", (45.35, 32.97)),
    Experiment("lite2_unfreeze", "all", None),
    Experiment("3stage", "second", (61.70, 45.43)),
    Experiment("distill_frozen", "second", (65.50, 48.61)),
    Experiment("distill_unfreeze", "second", (64.90, 47.44)),
    Experiment("headalign", "second", (65.55, 48.61)),
)
# Whose order is compared, best first by the mean of both R@1.
SERIES = {
    "small towers, all pictures": ("nofreeze", "unfreeze", "cliptext_unfreeze"),
    "from the release, second half": ("3stage", "distill_frozen", "distill_unfreeze", "headalign"),
}


@dataclass(frozen=True)
class Result:
    """What one run's folder says; `recalls` in the order of RECALLS, times in seconds."""

    recalls: tuple[float, ...]
    steps: int
    rate: float
    training: float
    to_most: float
    wall: float
    pictures: int

    @property
    def mean_r1(self) -> float:
        return (self.recalls[0] + self.recalls[2]) / 2


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, without a line that a kill left torn; [] where there is none."""
    rows = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def result_of(folder: Path) -> Result | None:
    """What a finished run's folder says; None for another."""
    launches, evaluations = rows_of(folder / LAUNCHES), rows_of(folder / "eval.jsonl")
    if not launches or launches[-1]["exit"] or not evaluations:
        return None
    steps = [row for row in rows_of(folder / "metrics.jsonl") if "step_seconds" in row]
    done, spent, seconds = 0, 0.0, {}
    for row in steps:
        spent += row["step_seconds"] * (row["step"] - done)
        done = row["step"]
        seconds[done] = spent
    samples = sum(row["step_seconds"] * row["samples_per_s"] for row in steps)
    r1 = {row["step"]: row["standard"]["i2t_r1"] + row["standard"]["t2i_r1"] for row in evaluations}
    last = evaluations[-1]
    first = next(step for step, found in r1.items() if found >= SEEN * r1[last["step"]])
    return Result(
        tuple(last["standard"][name] for name in RECALLS),
        done,
        samples / sum(row["step_seconds"] for row in steps),
        spent,
        seconds[first],
        sum(row["seconds"] for row in launches),
        last["images"],
    )


def read_results(runs: Path) -> dict[str, list[Result]]:
    """Results of the finished runs by experiment, in the order of EXPERIMENTS; its folders are NAME-seedN."""
    found = {}
    for experiment in EXPERIMENTS:
        folders = sorted(runs.glob(f"{experiment.name}-seed*"), key=lambda path: int(path.name.rpartition("seed")[2]))
        results = [result for result in map(result_of, folders) if result is not None]
        if results:
            found[experiment.name] = results
    return found


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (of a sample; 0 of a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def of_recall(results: Sequence[Result], name: str) -> tuple[float, float]:
    """Mean and standard deviation over runs of one of RECALLS."""
    return spread([result.recalls[RECALLS.index(name)] for result in results])


def beats_the_line(results: Sequence[Result]) -> bool:
    """Whether both R@1 lie above LINE by more than their standard deviation over at least two seeds."""
    found = [of_recall(results, name) for name in ("i2t_r1", "t2i_r1")]
    return len(results) > 1 and all(mean - off > line for (mean, off), line in zip(found, LINE, strict=True))


def table_lines(found: dict[str, list[Result]]) -> Iterator[str]:
    """The table of recalls and times, in Markdown."""
    yield (
        "| recipe | seeds | I2T R@1 | I2T R@10 | T2I R@1 | T2I R@10 | above the line | steps | samples/s | training s "
        "| s to 90 % | wall s |"
    )
    yield "|---" * 12 + "|"
    for name, results in found.items():
        recalls = [f"{mean:.1f} ± {off:.1f}" for mean, off in (of_recall(results, recall) for recall in RECALLS)]
        parts: tuple[Callable[[Result], float], ...] = (
            lambda result: result.rate,
            lambda result: result.training,
            lambda result: result.to_most,
            lambda result: result.wall,
        )
        times = [f"{statistics.fmean(map(part, results)):.0f}" for part in parts]
        above = "yes" if beats_the_line(results) else "no"
        cells = [f"`flickr8k_{name}`", str(len(results)), *recalls, above, str(results[0].steps), *times]
        yield f"| {' | '.join(cells)} |"
    pictures = next(iter(found.values()))[0].pictures
    yield f"| the line | | {LINE[0]} | 65.6 | {LINE[1]} | 64.0 | | | | | | |"
    chance = f"{100 / pictures:.1f} | {1000 / pictures:.1f}"
    yield f"| chance | | {chance} | {chance} | | | | | | |"


def order_lines(found: dict[str, list[Result]]) -> Iterator[str]:
    """The seed's order of each series beside ours, in Markdown."""
    seeds = {experiment.name: experiment.seeds for experiment in EXPERIMENTS}
    yield "| series | the seed's order, mean R@1 on COCO val2017 | here, mean R@1 ± standard deviation |"
    yield "|---|---|---|"
    for series, names in SERIES.items():
        theirs = {name: statistics.fmean(given) for name in names if (given := seeds[name]) is not None}
        ours = {name: spread([run.mean_r1 for run in found[name]]) for name in names if name in found}
        left = [f"{name} {mean:.1f}" for name, mean in sorted(theirs.items(), key=lambda item: -item[1])]
        right = [f"{name} {mean:.1f} ± {off:.1f}" for name, (mean, off) in sorted(ours.items(), key=lambda i: -i[1][0])]
        yield f"| {series} | {' > '.join(left)} | {' > '.join(right)} |"


def draw(found: dict[str, list[Result]], path: Path) -> None:
    """Both R@1 of each recipe with error bars and every seed's own, and what a recall cost. UserError as whole_file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.2), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    colours = {"i2t_r1": "#1f5f99", "t2i_r1": "#e08214"}
    for shift, (name, colour) in zip((-0.19, 0.19), colours.items(), strict=True):
        label = {"label": "image to text R@1" if name == "i2t_r1" else "text to image R@1"}
        for row, results in enumerate(found.values()):
            mean, off = of_recall(results, name)
            left.barh(row + shift, mean, 0.36, xerr=off, color=colour, alpha=0.8, capsize=3, **({} if row else label))
            own = [result.recalls[RECALLS.index(name)] for result in results]
            left.plot(own, [row + shift] * len(own), "o", color="black", markersize=2.5)
        line = LINE[list(colours).index(name)]
        left.axvline(line, color=colour, linestyle="--", linewidth=1.2, label=f"the line to beat, {line}")
    left.set_yticks(range(len(found)), list(found))
    left.invert_yaxis()
    left.set(xlabel="R@1, % (standard protocol)", title="Recall by recipe: mean, standard deviation, seeds")
    left.legend(fontsize=8, loc="lower right", framealpha=0.95)
    left.grid(axis="x", alpha=0.3)
    for name, results in found.items():
        (x, x_off), (y, y_off) = spread([r.training for r in results]), spread([r.mean_r1 for r in results])
        right.errorbar(x, y, xerr=x_off, yerr=y_off, fmt="o", capsize=2, markersize=6, label=name)
    right.set_xscale("log")
    # Room for the legend above and left of the points, where a high recall at no cost would be.
    right.margins(x=0.12, y=0.12)
    right.legend(fontsize=8, loc="upper left", framealpha=0.95)
    right.set(xlabel="training time, s (log)", ylabel="mean R@1, %", title="What a recall cost")
    right.grid(alpha=0.3, which="both")
    with whole_file(path) as part:
        figure.savefig(part, format="png")


def write_table(runs: Path, output: Path, heading: str) -> None:
    """Write `output` (.md) and a PNG beside it of the runs finished so far. Errors: UserError where there are none."""
    found = read_results(runs)
    if not found:
        raise UserError(f"{runs}: no finished run of benchmarks/real_towers.py")
    kept = output.read_text(encoding="utf-8").partition(NOTES)[2] if output.is_file() else ""
    figure = output.with_suffix(".png")
    parts = [heading, "\n".join(table_lines(found)), f"![recalls and times]({figure.name})"]
    parts += ["## The seed's order and ours", "\n".join(order_lines(found))]
    draw(found, figure)
    write_text(output, "\n\n".join(parts) + "\n" + (f"{NOTES}{kept}" if kept else ""))
    print(f"wrote {output} and {figure}: {sum(map(len, found.values()))} runs")


def main(options: argparse.Namespace) -> None:
    """Write both files anew, under the heading that the earlier one has."""
    heading = "# Real towers, real pictures"
    if options.output.is_file():
        heading = options.output.read_text(encoding="utf-8").partition(NOTES)[0].partition("\n\n| recipe ")[0].strip()
    write_table(options.runs, options.output, heading)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="the folder of runs that real_towers.py made")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("real_towers.md"), metavar="FILE.md")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run("real_table", main, parse_arguments()))
