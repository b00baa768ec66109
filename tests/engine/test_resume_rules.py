"""What a run that goes on may change: a decision for every field of a recipe, and what the log says of it."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from convclip.config import load_recipe
from convclip.engine.resume_rules import (
    FEATURES,
    FIXED,
    FREE,
    FREE_WHEN_LIVE,
    TOLD,
    about_engine,
    about_length,
    about_recipe,
    refuse_changed_recipe,
)
from convclip.engine.stages.schedule import LearningRates
from convclip.models.checkpoint_weights import RunState, write_state
from convclip.run import plan_resume
from convclip.schema import Recipe, Section, UserError
from launch import train

STATE = RunState(12, 1, 2, 1, "torch.float32", batch_norm="auto", recipe="name: saved")
BASE = ("batch.global=8", "epochs=4")
# The state has the recipe.
THERE = Path("there")
FILL = ("features=fill", "features.views=2")


def recipe(*overrides: str) -> Recipe:
    return load_recipe("tiny_cliptext_unfreeze", [*BASE, *overrides])


def fields(section: type[Section], prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields that a written recipe has; those of a section one by one."""
    for name, field in section.model_fields.items():
        place = f"{prefix}{field.alias or name}"
        kinds = [field.annotation, *typing.get_args(field.annotation)]
        inner = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)
        if inner is not None:
            yield from fields(inner, f"{place}.")
        elif not field.exclude:
            yield place


def test_every_field_has_one_decision():
    names, tables = set(fields(Recipe)), (FREE, TOLD, FREE_WHEN_LIVE, FIXED)
    decided = [name for table in tables for name in table]
    assert len(decided) == len(set(decided))
    for name in decided:
        assert any(field == name or field.startswith(f"{name}.") for field in names), f"{name} is no field"
    for field in names:
        assert field in FEATURES or any(field == name or field.startswith(f"{name}.") for name in decided), field
    assert all(table.values() for table in tables)


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ((), ("name=other", "description=words", "rows_per_epoch=500", "log_every=3", "max_bad_steps=2")),
        ((), ("data.train=elsewhere.csv", "data.format=csv", "data.workers=1", "data.max_broken_share=0.5")),
        ((), ("loss.tile=64", "activation_checkpointing=true", "batch.keep_frozen_gib=1", "batch.micro=2")),
        ((), ("evaluation.every_epochs=2", "checkpoint.keep_last=5", "epochs=9", "max_steps=7")),
        ((), ("model.image.pretrained=moved.safetensors", "model.text.pretrained=moved.pt", "optim.ema_decay=0.9")),
        (FILL, ("features=runs/a/features.h5", "features.views=2")),
        (("features=a.h5",), ("features=b.h5",)),
        (("features.views=2",), FILL),
        (("batch.micro=2",), ("batch.micro=4",)),
    ],
    ids=str,
)
def test_what_does_not_change_the_result_may_change(then, now):
    refuse_changed_recipe(THERE, STATE, recipe(*then), recipe(*now))
    refuse_changed_recipe(THERE, STATE, recipe(*now), recipe(*then))


@pytest.mark.parametrize(
    ("then", "now", "words"),
    [
        ((), ("optim.lr=0.5",), "is 0.5 (changes the updates)"),
        ((), ("seed=7",), "seed was 0, is 7 (changes order, crops and draws)"),
        ((), ("batch.global=16",), "batch.global was 8, is 16"),
        ((), ("batch.accumulation=2",), "the rows that a contrastive loss compares"),
        ((), ("data.crop_scale=[0.5, 1.0]",), "augmentation"),
        ((), ("loss.mask_same_image=true",), "the loss"),
        ((), ("model.image.drop_path=0.1",), "the network"),
        ((), ("features=fill",), "features.views was None, is 1"),
        (FILL, ("features=fill", "features.views=3"), "features.views was 2, is 3"),
        (FILL, (*FILL, "model.image.pretrained=moved.safetensors"), "model.image.pretrained was"),
    ],
    ids=str,
)
def test_what_changes_the_result_is_refused(then, now, words):
    with pytest.raises(UserError) as caught:
        refuse_changed_recipe(THERE, STATE, recipe(*then), recipe(*now))
    line = str(caught.value)
    assert (
        line.startswith("cannot resume, the recipe differs from the recipe in there: ")
        and words in line
        and "\n" not in line
    )


