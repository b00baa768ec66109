"""Every ds_config holds what its name says, is read by the installed DeepSpeed, and leaves the rest to recipes."""

import json
from pathlib import Path

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig

FOLDER = Path(__file__).parent.parent / "ds_configs"
FILES = sorted(FOLDER.glob("*.json"))
AUTO = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.0,
}
# DeepSpeed passes over top-level keys it does not know, and its own names for the others are these.
SECTIONS = {"zero_optimization": DeepSpeedZeroConfig, "fp16": DeepSpeedFP16Config, "bf16": DeepSpeedBF16Config}


def names_of(section):
    return {field.alias or name for name, field in section.model_fields.items()}


def test_the_documented_files_are_there():
    names = "zero0_fp32 zero0_bf16 zero1_fp32 zero1_fp16 zero2_fp32 zero2_fp16 zero2_bf16 zero3_fp32 zero3_bf16"
    assert {path.stem for path in FILES} == {*names.split(), "zero2_offload", "zero3_offload"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_file_holds_what_its_name_says(path):
    config = json.loads(path.read_text())
    stage, what = path.stem.removeprefix("zero").split("_")
    zero = config["zero_optimization"]
    assert zero["stage"] == int(stage)
    enabled = {kind for kind in ("fp16", "bf16") if config.get(kind, {}).get("enabled")}
    assert enabled == ({"bf16"} if what == "offload" else {what} - {"fp32"})
    assert ("offload_optimizer" in zero) == (what == "offload")
    assert (stage, what) != ("0", "fp16"), "DeepSpeed computes stage 0 in fp16 wrongly"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_recipe_values_are_auto_and_nothing_else_is_the_recipes(path):
    config = json.loads(path.read_text())
    assert {key: config[key] for key in AUTO} == dict.fromkeys(AUTO, "auto")
    assert set(config) <= {*AUTO, *SECTIONS}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_key_is_one_the_installed_deepspeed_reads(path):
    config = json.loads(path.read_text())
    for name, section in SECTIONS.items():
        assert set(config.get(name, {})) <= names_of(section)
    offload = config["zero_optimization"].get("offload_optimizer", {})
    assert set(offload) <= names_of(DeepSpeedZeroOffloadOptimizerConfig)
    read = DeepSpeedConfig({**config, **AUTO})
    assert read.zero_optimization_stage == config["zero_optimization"]["stage"]
    assert read.float16_config.enabled == ("fp16" in config) and read.bfloat16_config.enabled == ("bf16" in config)
    for key, value in config["zero_optimization"].items():
        if isinstance(value, bool | int):
            assert getattr(read.zero_config, key.removeprefix("stage3_")) == value
