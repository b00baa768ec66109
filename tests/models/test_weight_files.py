"""Weights in several files, and files whose activation is not the model's: each refusal in one line."""

import json
import warnings

import pytest
import torch
from safetensors.torch import save_file

from convclip import schema
from convclip.models import build_model
from convclip.models.weights import load_exact, load_pretrained, read_weights
from tests.models.test_weights import TEXT, open_clip_model, saved


def config(source=None, activation="gelu"):
    image = {"backbone": "convnextv2_atto", "image_size": 64, "head": "average_linear"}
    return schema.Model(embed_dim=32, image=image, text={**TEXT, "activation": activation}, pretrained=source)


def load(source, activation="gelu"):
    model = build_model(config(activation=activation))
    return model, load_pretrained(model, config(str(source), activation))


def shards(folder, parts=3):
    """A model's weights in `parts` files with their index: (index, tensors)."""
    tensors = open_clip_model().state_dict()
    weight_map = {name: f"m-{number % parts + 1:05d}.safetensors" for number, name in enumerate(tensors)}
    for part in set(weight_map.values()):
        held = {name: tensors[name].contiguous() for name in tensors if weight_map[name] == part}
        save_file(held, folder / part)
    index = folder / "open_clip_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index, tensors


def test_an_index_stands_for_all_of_its_files(tmp_path):
    index, tensors = shards(tmp_path)
    for source in (index, tmp_path):
        found = read_weights(str(source))
        assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in found)
        assert load(source)[1].new == []


def refused(source, message, activation="gelu"):
    with pytest.raises(schema.UserError, match=message) as caught:
        load(source, activation)
    assert "\n" not in str(caught.value)


def test_a_part_that_is_missing_or_short_is_named(tmp_path):
    index, _ = shards(tmp_path)
    part = tmp_path / "m-00002.safetensors"
    content = part.read_bytes()
    part.unlink()
    refused(tmp_path, r"1 of its 3 files are missing, the first is m-00002\.safetensors: put them beside the index")
    save_file({"a": torch.ones(1)}, part)
    refused(index, r"m-00002\.safetensors: lacks .* and \d+ more, which the index beside it says it holds")
    part.write_bytes(content[: len(content) // 2])
    refused(index, r"m-00002\.safetensors: damaged, cut short")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no index of weight files"),
        ("[]", "no index of weight files"),
        ('{"weight_map": {}}', "no index of weight files"),
        ('{"weight_map": {"a": 3}}', "no index of weight files"),
        ('{"weight_map": {"a": "../m.safetensors"}}', r"names '\.\./m\.safetensors', which is no \.safetensors file"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "names '/etc/passwd'"),
    ],
)
def test_what_is_no_index_is_refused(tmp_path, content, message):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content)
    refused(index, message)


def said_by(kind, folder):
    """Weights that say in one of three ways that they are of QuickGELU."""
    tensors = open_clip_model().state_dict()
    if kind == "config":
        saved(folder, tensors, "open_clip_model.safetensors")
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"quick_gelu": True}}))
        return folder
    if kind == "layout":
        numbers = {"input_resolution": 64, "context_length": 20, "vocab_size": 100}
        return saved(folder, {**tensors, **{n: torch.tensor(v) for n, v in numbers.items()}}, "w.pt")
    return saved(folder, tensors, "rn50-quickgelu-yfcc15m-455df137.pt")


@pytest.mark.parametrize("kind", ["config", "layout", "name"])
def test_quick_gelu_weights_want_a_quick_gelu_model(tmp_path, kind):
    source = said_by(kind, tmp_path)
    refused(source, "trained with QuickGELU, but the model's text tower has GELU: set model.text.activation to quick_")
    with pytest.raises(schema.UserError, match="trained with QuickGELU"):
        load_exact(build_model(config()), source)
    assert load(source, "quick_gelu")[1].new == []


def test_the_image_tower_of_quick_gelu_weights_is_anybodys(tmp_path):
    """The activation is the text tower's."""
    source = said_by("config", tmp_path)
    image = {**config().image.model_dump(), "pretrained": str(source)}
    described = schema.Model.model_validate({"embed_dim": 32, "image": image, "text": TEXT})
    report = load_pretrained(build_model(described), described)
    assert all(not name.startswith("visual.") for name in report.new)


def test_gelu_weights_are_not_for_a_quick_gelu_model(tmp_path):
    saved(tmp_path, open_clip_model().state_dict(), "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {}}))
    refused(tmp_path, "trained with GELU, but the model's text tower has QuickGELU: set .* to gelu$", "quick_gelu")


class Code:
    """A pickle that runs something when it is opened."""

    def __reduce__(self):
        return print, ("run",)


def test_a_pickle_that_holds_code_is_refused_and_not_run(tmp_path, capsys):
    torch.save({"state_dict": open_clip_model().state_dict(), "code": Code()}, tmp_path / "w.pt")
    refused(tmp_path / "w.pt", "holds more than tensors, so it is not loaded")
    assert "run" not in capsys.readouterr().out


def test_openais_own_archive_says_what_to_take_instead(tmp_path):
    with pytest.warns(FutureWarning):
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "RN50.pt"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(tmp_path / "RN50.pt", "a TorchScript archive, as OpenAI's own files are: save its state_dict, or take")
