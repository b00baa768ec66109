"""The notebooks of examples/ run from top to bottom, offline, on the tiny run that 0.1.0 left; no window opens."""

from __future__ import annotations

import json
import sys

import matplotlib
import pytest

from tests.conftest import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "examples").glob("*.ipynb"))
RUN = REPOSITORY / "tests" / "fixtures" / "0.1.0" / "run"


def cells_of(path, kind):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


@pytest.fixture
def in_jupyter(monkeypatch):
    """An environment like a kernel's, started at the repository's root."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("CONVCLIP_SOURCE", str(RUN))
    # The notebook adds tools/ to the path.
    monkeypatch.setattr(sys, "path", list(sys.path))
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = []
    monkeypatch.setattr(pyplot, "show", lambda: shown.append(pyplot.gcf()) or pyplot.close())
    return shown


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, in_jupyter, capsys):
    namespace: dict = {"__name__": "__main__"}
    for number, source in enumerate(cells_of(path, "code")):
        exec(compile(source, f"{path.name}, code cell {number}", "exec"), namespace)
    assert len(in_jupyter) == 4 and all(figure.axes for figure in in_jupyter)
    assert namespace["images"].shape == namespace["texts"].shape == (24, 16)
    assert "of 24 pictures find their own caption first" in capsys.readouterr().out


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_a_whole_one_without_outputs(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5) and notebook["metadata"]["kernelspec"]
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells if "outputs" in cell)
    # The run that it names by default is the one that `make demo` leaves.
    assert '"demo" / "run"' in cells_of(path, "code")[0]
    assert "--output_dir demo/run" in (REPOSITORY / "Makefile").read_text()


def test_there_is_a_notebook():
    assert NOTEBOOKS
