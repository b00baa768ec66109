"""Training with Hugging Face text encoders: events under ZeRO, stored embeddings, and a run whose folder moved."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import convclip
from convclip.config import load_recipe
from convclip.schema import Recipe, UserError
from tests.engine import small_steps
from tests.engine.small_run import make_files, train_here
from tests.engine.small_steps import CHUNK, LOCKED, chunked_run, ds_config, plain_run, small_recipe
from tests.models.hf_folders import configuration, write_encoder
from tests.processes import run_ranks, run_script

FILES = "train-{000000..000002}.tar"


def t5_recipe() -> Recipe:
    """The small recipe of chunked steps with T5, opened at two events.

    It has what is hardest to cut: a position bias that all blocks share, and dropout outside of its modules.
    """
    values = small_recipe(0.4, LOCKED).model_dump(mode="json", by_alias=True)
    text = {"kind": "hf", "config": configuration("t5").to_dict() | {"dtype": None}, "context_length": 12}
    values["model"]["text"] = {**text, "tokenizer": "none needed", "pool": "mean"}
    values["freezing"] = {**LOCKED, "unfreeze": [*LOCKED["unfreeze"], {"step": 2, "tower": "text", "layers": 2}]}
    return Recipe.model_validate(values)


def padded_rows(rows: Any, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of a step, the captions with words up to their end token and padding (0) behind it."""
    images, texts, ids = rows(step)
    ends = texts.argmax(dim=-1)
    words = torch.arange(texts.shape[1]) <= ends[:, None]
    return images, texts.where(words, torch.zeros_like(texts)), ids


def with_padding(work: Any, *arguments: Any) -> Any:
    """`work` on captions that are padded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_steps, "rows", functools.partial(padded_rows, small_steps.rows))
        return work(*arguments)


def both_stages() -> dict[int, dict[str, Tensor]]:
    """ZeRO 2 and 3 in one process group."""
    return {stage: with_padding(chunked_run, t5_recipe(), ds_config(stage)) for stage in (2, 3)}


@pytest.mark.launch
def test_events_in_chunks_under_zero_equal_the_plain_loop():
    found = run_ranks(2, both_stages)
    oracle = with_padding(plain_run, t5_recipe(), 2, CHUNK)
    start = dict(small_steps.small_model(t5_recipe()).named_parameters())
    moved = {n: (oracle[n] - start[n]).abs().max().item() for n in start if n.startswith("text.")}
    # The last two blocks opened; the first, with the bias of all, and the embeddings did not.
    assert {name for name, way in moved.items() if way == 0} == {
        name for name in moved if name.startswith(("text.transformer.block.0.", "text.transformer.embed_tokens."))
    }
    for stage, weights in found.items():
        worst = max((weights[name] - oracle[name]).abs().max().item() for name in oracle)
        assert worst <= 1e-6, (stage, worst)


def overrides(files: Path, encoder: Path, **values: Any) -> tuple[str, ...]:
    """The small run with an encoder as its text tower, locked until its last block opens."""
    text = {"kind": "hf", "model": str(encoder), "context_length": 12, "projection": "linear"}
    settings = {"model.text": text, "data.train": str(files / FILES), "batch.global": 8, "epochs": 2, **values}
    return tuple(f"{key}={json.dumps(value)}" for key, value in settings.items())


def runs(files: Path, encoder: Path) -> dict[str, Any]:
    """Live and stored training; then the run goes on, is evaluated and used, with the encoder's folder elsewhere."""
    from convclip.run import evaluate_checkpoint, plan_recipe

    found: dict[str, Any] = {}
    locked = {"freezing": {"lock": ["image", "text"], "unfreeze": []}, "batch.micro": 4, "data.captions": "all"}
    for mode in ("live", "fill"):
        given = overrides(files, encoder, features={"mode": mode, "views": 1}, **locked)
        train_here(str(files), str(files / mode), 2, given)
        rows = [json.loads(line) for line in (files / mode / "metrics.jsonl").read_text().splitlines()]
        found[mode] = [row["loss"] for row in rows if "loss" in row]
    events = {"freezing": {"lock": ["image", "text"], "unfreeze": [{"epoch": 1, "tower": "text", "layers": 1}]}}
    train_here(str(files), str(files / "run"), 2, overrides(files, encoder, **events))
    moved = encoder.rename(encoder.with_name("moved"))
    run = files / "run"
    with pytest.raises(UserError) as caught:
        convclip.load(run)
    found["gone"] = str(caught.value)
    clip = convclip.load(run, tokenizer=moved)
    found["alone"], found["embedded"] = clip.embed_texts(["w5 w6"]), clip.embed_texts(["w5 w6", "w7 " * 9])
    val = str(files / "val-000000.tar")
    found["figures"] = evaluate_checkpoint(run, val, files / "eval", "fp32", [f"model.text.tokenizer={moved}"])
    again = train_here(str(files), str(run), 2, overrides(files, moved, **events), "auto")
    found["again"] = again
    found["plan"] = plan_recipe(load_recipe(run / "recipe.yaml"))
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Any]:
    transformers.utils.logging.set_verbosity_error()
    files = make_files(tmp_path_factory.mktemp("files"))
    write_encoder(files / "encoder", "bert")
    return run_ranks(1, runs, files, files / "encoder")


@pytest.mark.launch
def test_stored_training_is_live_training(trained):
    assert len(trained["live"]) > 5 and trained["live"] == trained["fill"]


@pytest.mark.launch
def test_a_run_outlives_its_encoders_folder(trained):
    assert "model.text.model: " in trained["gone"] and "encoder" in trained["gone"] and "\n" not in trained["gone"]
    torch.testing.assert_close(trained["alone"], trained["embedded"][:1], atol=1e-6, rtol=0)
    assert trained["figures"]["images"] == 8
    # A finished run goes on from its last step, with the encoder named at its new place.
    assert trained["again"] is not None
    stages = trained["plan"]["stages"]
    assert stages[0]["trainable"]["text"] == 16 * 32 < stages[1]["trainable"]["text"]


@pytest.mark.launch
def test_the_command_line_plans_it_and_refuses_what_is_no_encoder(tmp_path):
    make_files(tmp_path)
    write_encoder(tmp_path / "encoder", "bert")

    def plan(folder: Path) -> Any:
        given = [part for item in overrides(tmp_path, folder) for part in ("--set", item)]
        return run_script("launch/train.py", "--recipe", str(tmp_path / "small.yaml"), *given, "--plan", "--json")

    done = plan(tmp_path / "encoder")
    assert done.returncode == 0, done.stderr
    # Its projection trains from the start: 32 x 16.
    assert json.loads(done.stdout)["stages"][0]["trainable"]["text"] == 512
    (tmp_path / "encoder" / "config.json").write_text('{"model_type": "bart"}')
    done = plan(tmp_path / "encoder")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "encoder-decoder" in line]
    assert line.endswith("name one of bert, roberta, xlm-roberta, distilbert, mpnet, modernbert, t5, gpt2")
