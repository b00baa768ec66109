"""A Hugging Face encoder's folder: what its config.json says, its weights in one file or several, and bad ones."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from convclip import schema
from convclip.config import load_recipe
from convclip.data.tokenizers import build_tokenizer
from convclip.models import build_model
from convclip.models.hf_folder import tokenizer_files, with_encoder
from convclip.models.weights import load_pretrained
from convclip.schema import UserError
from tests.models.hf_folders import change_config, configuration, text_section, write_encoder

IMAGE = schema.ImageTowerConfig(backbone="test_convnext", image_size=32)


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """transformers says where it saves."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """BERT and T5 as they are released; never changed."""
    made = {kind: tmp_path_factory.mktemp(kind) for kind in ("bert", "t5", "gpt2")}
    for kind, folder in made.items():
        write_encoder(folder, kind)
    return made


@pytest.fixture
def bert(released, tmp_path):
    """A BERT to damage."""
    return shutil.copytree(released["bert"], tmp_path / "bert")


def section(folder, **options):
    return schema.Model(embed_dim=16, image=IMAGE, text=text_section(folder, **options))


def load(folder, **options):
    """(the model with the folder's weights, the report)."""
    config = section(folder, **options)
    model = build_model(config)
    return model, load_pretrained(model, config)


def refusal(folder, **options) -> str:
    """What is said of a folder that cannot be used, one line."""
    with pytest.raises(UserError) as caught:
        load(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_recipe_is_filled_from_the_folder_and_then_needs_it_no_more(bert, tmp_path):
    config = with_encoder(section(bert))
    text = config.text
    assert (text.width, text.heads, text.layers, text.vocab_size) == (32, 4, 3, 50)
    assert text.config["hidden_dropout_prob"] == 0.1 and "architectures" not in text.config
    shutil.rmtree(bert)
    assert with_encoder(config) == config
    assert len(build_model(config).text.blocks()) == 3
    # As YAML and JSON, in which runs and exports keep it.
    recipe = schema.Recipe(name="x", epochs=1, batch={"global": 4}, model=config)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert schema.Model.model_validate_json(config.model_dump_json()) == config
    # A recipe that is not filled yet is read back as well, and filled then.
    unfilled = recipe.model_copy(update={"model": section("/no/such/folder")})
    (tmp_path / "recipe.yaml").write_text(unfilled.to_yaml())
    assert load_recipe(tmp_path / "recipe.yaml") == unfilled


def test_other_kinds_are_written_as_before():
    before = {"kind", "width", "heads", "layers", "context_length", "vocab_size", "pretrained", "tokenizer"}
    assert set(schema.Model().model_dump(context=schema.AS_BEFORE)["text"]) == before
    assert set(schema.Model().model_dump()["text"]) == {*before, "activation", "causal"}


def test_sizes_that_contradict_the_folder_are_refused(bert):
    assert "model.text.width is 64, but config.json of" in refusal(bert, width=64)
    assert "has 3: leave it out" in refusal(bert, layers=2)
    assert build_model(section(bert, layers=3, width=32)).text.embed_dim == 16
    assert "context_length is 35, but config.json of" in refusal(bert, context_length=35)


def test_settings_that_cannot_work_are_refused(released, tmp_path):
    assert "pool cls: the first token of config.json" in refusal(released["gpt2"], pool="cls")
    # Positions are counted from behind the padding's: two of 34 are not to be had.
    write_encoder(tmp_path, "roberta")
    assert "has 32 positions: lower it" in refusal(tmp_path, context_length=33)
    assert build_model(section(tmp_path, context_length=32)).text(torch.full((1, 32), 5)).shape == (1, 16)


def test_a_hub_name_is_read_from_the_cache(released, tmp_path, monkeypatch):
    repository = tmp_path / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    shutil.copytree(released["bert"], repository / "snapshots" / "abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("owner/name", "hf-hub:owner/name"):
        model, report = load(name)
        assert report.loaded > 40 and len(model.text.blocks()) == 3
    assert {path.name for path in tokenizer_files(text_section("owner/name"))} == {
        *("tokenizer.json", "tokenizer_config.json")
    }
    assert build_tokenizer(with_encoder(section("owner/name")).text)(["w5"])[0, :4].tolist() == [2, 5, 3, 0]
    assert "no config.json of it is in the Hugging Face cache" in refusal("owner/other")


def test_a_config_alone_builds_random_weights(released):
    config = json.loads((released["bert"] / "config.json").read_text())
    model = schema.Model(
        text={"kind": "hf", "config": config, "tokenizer": str(released["bert"]), "context_length": 30}, image=IMAGE
    )
    assert load_pretrained(build_model(model), model).loaded == 0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kind": "hf"}, "kind hf needs `model`"),
        ({"kind": "hf", "config": {"model_type": "bert"}}, "`tokenizer` is that of `model`, which is not set"),
        ({"model": "x"}, "`model` goes with kind hf, this is kind clip: remove it"),
        ({"kind": "gpt2", "pool": "last"}, "`pool` goes with kind hf, this is kind gpt2"),
    ],
)
def test_fields_of_another_kind_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        schema.TextTowerConfig(**values)


def test_folders_without_config_or_weights(bert):
    (bert / "model.safetensors").rename(bert / "x")
    assert "holds no model.safetensors or pytorch_model.bin: copy it there" in refusal(bert)
    (bert / "config.json").unlink()
    assert "holds no config.json: copy it there" in refusal(bert)
    assert "'no/such' is no folder, and no config.json of it is in the Hugging Face cache" in refusal("no/such")
    assert "model.text.model: /no/such/folder is no folder" in refusal("/no/such/folder")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (b"{", "damaged, or no JSON"),
        (b"[]", "no object in braces"),
        (b"\xff\xfe", "damaged, or no JSON"),
        (b'{"model_type": "bert", "hidden_dropout_prob": NaN}', "it holds NaN"),
        (b"{}", "says no model_type, so it is of no Hugging Face model: name one of bert, roberta,"),
        (b'{"model_type": {"a": 1}}', "says no model_type"),
        (b'{"model_type": "bart"}', "bart is an encoder-decoder, of which only T5's encoder can be taken"),
        (b'{"model_type": "vit"}', "vit is an image model, not a text encoder: name one of bert"),
        (b'{"model_type": "convnextv2"}', "convnextv2 is an image model"),
        (b'{"model_type": "clip"}', "clip is an image model"),
        (b'{"model_type": "robrta"}', "model_type 'robrta' is not known here, did you mean 'roberta'?: name one of"),
        (b'{"model_type": "bert", "hidden_size": "wide"}', "no configuration of bert"),
        (b'{"model_type": "bert", "num_hidden_layers": 0}', "num_hidden_layers is 0"),
        (b'{"model_type": "bert", "is_decoder": true}', "is a decoder"),
        (b'{"model_type": "bert", "position_embedding_type": "relative_key"}', "position_embedding_type relative_key"),
        (b'{"model_type": "bert", "hidden_size": 30, "num_attention_heads": 4}', "cannot be built as bert"),
        (b'{"model_type": "bert", "hidden_act": "jump"}', "cannot be built as bert"),
        (b'{"model_type": "gpt2", "vocab_size": 50}', "the padding token 50256 is not one of vocab_size 50"),
    ],
)
def test_configs_that_are_of_no_text_encoder(bert, config, words):
    (bert / "config.json").write_bytes(config)
    assert words in refusal(bert)


