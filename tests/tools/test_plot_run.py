"""The curves of a run: what is read, what is drawn, what is said when it cannot be."""

import json
import math
import re
import sys

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from tools import plot_run

EVENTS = [
    {"event": "unfreeze", "step": 30, "epoch": 3, "tower": "text", "opened": "last 6 layers", "parameters": 43_347_968},
    {
        "event": "unfreeze",
        "step": 60,
        "epoch": 6,
        "tower": "image",
        "opened": "last 4 groups",
        "parameters": 15_488_256,
    },
]


def step_row(step):
    lr = 1e-3 * (1 - step / 100)
    rates = {"image.decay": lr, "image.no_decay": lr, "logit_scale.no_decay": lr}
    for number, event in enumerate(EVENTS):
        if step > event["step"]:
            rates[f"{event['tower']}.event{number}.decay"] = rates[f"{event['tower']}.event{number}.no_decay"] = lr / 10
    loss = 6 * math.exp(-step / 50)
    parts = {"loss_contrastive": loss - 0.1, "loss_teacher": 0.1}
    return {
        "step": step,
        "epoch": step // 10,
        "loss": loss,
        **parts,
        "loss_scale": 65536.0,
        "lr": rates,
        "logit_scale": 14.3,
    }


def evaluation(step):
    standard = {f"{way}_r{k}": step / 2 + k for way in ("i2t", "t2i") for k in (1, 5, 10)}
    rowwise = {key: value / 5 for key, value in standard.items()}
    return {"step": step, "epoch": step // 10, "standard": standard, "rowwise": rowwise, "val_loss": 3.0}


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "runs" / "tiny <b>"
    folder.mkdir(parents=True)
    rows = [step_row(step) for step in range(10, 101, 10)] + [{**event, "lr_scale": 0.1} for event in EVENTS]
    rows.sort(key=lambda row: row["step"])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "eval.jsonl").write_text("".join(json.dumps(evaluation(step)) + "\n" for step in (50, 100)))
    return folder


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is drawn."""
    drawn = []
    plain = plot_run.png
    monkeypatch.setattr(plot_run, "png", lambda figure: (drawn.append(figure), plain(figure))[1])
    return drawn


def labels(panel):
    return panel.get_legend_handles_labels()[1]


def test_it_writes_a_picture_and_leaves_nothing_half_done(run_folder, capsys):
    assert plot_run.main([str(run_folder)]) == 0
    assert (run_folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in run_folder.iterdir()} == {"metrics.jsonl", "eval.jsonl", "plot.png"}
    assert capsys.readouterr().out == f"wrote {run_folder / 'plot.png'}\n"


def test_the_four_panels_show_what_the_files_hold(run_folder, figures):
    plot_run.draw(plot_run.read_run(run_folder))
    loss, lr, scale, recall = figures[0].axes
    assert labels(loss) == ["loss", "contrastive", "teacher", "validation"]
    assert list(loss.lines[0].get_ydata()) == [step_row(step)["loss"] for step in range(10, 101, 10)]
    assert list(loss.lines[3].get_xdata()) == [50, 100]
    assert list(scale.lines[0].get_ydata()) == [14.3] * 10
    assert "standard" in recall.get_title()
    assert labels(recall) == [f"{way} R@{k}" for k in (1, 5, 10) for way in ("I→T", "T→I")]
    assert list(recall.lines[1].get_ydata()) == [26, 51]
    assert lr.get_yscale() == "log"


def test_groups_of_one_curve_share_a_line_named_after_their_event(run_folder, figures):
    plot_run.draw(plot_run.read_run(run_folder))
    lr = figures[0].axes[1]
    assert labels(lr) == ["image, logit_scale", "text (opened at 1)", "image (opened at 2)"]
    # The last step's lr is 0, which a log axis cannot show.
    assert [list(line.get_xdata()) for line in lr.lines[:3]] == [
        list(range(10, 91, 10)),
        list(range(40, 91, 10)),
        list(range(70, 91, 10)),
    ]


def test_events_are_marked_on_every_panel_and_explained_below(run_folder, figures):
    plot_run.draw(plot_run.read_run(run_folder))
    for panel in figures[0].axes:
        assert [text.get_text() for text in panel.texts] == ["1", "2"]
        assert [list(line.get_xdata()) for line in panel.lines[-2:]] == [[30, 30], [60, 60]]
    notes = figures[0].get_supxlabel().splitlines()
    assert notes[0] == "1: at step 30 (epoch 3) the text tower opens: last 6 layers, 43,347,968 parameters, lr x 0.1"
    assert "image tower" in notes[1]


def test_no_text_covers_another(run_folder, figures):
    plot_run.draw(plot_run.read_run(run_folder))
    figure = figures[0]
    renderer = FigureCanvasAgg(figure).get_renderer()
    for panel in figure.axes:
        boxes = [text.get_window_extent(renderer) for text in (panel.title, *panel.texts)]
        if panel.get_legend():
            boxes.append(panel.get_legend().get_window_extent(renderer))
        boxes += [panel.get_window_extent(renderer), panel.xaxis.label.get_window_extent(renderer)]
        for number, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[number + 1 :])


def test_markers_that_would_touch_are_joined():
    events = [{"step": 0}, {"step": 300}, {"step": 310}, {"step": 1000}]
    assert plot_run.markers(events, 1000) == [(0, "1"), (300, "2, 3"), (1000, "4")]


def test_many_points_get_a_running_mean(run_folder, figures):
    rows = [{"step": step, "loss": float(step % 2)} for step in range(1000)]
    plot_run.draw(plot_run.Run("long", rows, [], []))
    raw, mean = figures[0].axes[0].lines
    assert len(raw.get_xdata()) == 1000
    assert labels(figures[0].axes[0]) == ["loss (mean of 20)"]
    assert set(mean.get_ydata()) == {0.5} and mean.get_xdata()[0] == 19


def test_a_run_without_evaluation_or_with_row_wise_alone_says_so(run_folder, figures):
    (run_folder / "eval.jsonl").unlink()
    plot_run.draw(plot_run.read_run(run_folder))
    assert "no evaluation yet" in [text.get_text() for text in figures[0].axes[3].texts]
    row = evaluation(50)
    del row["standard"]
    (run_folder / "eval.jsonl").write_text(json.dumps(row) + "\n")
    plot_run.draw(plot_run.read_run(run_folder))
    assert "rowwise" in figures[1].axes[3].get_title()


def test_numbers_that_are_not_finite_leave_a_gap(run_folder):
    rows = [
        {**step_row(step), "loss": math.nan if step == 50 else 1.0, "loss_scale": None} for step in range(10, 101, 10)
    ]
    (run_folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert plot_run.main([str(run_folder)]) == 0


def test_a_line_still_being_written_is_left_out(run_folder):
    before = plot_run.read_run(run_folder)
    with open(run_folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 110, "lo')
    assert plot_run.read_run(run_folder) == before


def test_the_page_names_both_protocols_and_escapes_names(run_folder):
    assert plot_run.main([str(run_folder), "--html"]) == 0
    page = (run_folder / "report" / "index.html").read_text()
    assert "<h1>tiny &lt;b&gt;</h1>" in page and "data:image/png;base64," in page
    assert re.findall(r"<td>(standard|rowwise)</td>", page) == ["standard", "rowwise"] * 2
    assert "last 6 layers, 43,347,968 parameters" in page


@pytest.mark.parametrize(
    "content, words",
    [(None, "no logged step"), ("", "no logged step"), ("{}\n", "line 1"), ('{"step": 1}\nnonsense\n', "line 2")],
)
def test_files_that_cannot_be_read_are_one_line(run_folder, content, words, capsys):
    if content is None:
        (run_folder / "metrics.jsonl").unlink()
    else:
        (run_folder / "metrics.jsonl").write_text(content)
    assert plot_run.main([str(run_folder)]) == 2
    error = capsys.readouterr().err
    assert words in error and "metrics.jsonl" in error and error.count("\n") == 1


def test_a_missing_folder_is_named(tmp_path, capsys):
    assert plot_run.main([str(tmp_path / "absent")]) == 2
    assert "absent is not a run folder" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_named(run_folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert plot_run.main([str(run_folder), "--output", str(tmp_path / "file" / "plot.png")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_without_matplotlib_one_line_says_what_to_install(run_folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plot_run.main([str(run_folder)]) == 2
    error = capsys.readouterr().err
    assert "matplotlib" in error and "[report]" in error and error.count("\n") == 1


def test_one_run_gives_one_picture(run_folder):
    assert plot_run.draw(plot_run.read_run(run_folder)) == plot_run.draw(plot_run.read_run(run_folder))


def test_ticks_are_whole_steps_and_none_is_there_twice(run_folder, figures):
    for count in (2, 3, 5):
        plot_run.draw(plot_run.Run("short", [{**step_row(step), "lr": {}} for step in range(1, count + 1)], [], []))
        panel = figures[-1].axes[0]
        FigureCanvasAgg(figures[-1]).draw()
        ticks = [label.get_text() for label in panel.get_xticklabels()]
        assert len(set(ticks)) == len(ticks) > 1, ticks


def test_spikes_do_not_flatten_the_rest_and_are_named(figures):
    rows = [
        {"step": step, "loss": 1 + 5 * math.exp(-step / 30), "loss_a": 0.1, "loss_b": 0.2} for step in range(1, 101)
    ]
    rows[70]["loss"], rows[80]["loss"] = 250.0, math.inf
    plot_run.draw(plot_run.Run("spiky", rows, [], []))
    panel = figures[0].axes[0]
    bottom, top = panel.get_ylim()
    assert -0.5 < bottom < 0.1 and 6 < top < 9
    assert panel.get_title() == "loss (up to 250 at step 71)"
    # Without one the range is the data's, all of it.
    rows[70]["loss"] = rows[80]["loss"] = 1.5
    plot_run.draw(plot_run.Run("smooth", rows, [], []))
    assert figures[1].axes[0].get_title() == "loss" and figures[1].axes[0].get_ylim()[1] > rows[0]["loss"]


def test_every_legend_entry_has_a_line_to_see(run_folder, figures):
    """A group whose event opened it just now has one point, which no line shows; a small lr is not below the axis."""
    rows = [{**step_row(step), "lr": {"image.decay": 1e-3, "temporal.decay": 1e-7}} for step in (10, 20)]
    rows[1]["lr"]["text.event0.decay"] = 1e-4
    plot_run.draw(plot_run.Run("run", rows, [{**EVENTS[0], "step": 10}], []))
    lr = figures[0].axes[1]
    lines = [line for line in lr.lines if not line.get_label().startswith("_")]
    assert [line.get_label() for line in lines] == ["image", "temporal", "text (opened at 1)"]
    bottom, top = lr.get_ylim()
    for line in lines:
        assert len(line.get_xdata()) > 1 or line.get_marker() == "."
        assert all(bottom < rate < top for rate in line.get_ydata())
    # Two ways with equal recalls: the one below is the wider.
    plot_run.draw(plot_run.read_run(run_folder))
    widths = [line.get_linewidth() for line in figures[1].axes[3].lines[:2]]
    assert widths[0] > widths[1]


def test_layers_have_their_number_in_the_legend(run_folder, figures):
    rates = {"image.layer00.decay": 1e-5, "image.decay": 1e-3, "text.event0.layer11.no_decay": 1e-4}
    rows = [{**step_row(step), "lr": rates} for step in (40, 50)]
    plot_run.draw(plot_run.Run("run", rows, EVENTS[:1], []))
    assert labels(figures[0].axes[1]) == ["image layer 0", "image", "text layer 11 (opened at 1)"]


def test_the_page_has_no_empty_columns_or_rows(run_folder):
    videos = {f"{way}_r{k}": 10.0 * k for way in ("t2v", "v2t") for k in (1, 5)}
    (run_folder / "eval.jsonl").write_text(json.dumps({"step": 50, "epoch": 4, "standard": videos}) + "\n")
    page = plot_run.page(plot_run.read_run(run_folder), b"")
    assert re.findall("<th>(.*?)</th>", page)[3:] == ["V2T R@1", "T2V R@1", "V2T R@5", "T2V R@5"]
    assert page.count("<tr>") == 2 and "<td></td>" not in page
    (run_folder / "eval.jsonl").unlink()
    page = plot_run.page(plot_run.Run("bare", [step_row(10)], [], []), b"")
    assert "<table>" not in page and "no evaluation yet" in page and "Unfreeze" not in page


def test_a_byte_order_mark_is_no_matter(run_folder):
    before = plot_run.read_run(run_folder)
    for name in ("metrics.jsonl", "eval.jsonl"):
        path = run_folder / name
        path.write_text(path.read_text(), encoding="utf-8-sig")
    assert plot_run.read_run(run_folder) == before
