"""Mix the weights that a run began with and those it ended with, and see what it gained and forgot (WiSE-FT).

    python tools/interpolate.py runs/tiny --data 'val-{000000..000004}.tar' --retained_data old.csv --output_dir mixed
    python tools/interpolate.py runs/tiny --data new.csv --zero_shot classes --output_dir mixed --choose

theta = (1 - alpha) start + alpha end (arXiv 2109.01903), for alpha from 0 to 1. Each mix is scored by the mean standard
R@1 on --data and by a retained measure: that of other data (--retained_data), or zero-shot top-1 of a class folder
(--zero_shot, as for launch/evaluate.py). Written are OUTPUT_DIR/interpolation.csv and interpolation.png, and with
--alpha, or --choose (the highest sum of both measures; of equal ones the larger alpha), OUTPUT_DIR/export.

The end is the run's best checkpoint, or the checkpoint that RUN is. The start is what the run began with, rebuilt from
its recipe, or --start: a run, a checkpoint or an export. What is new in the run, a head that began at random, has no
start worth mixing: it is the end's at every alpha, and said so. Running statistics of batch norms and the logit scale
are mixed as weights are. The recipe's events, losses and batch do not matter here. Needs no DeepSpeed.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convclip.command_line import add_ema, add_overrides, run
from convclip.files import whole_folder
from convclip.schema import Recipe, UserError

if TYPE_CHECKING:
    from convclip.engine.task import ImageTextTask
    from convclip.models.weight_mix import WeightMix

MOST_STEPS = 1000
COLOURS = ("#0072B2", "#D55E00")


@dataclass(frozen=True)
class Measure:
    """What every mix is scored by: `figures(model)` by name, the first of which is the score, in percent."""

    title: str
    figures: Callable[[Any], dict[str, float]]


@dataclass(frozen=True)
class Point:
    """A mix and its figures."""

    alpha: float
    new: dict[str, float]
    retained: dict[str, float]

    @property
    def scores(self) -> tuple[float, float]:
        """(retained, new)"""
        return next(iter(self.retained.values())), next(iter(self.new.values()))


def main(arguments: list[str] | None = None) -> int:
    """Mix, score, draw and perhaps export; 2 with one line on stderr where that is not possible."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder (its best) or a checkpoint of it")
    parser.add_argument("--data", required=True, help="what the run learned: evaluation shards or a CSV file")
    retained = parser.add_mutually_exclusive_group(required=True)
    retained.add_argument("--retained_data", help="what it may forget: evaluation shards or a CSV file")
    retained.add_argument("--zero_shot", type=Path, help="or a folder of classnames.txt, templates.txt and pictures")
    parser.add_argument("--output_dir", required=True, type=Path, help="new folder to write")
    parser.add_argument("--start", help="a run, a checkpoint or an export (default: what the run began with)")
    parser.add_argument("--steps", type=int, default=10, help="alpha goes from 0 to 1 in so many steps (10)")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--alpha", type=float, help="export the mix of this alpha, 0 to 1")
    choice.add_argument("--choose", action="store_true", help="export the mix with the highest sum of both measures")
    add_ema(parser)
    add_overrides(parser)
    return run("interpolate", interpolate, parser.parse_args(arguments))