def test_rotary_scaling_is_refused(tmp_path):
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    rope = {"sliding_attention": scaled, "full_attention": scaled}
    configuration("modernbert", rope_parameters=rope).save_pretrained(tmp_path)
    assert "rope_scaling" in refusal(tmp_path)


def test_names_that_do_not_fit_are_named(bert):
    tensors = load_file(bert / "model.safetensors")
    assert any(name.startswith("cls.") for name in tensors) and any("bert.pooler" in name for name in tensors)

    def said(change: dict) -> str:
        save_file({n: t for n, t in {**tensors, **change}.items() if t is not None}, bert / "model.safetensors")
        return refusal(bert)

    assert "holds text.transformer.adapter.weight that the model has no place for" in said(
        {"bert.adapter.weight": torch.ones(2)}
    )
    assert "holds text.transformer.extra.weight" in said({"extra.weight": torch.ones(2)})
    lost = "bert.encoder.layer.1.output.dense.bias"
    assert "lacks text.transformer.encoder.layer.1.output.dense.bias" in said({lost: None})
    assert "has shape (3,), the model's is (32,)" in said({lost: torch.ones(3)})
    (bert / "model.safetensors").unlink()
    shutil.copy(bert / "tokenizer.json", bert / "model.safetensors")
    assert "model.safetensors: damaged, cut short or no weight file" in refusal(bert)


