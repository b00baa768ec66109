"""Nobody runs the benchmarks between releases: they must still fit the package that they measure."""

import importlib

import pytest

from tests.conftest import REPOSITORY

FOLDER = REPOSITORY / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_benchmark_imports_and_says_its_command(name, monkeypatch):
    # As python does for a script; some take parts of another.
    monkeypatch.syspath_prepend(FOLDER)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Peers that are measured against may be absent.
        assert error.name in ("open_clip_train", "psutil"), error
        pytest.skip(f"{error.name} is not installed")
    assert f"python benchmarks/{name}.py" in module.__doc__


def test_results_name_benchmarks_that_exist():
    words = (FOLDER / "RESULTS.md").read_text().replace("`", " ").split()
    named = {word for word in words if word.startswith("benchmarks/") and word.endswith(".py")}
    assert named and named <= {f"benchmarks/{name}.py" for name in SCRIPTS}