def interpolate(options: argparse.Namespace) -> None:
    """Score every mix, then write the folder."""
    if not 1 <= options.steps <= MOST_STEPS:
        raise UserError(f"--steps {options.steps}: give a number from 1 to {MOST_STEPS}")
    if options.alpha is not None and not 0 <= options.alpha <= 1:
        raise UserError(f"--alpha {options.alpha}: give a number from 0 (the start) to 1 (the end)")
    # Imported late: --help should not wait for torch.
    from convclip.data.workers import plain_worker_errors
    from convclip.models.checkpoint_weights import checkpoint_path, load_from, recipe_of
    from convclip.models.export import refuse_in_use
    from convclip.run import open_task

    refuse_in_use(options.output_dir)
    _figure()
    recipe = recipe_of(checkpoint_path(options.run), options.overrides)
    if recipe.task == "video":
        raise UserError(f"{options.run} is a model of videos, whose mixes are not exported: name an image recipe's run")
    task: Any = open_task(recipe)
    new, retained = measures(task, options)
    model = task.build_model()
    path, state = load_from(model, options.run, options.ema)
    source = options.start or f"the start of {path.parent.parent.name}"
    mix = read_mix(task, model, path, options.start, source)
    print(f"start: {source}; end: {path}{', its moving average' if options.ema else ''}")
    kept = parts_of(mix.kept)
    if kept:
        print(f"the end's at every alpha, as it is new in the run: {', '.join(kept)}")
    with plain_worker_errors():
        points = score(model, mix, alphas(options.steps, options.alpha), new, retained)
    best = max(points, key=lambda point: (sum(point.scores), point.alpha))
    chosen = best if options.choose else next((p for p in points if p.alpha == options.alpha), None)
    marked, why = chosen or best, " has the highest sum of both" if chosen in (None, best) else " is exported"
    with whole_folder(options.output_dir, "--output_dir") as part:
        (part / "interpolation.csv").write_text(table(points), encoding="utf-8")
        (part / "interpolation.png").write_bytes(draw(points, marked, f"alpha {marked.alpha:.3g}{why}", new, retained))
    print(f"wrote {options.output_dir}/interpolation.csv and interpolation.png")
    print(f"the highest sum of both has alpha {best.alpha:g}" + ("" if chosen else ": --choose exports it"))
    if chosen is not None:
        model.load_state_dict(mix.at(chosen.alpha))
        export(model, recipe, options, about(chosen, new, retained, source), path, state)


def measures(task: ImageTextTask, options: argparse.Namespace) -> tuple[Measure, Measure]:
    """What the run learned and what it may forget, read before any work. Errors: UserError."""
    import torch

    from convclip.devices import pick_device
    from convclip.evaluation.run_record import base_name

    device = pick_device(None)

    def recall(data: str) -> Measure:
        evaluation = task.evaluation(data)

        def figures(model: Any) -> dict[str, float]:
            found = evaluation.figures(model, device, torch.float32)["standard"]
            return {
                "mean_r1": (found["i2t_r1"] + found["t2i_r1"]) / 2,
                "i2t_r1": found["i2t_r1"],
                "t2i_r1": found["t2i_r1"],
            }

        return Measure(f"mean standard R@1 on {base_name(data)}, %", figures)

    if options.zero_shot is None:
        return recall(options.data), recall(options.retained_data)
    classes = task.zero_shot(options.zero_shot)

    def top(model: Any) -> dict[str, float]:
        found = classes.figures(model, device, torch.float32)
        return {"top1": found["top1"], "top5": found["top5"]}

    return recall(options.data), Measure(f"zero-shot top-1 on {base_name(str(options.zero_shot))}, %", top)


def read_mix(task: ImageTextTask, model: Any, checkpoint: Path, start: str | None, source: str) -> WeightMix:
    """The mix of the start, as the command line names it, and the weights that `model` has. Errors: UserError."""
    import torch

    import convclip
    from convclip.models.checkpoint_weights import trained_names
    from convclip.models.weight_mix import mix_weights

    end = {name: value.clone() for name, value in model.state_dict().items()}
    if start is not None:
        return mix_weights(model, convclip.load(start, "cpu").model.state_dict(), end, (), source)
    began, report = task.initial_model()
    weights = began.state_dict()
    # What never trained is as it was, so it tells whether this is what the run began with.
    still = [name for name, _ in model.named_parameters() if name not in {*trained_names(checkpoint), *report.new}]
    wrong = [name for name in still if not torch.equal(weights[name], end[name])]
    if wrong:
        raise UserError(
            f"{source}, rebuilt from its recipe, has another {wrong[0]} than the run, which never trained it: the "
            "pretrained weights were changed, or the run was taken up from another; name what it began with (--start)"
        )
    return mix_weights(model, weights, end, report.new, source)


def alphas(steps: int, more: float | None) -> list[float]:
    """0, 1/steps, … 1, and one more."""
    return sorted({*(number / steps for number in range(steps + 1)), *([] if more is None else [more])})


def score(model: Any, mix: WeightMix, at: Sequence[float], new: Measure, retained: Measure) -> list[Point]:
    """Both measures of every mix; each is printed as it comes."""
    from convclip.devices import pick_device

    model.to(pick_device(None)).eval()
    points: list[Point] = []
    print(f"{'alpha':>8}{'new':>10}{'retained':>10}    new: {new.title}; retained: {retained.title}")
    for alpha in at:
        model.load_state_dict(mix.at(alpha))
        points.append(Point(alpha, new.figures(model), retained.figures(model)))
        kept, gained = points[-1].scores
        print(f"{alpha:>8.3g}{gained:>10.2f}{kept:>10.2f}", flush=True)
    return points