def test_old_names_and_files_without_heads_are_taken(bert):
    tensors = load_file(bert / "model.safetensors")
    expected = load(bert)[0].text.state_dict()
    old = {
        name.removeprefix("bert.")
        .replace("LayerNorm.weight", "LayerNorm.gamma")
        .replace("LayerNorm.bias", "LayerNorm.beta"): t
        for name, t in tensors.items()
        if not name.startswith("cls.")
    }
    (bert / "model.safetensors").unlink()
    torch.save({**old, "embeddings.position_ids": torch.arange(34)[None]}, bert / "pytorch_model.bin")
    found = load(bert)[0].text.state_dict()
    torch.testing.assert_close(
        {n: t for n, t in found.items() if "proj" not in n}, {n: t for n, t in expected.items() if "proj" not in n}
    )


def test_a_whole_t5_gives_its_encoder(released):
    tensors = load_file(released["t5"] / "model.safetensors")
    assert any(name.startswith("decoder.") for name in tensors) and "shared.weight" in tensors
    model, report = load(released["t5"])
    assert torch.equal(model.text.transformer.embed_tokens.weight, tensors["shared.weight"])
    assert [name for name in report.new if name.startswith("text.")] == ["text.proj.0.weight", "text.proj.2.weight"]


def test_a_pickle_that_holds_code_is_refused(bert):
    class Code:
        def __reduce__(self):
            return print, ("ran",)

    (bert / "model.safetensors").unlink()
    torch.save({"bert.x": Code()}, bert / "pytorch_model.bin")
    assert "holds more than tensors, so it is not loaded" in refusal(bert)
    (bert / "pytorch_model.bin").write_bytes(pickle.dumps(Code(), protocol=2))
    assert "holds more than tensors" in refusal(bert)


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_weights_in_parts(bert, ending):
    tensors = load_file(bert / "model.safetensors")
    expected = load(bert)[0].text.transformer.state_dict()
    (bert / "model.safetensors").unlink()
    stem = "model" if ending == "safetensors" else "pytorch_model"
    parts = {f"{stem}-0000{n}-of-00002.{ending}": list(tensors)[n - 1 :: 2] for n in (1, 2)}
    for name, held in parts.items():
        content = {key: tensors[key] for key in held}
        save_file(content, bert / name) if ending == "safetensors" else torch.save(content, bert / name)
    index = bert / f"{stem}.{ending}.index.json"
    weight_map = {key: name for name, held in parts.items() for key in held}
    index.write_text(json.dumps({"weight_map": weight_map}))
    torch.testing.assert_close(load(bert)[0].text.transformer.state_dict(), expected)
    first, second = parts
    index.write_text(json.dumps({"weight_map": {**weight_map, "bert.x": first}}))
    assert f"{first}: lacks bert.x, which the index beside it says it holds" in refusal(bert)
    for broken, words in (
        ({}, "no index of weight files"),
        ({"weight_map": {"a": "../b"}}, "names '../b', which is no"),
    ):
        index.write_text(json.dumps(broken))
        assert words in refusal(bert)
    index.write_text(json.dumps({"weight_map": weight_map}))
    (bert / second).unlink()
    assert f"names 2 files, but {second} is not there: copy it beside the others" in refusal(bert)


def test_gpt2_under_kind_hf_is_padded_with_its_end_token(released):
    config = with_encoder(section(released["gpt2"])).text.config
    assert config["pad_token_id"] == config["eos_token_id"] == 49
    change_config(released["gpt2"], pad_token_id=0)
    assert with_encoder(section(released["gpt2"])).text.config["pad_token_id"] == 0
    change_config(released["gpt2"], pad_token_id=None)