def test_the_log_says_what_another_engine_changes():
    assert about_engine(STATE, replace(STATE, step=0)) == []
    (line,) = about_engine(STATE, replace(STATE, world_size=1, zero_stage=3, precision="torch.float16"))
    assert line.startswith("resumed from 2 ranks of ZeRO 1 in fp32 on 1 rank of ZeRO 3 in fp16: ")
    assert "drop path and dropout draw anew" in line and "loss scale of fp16 begins anew" in line
    (line,) = about_engine(STATE, replace(STATE, zero_stage=2))
    assert line == "resumed from 2 ranks of ZeRO 1 in fp32 on 2 ranks of ZeRO 2 in fp32"
    half = replace(STATE, precision="torch.float16")
    assert "anew" not in about_engine(half, replace(half, zero_stage=2))[0]
    (line,) = about_recipe(recipe(), recipe("batch.micro=2"), 12)
    assert line.startswith("batch.micro was not set, is 2: ") and "batch norms" in line


def test_another_length_goes_on_as_a_run_of_that_length():
    then, now, steps_per_epoch = recipe(), recipe("epochs=6"), 3
    assert about_length(then, recipe("name=other"), 12, steps_per_epoch) == []
    (line,) = about_length(then, now, 9, steps_per_epoch)
    rates = [LearningRates(r, r.epochs * steps_per_epoch, {}).at(9, "text.decay", 1.0) for r in (then, now)]
    assert rates[0] < rates[1] and f"from {rates[0]:.3g} to {rates[1]:.3g} at step 9" in line
    assert "epochs 4, max_steps not set is now epochs 6, max_steps not set: 18 steps in place of 12" in line
    # A finished run, and one that stops here.
    assert "from 0 to" in about_length(then, now, 12, steps_per_epoch)[0]
    assert "9 steps in place of 12" in about_length(then, recipe("max_steps=9"), 9, steps_per_epoch)[0]
    with pytest.raises(UserError, match=r"with epochs 2, max_steps not set the run ends at step 6 already"):
        about_length(then, recipe("epochs=2"), 9, steps_per_epoch)


def test_the_plan_says_what_a_resumed_run_does(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    saved, run = recipe("rows_per_epoch=24"), tmp_path / "run"
    checkpoint = run / "checkpoints" / "step-00000006"
    checkpoint.mkdir(parents=True)
    write_state(checkpoint, replace(STATE, step=6, recipe=saved.to_yaml(), data={"steps per epoch": 3}))
    (run / "latest").write_text("checkpoints/step-00000006\n")

    given = ["--recipe", "tiny_cliptext_unfreeze", "--plan", "--ds_config", "ds_configs/zero3_bf16.json"]
    overrides = [word for one in (*BASE, "rows_per_epoch=24", "epochs=6") for word in ("--set", one)]
    monkeypatch.setattr("sys.argv", ["train.py", *given, *overrides, "--resume", "auto", "--output_dir", str(run)])
    train.main(train.parse_arguments())
    out = capsys.readouterr().out
    assert f"note: goes on from {checkpoint}: 6 steps done, in stage 1" in out
    assert "note: resumed from 2 ranks of ZeRO 1 in fp32 on 1 rank of ZeRO 3 in bf16: " in out
    assert "18 steps in place of 12" in out
    assert "this is a new run" in plan_resume(saved, None, 1, "auto", str(tmp_path / "new"))[0]
    for now, resume, words in (
        (saved, "auto", "needs --output_dir"),
        (recipe("optim.lr=0.5"), str(checkpoint), "the recipe differs from the recipe in"),
        (saved, str(tmp_path), "is not a convclip checkpoint"),
    ):
        with pytest.raises(UserError, match=words):
            plan_resume(now, None, 1, resume, None)
