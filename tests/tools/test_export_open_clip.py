"""Exporting what open_clip has no place for."""

import shutil

import pytest

from convclip.config import load_recipe
from convclip.documents import dump_yaml
from tests.conftest import REPOSITORY
from tools import export_open_clip


@pytest.mark.parametrize("by_recipe", [True, False])
def test_a_video_model_is_refused_in_one_line_that_says_what_to_do(tmp_path, capsys, by_recipe):
    run = tmp_path / "run"
    shutil.copytree(REPOSITORY / "tests" / "fixtures" / "0.1.0" / "run", run)
    recipe = load_recipe("teachclip_msrvtt9k")
    (run / "recipe.yaml").write_text(dump_yaml(recipe.model_dump(mode="json", by_alias=True)))
    more = ["--recipe", "teachclip_msrvtt9k"] if by_recipe else []
    assert export_open_clip.main(["--checkpoint", str(run), "--output_dir", str(tmp_path / "export"), *more]) == 2
    error = capsys.readouterr().err
    assert "is a model of videos" in error and "cannot be exported" in error and "launch/evaluate.py" in error
    assert error.count("\n") == 1 and not (tmp_path / "export").exists()