def table(points: Sequence[Point]) -> str:
    """A row for each mix as CSV."""
    names = [f"new_{key}" for key in points[0].new] + [f"retained_{key}" for key in points[0].retained]
    rows = [[point.alpha, *point.new.values(), *point.retained.values()] for point in points]
    return (
        "\n".join([",".join(["alpha", *names]), *(",".join(f"{value:.10g}" for value in row) for row in rows)]) + "\n"
    )


def _figure() -> Any:
    """matplotlib's Figure; UserError without matplotlib, before any work."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install --editable '.[report]'") from None
    return Figure


def draw(points: Sequence[Point], marked: Point, what: str, new: Measure, retained: Measure) -> bytes:
    """A PNG: on the left the curve in the plane of both measures, alpha beside it; on the right both over alpha.

    `what` says why the point `marked` is.
    """
    figure = _figure()(figsize=(13, 6), dpi=120, layout="constrained")
    plane, over = figure.subplots(1, 2)
    kept, gained = zip(*(point.scores for point in points), strict=True)
    plane.plot(kept, gained, "o-", color=COLOURS[0], markersize=5, linewidth=1.5)
    for place in dict.fromkeys(point.scores for point in points):
        # Mixes that score alike share a label.
        label = ", ".join(f"{point.alpha:.3g}" for point in points if point.scores == place)
        plane.annotate(label, place, xytext=(6, 5), textcoords="offset points", fontsize=9)
    ring = {"markersize": 13, "markerfacecolor": "none", "color": COLOURS[1], "linestyle": "none"}
    plane.plot(*marked.scores, marker="o", label=what, **ring)
    plane.set(
        xlabel=f"retained: {retained.title}",
        ylabel=f"new: {new.title}",
        title="the curve of mixes: alpha 0 is the start, 1 the end",
    )
    at = [point.alpha for point in points]
    over.plot(at, gained, "o-", color=COLOURS[0], markersize=4, label=f"new: {new.title}")
    over.plot(at, kept, "s--", color=COLOURS[1], markersize=4, label=f"retained: {retained.title}")
    over.axvline(marked.alpha, color="#666666", linestyle=":", linewidth=1.2)
    over.set(xlabel="alpha, the end's share", ylabel="%", title="both measures over alpha")
    for panel in (plane, over):
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(0.08)
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False, fontsize=9)
    figure.savefig(buffer := io.BytesIO(), format="png")
    return buffer.getvalue()


def about(chosen: Point, new: Measure, retained: Measure, source: str) -> str:
    """What the model card says of a mix."""
    from convclip.evaluation.run_record import base_name

    kept, gained = chosen.scores
    return (
        f"A mix of weights, {1 - chosen.alpha:.3g} of `{base_name(source)}` and {chosen.alpha:.3g} of the run's "
        f"(WiSE-FT, arXiv 2109.01903). It has {gained:.2f} ({new.title}), and {kept:.2f} ({retained.title})."
    )


def export(model: Any, recipe: Recipe, options: argparse.Namespace, recalls: str, path: Path, state: Any) -> None:
    """Write OUTPUT_DIR/export, and say how to use it."""
    from convclip.evaluation.run_record import about_run
    from convclip.exports import write_export

    folder = options.output_dir / "export"
    text = about_run(path, recipe, state, options.ema, recalls)
    print("\n".join([f"wrote {folder}", *write_export(model.cpu(), recipe, folder, "open_clip", text)]))


def parts_of(names: Sequence[str]) -> list[str]:
    """`visual.head (6 tensors)`: names gathered by their first two words; counters are left out."""
    counts: dict[str, int] = {}
    for name in names:
        if not name.endswith("num_batches_tracked"):
            part = ".".join(name.split(".")[:2])
            counts[part] = counts.get(part, 0) + 1
    return [f"{part} ({count} tensor{'s' if count > 1 else ''})" for part, count in counts.items()]


if __name__ == "__main__":
    sys.exit(main())
