"""Every broken recipe, override, ds_config and command line of tests/broken_recipes.py is refused in one line."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from convclip.config import load_recipe
from convclip.documents import dump_yaml, parse_json, parse_yaml
from convclip.engine.zero.ds_config import load_ds_config, resolve_ds_config
from convclip.engine.zero.ds_rules import REFUSED
from convclip.engine.zero.ds_sections import Bf16, Fp16, Offload, Zero
from convclip.schema import TASK_FIELDS, Recipe, Section, UserError
from tests.broken_recipes import COMMANDS, DS_CONFIGS, FILES, NOT_FOR_VIDEO, OVERRIDES
from tests.conftest import REPOSITORY

DS_FILES = sorted((REPOSITORY / "ds_configs").glob("*.json"))
# As Hugging Face's documentation writes it, without what it leaves to its own arguments.
HUGGING_FACE = {
    "bf16": {"enabled": True},
    "fp16": {"enabled": False, "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "none", "pin_memory": True},
        "offload_param": {"device": "none"},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
    "amp": {"enabled": False},
    "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None},
}


def refused(words: tuple[str, ...], error: UserError) -> None:
    message = str(error)
    assert "\n" not in message and len(message) < 700, message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_is_refused(name, tmp_path):
    content, words = FILES[name]
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_recipe(tmp_path / "mine.yaml")
    refused(("mine.yaml", *words), caught.value)


@pytest.mark.parametrize("name", OVERRIDES)
def test_a_broken_override_is_refused(name):
    overrides, words = OVERRIDES[name]
    with pytest.raises(UserError) as caught:
        load_recipe("demo", overrides)
    refused(words, caught.value)


@pytest.mark.parametrize("name", NOT_FOR_VIDEO)
def test_what_video_does_not_use_is_refused(name):
    with pytest.raises(UserError) as caught:
        load_recipe("teachclip_msrvtt7k", [NOT_FOR_VIDEO[name]])
    refused((name, "cannot be used with video training"), caught.value)


def test_a_new_section_is_no_tasks_until_the_table_names_it(monkeypatch):
    class Spice(Section):
        heat: int = 1

    class Wider(Recipe):
        spice: Spice = Field(Spice())

    assert Wider(name="x", epochs=1).task == "image_text"
    for task, more in (("image_text", {}), ("video", {"video": {}})):
        values = {"name": "x", "epochs": 1, "spice": {"heat": 2}, **more}
        with pytest.raises(ValueError, match=r"spice\.heat cannot be used"):
            Wider.model_validate(values)
        monkeypatch.setitem(TASK_FIELDS, task, (*TASK_FIELDS[task], "spice"))
        assert Wider.model_validate(values).spice.heat == 2


def test_every_name_of_the_table_is_a_field():
    for names in TASK_FIELDS.values():
        for name in names:
            section, (*parents, last) = Recipe, name.split(".")
            for part in parents:
                annotation = section.model_fields[part].annotation
                if part == "part_lr_scale":
                    break
                section = annotation
            else:
                assert last in {field.alias or key for key, field in section.model_fields.items()}, name


def test_a_name_of_digits_stays_text(tmp_path):
    (tmp_path / "1e5.yaml").write_text("epochs: 1\n")
    (tmp_path / "mine.yaml").write_text('epochs: 1\nname: "1e5"\ndescription: "010"\n')
    for path in ("1e5.yaml", "mine.yaml"):
        recipe = load_recipe(tmp_path / path)
        assert recipe.name == "1e5"
        (tmp_path / "again.yaml").write_text(recipe.to_yaml())
        assert load_recipe(tmp_path / "again.yaml") == recipe


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), st.lists))
def test_what_is_written_as_yaml_reads_back(value):
    again = parse_yaml(dump_yaml({"a": value}), "x")["a"]
    assert again == value and repr(again) == repr(value)


@given(
    st.sampled_from(["1e5", "-2E-3", "1.e+4", "+.5e1", "1_0e2", "2020-01-01", "010", "1:30", "0x1f", "=", "<<", "~"])
)
def test_text_that_looks_like_something_else_is_quoted(text):
    assert parse_yaml(dump_yaml([text]), "x") == [text]


def test_short_numbers_are_numbers():
    recipe = load_recipe("demo", ["optim.lr=5e-4", "max_steps=1e3", "optim.eps=1E-7", "rows_per_epoch=6e5"])
    assert (recipe.optim.lr, recipe.max_steps, recipe.optim.eps) == (5e-4, 1000, 1e-7)
    assert isinstance(recipe.max_steps, int) and recipe.rows_per_epoch == 600_000


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
def test_marks_and_newlines_of_other_systems_change_nothing(mark, newline, tmp_path):
    text = b"epochs: 3\noptim:\n  lr: 1e-3\n".replace(b"\n", newline)
    (tmp_path / "mine.yaml").write_bytes(mark + text)
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert (recipe.epochs, recipe.optim.lr) == (3, 1e-3)
    (tmp_path / "ds.json").write_bytes(mark + b'{"zero_optimization":\n{"stage": 1}}'.replace(b"\n", newline))
    assert load_ds_config(tmp_path / "ds.json") == {"zero_optimization": {"stage": 1}}


@pytest.mark.parametrize(
    ("overrides", "place", "value"),
    [
        (["features.views=4", "features=fill"], "features", {"mode": "fill", "store": None, "views": 4}),
        (["features.views=4", "features=a.h5"], "features", {"mode": "store", "store": "a.h5", "views": 4}),
        (["features=a.h5", "features.mode=live", "features.store=null"], "features", {"mode": "live", "store": None}),
        (["optim.lr=1", "optim.lr=2"], "optim", {"lr": 2.0}),
        (["model.image={backbone: RN50}", "model.image.drop_path=0.5"], "model.image", {"drop_path": 0.5}),
        (["model.image={backbone: RN50}", "model.image.drop_path=0.5"], "model.image", {"backbone": "RN50"}),
    ],
)
def test_the_order_of_overrides_of_different_keys_is_free(overrides, place, value):
    keys = [override.split("=")[0] for override in overrides]
    orders = [overrides] if len(set(keys)) < len(keys) else [overrides, overrides[::-1]]
    for order in orders:
        section = load_recipe("demo", order)
        for part in place.split("."):
            section = getattr(section, part)
        assert value.items() <= section.model_dump().items(), order


def test_a_short_form_merges_into_what_the_recipe_says(tmp_path):
    (tmp_path / "mine.yaml").write_text("epochs: 1\nfeatures: {mode: store, store: a.h5, views: 3}\n")
    features = load_recipe(tmp_path / "mine.yaml", ["features=fill"]).features
    assert (features.mode, features.store, features.views) == ("fill", None, 3)
    (tmp_path / "mine.yaml").write_text("epochs: 1\nfeatures: fill\n")
    features = load_recipe(tmp_path / "mine.yaml", ["features.views=2"]).features
    assert (features.mode, features.views) == ("fill", 2)


@pytest.mark.parametrize("name", DS_CONFIGS)
def test_a_broken_ds_config_is_refused(name, tmp_path):
    text, words = DS_CONFIGS[name]
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(UserError) as caught:
        load_ds_config(tmp_path / "ds.json")
    refused(("--ds_config", "ds.json", *words), caught.value)


@pytest.mark.parametrize("path", DS_FILES, ids=lambda path: path.stem)
def test_our_ds_configs_pass_as_they_are(path):
    config = load_ds_config(path)
    assert config == json.loads(path.read_text())
    if "fp16" not in config:
        resolved = resolve_ds_config(config, load_recipe("demo"), 2)
        assert resolve_ds_config(resolved, load_recipe("demo"), 2) == resolved


def test_a_hugging_face_ds_config_passes(tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(HUGGING_FACE))
    config = resolve_ds_config(load_ds_config(tmp_path / "ds.json"), load_recipe("demo"), 2)
    assert not {"optimizer", "amp", "activation_checkpointing"} & set(config)
    assert "reduce_bucket_size" not in config["zero_optimization"]
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"]) == (128, 64)
    assert (config["gradient_clipping"], config["zero_optimization"]["sub_group_size"]) == (1.0, 1e9)


def test_a_ds_config_that_contradicts_a_chunked_recipe_speaks_of_chunks():
    recipe = load_recipe("demo", ["batch.micro=32"])
    with pytest.raises(UserError, match=r"gradient_accumulation_steps is 3 but the recipe's number of chunks is 4"):
        resolve_ds_config({"gradient_accumulation_steps": 3}, recipe, 1)


def test_deepspeed_reads_after_us(monkeypatch):
    """What our table lets through and the installed DeepSpeed does not is still one line."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from convclip.engine.zero import ds_config

    monkeypatch.setattr(ds_config, "check_structure", lambda values, source: dict(values))
    for zero, words in (
        ({"stage": 9}, "stage"),
        ({"stagee": 1}, "stagee"),
        ({"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "Partial"),
    ):
        with pytest.raises(UserError, match=rf"ds_config zero_optimization.*DeepSpeed refuses it.*{words}|{words}"):
            resolve_ds_config({"zero_optimization": zero}, load_recipe("demo"), 1)
    assert DeepSpeedZeroConfig.model_fields


def test_every_key_of_the_installed_deepspeed_has_its_rule():
    """A key that a new DeepSpeed brings is known here by name: passed on with a type, or refused with a reason."""
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    for ours, theirs, place in (
        (Zero, DeepSpeedZeroConfig, "zero_optimization"),
        (Fp16, DeepSpeedFP16Config, "fp16"),
        (Bf16, DeepSpeedBF16Config, "bf16"),
        (Offload, DeepSpeedZeroOffloadOptimizerConfig, "zero_optimization.offload_optimizer"),
        (Offload, DeepSpeedZeroOffloadParamConfig, "zero_optimization.offload_param"),
    ):
        known = {field.alias or name for name, field in theirs.model_fields.items()}
        refusals = {name.rpartition(".")[2] for name in REFUSED if name.rpartition(".")[0] == place}
        assert known <= set(ours.model_fields) | refusals
        if ours is not Offload:
            assert set(ours.model_fields) <= known
    assert set(_REMOVED_TOP_LEVEL_CONFIG_KEYS) <= set(REFUSED)


@pytest.fixture(scope="module")
def main():
    """launch/train.py as its last line runs it, in this process: starting one costs seconds."""
    spec = importlib.util.spec_from_file_location("train_script", REPOSITORY / "launch" / "train.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return lambda: script.run("convclip", script.main, script.parse_arguments())


def run_main(main, monkeypatch, arguments) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main()
    return code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_broken_command_line_is_refused(name, main, monkeypatch, tmp_path):
    arguments, words = COMMANDS[name]
    given_ = [argument.replace("{folder}", str(tmp_path)) for argument in arguments]
    code, out, err = run_main(main, monkeypatch, given_)
    assert (code, out) == (2, "") and err.count("\n") == 1, out + err
    assert all(word in err for word in words), err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("suffix", "begins"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_a_plot_is_what_its_suffix_says(suffix, begins, main, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"lr.{suffix}"
    code, _, err = run_main(main, monkeypatch, ["--recipe", "demo", "--plan", "--plot", str(path)])
    assert code == 0, err
    assert path.read_bytes().startswith(begins) and [found.name for found in tmp_path.iterdir()] == [path.name]


def test_a_ds_config_is_refused_before_a_plan_is_made(main, monkeypatch, tmp_path):
    (tmp_path / "ds.json").write_text('{"bf16": {"enabled": "false"}}')
    monkeypatch.setitem(sys.modules, "convclip.engine.plan.plan", None)
    code, out, err = run_main(main, monkeypatch, ["--recipe", "demo", "--plan", "--ds_config", f"{tmp_path}/ds.json"])
    assert (code, out) == (2, "") and "bf16.enabled" in err


def test_a_pipe_and_a_missing_file_are_refused_at_once(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    for name, words in (("pipe", "no plain file"), ("folder", "it is a folder"), ("absent", "No such file")):
        with pytest.raises(UserError, match=words):
            load_recipe(Path(tmp_path) / f"{name}.yaml")
    for path in ("a\0.yaml", "x" * 5000 + ".yaml"):
        with pytest.raises(UserError, match="cannot be read"):
            load_recipe(path)


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused_in_one_line(text):
    for parse in (parse_yaml, parse_json):
        try:
            parse(text, "x")
        except UserError as error:
            assert "\n" not in str(error)
