"""Exports with a Hugging Face text encoder: by unmodified open_clip where it has such a tower, and back here."""

import json
import shutil

import open_clip
import pytest
import torch
import transformers

import convclip
from convclip import schema
from convclip.data.tokenizers import build_tokenizer
from convclip.models import build_model
from convclip.models.export import export_open_clip, load_export
from convclip.models.hf_folder import with_encoder
from convclip.models.weights import load_pretrained
from tests.models.hf_folders import text_section, write_encoder

TEXTS = ["w5 w6 w7", " ".join(f"w{n}" for n in range(5, 40)), "w30"]


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """transformers says where it saves."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Encoders as they are released."""
    made = {kind: tmp_path_factory.mktemp(kind) for kind in ("bert", "roberta", "xlm-roberta", "t5", "gpt2")}
    for kind, folder in made.items():
        write_encoder(folder, kind)
    return made


def model_of(folder, **text):
    """(model with the encoder's weights, its configuration), as a recipe names it."""
    image = {"backbone": "convnextv2_atto", "image_size": 64, "head": "average_linear"}
    width = 32 if text.get("projection") == "none" else 16
    config = schema.Model(embed_dim=width, image=image, text=text_section(folder, **text))
    torch.manual_seed(0)
    model = build_model(config)
    load_pretrained(model, config)
    return model.eval(), config


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("bert", {}),
        ("bert", {"pool": "cls", "projection": "linear"}),
        ("roberta", {"projection": "none"}),
        ("xlm-roberta", {"pool": "mean"}),
    ],
)
def test_open_clip_loads_it_with_the_same_tokens_and_embeddings(folders, tmp_path, kind, text):
    folder = shutil.copytree(folders[kind], tmp_path / "encoder")
    model, config = model_of(folder, **text)
    done = export_open_clip(model, config, tmp_path / "export")
    assert done.for_open_clip and "names this folder as hf_model_name" in done.note
    tokens = build_tokenizer(with_encoder(config).text)(TEXTS)
    # It needs nothing of the encoder's folder.
    shutil.rmtree(folder)
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{done.folder}")
    assert torch.equal(open_clip.get_tokenizer(f"local-dir:{done.folder}")(TEXTS), tokens)
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, other = model(images, tokens), theirs.eval()(images, tokens)
    for a, b in zip(ours[:3], other, strict=True):
        torch.testing.assert_close(b.reshape(a.shape), a, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("kind", "text"), [("bert", {"pool": "max"}), ("t5", {}), ("gpt2", {"pool": "last"})])
def test_what_open_clip_has_no_tower_for_is_said_and_loads_back_here(folders, tmp_path, kind, text):
    folder = shutil.copytree(folders[kind], tmp_path / "encoder")
    model, config = model_of(folder, **text)
    done = export_open_clip(model, config, tmp_path / "export")
    pool = text.get("pool", "mean")
    assert not done.for_open_clip and f"open_clip has no convnextv2_atto with {pool}-pooled {kind} text" in done.note
    tokens = build_tokenizer(with_encoder(config).text)(TEXTS)
    shutil.rmtree(folder)
    loaded, found = load_export(done.folder)
    assert found == with_encoder(config.model_copy(update={"text": found.text}))
    with torch.no_grad():
        expected = model.encode_text(tokens, normalize=True)
        assert torch.equal(loaded.encode_text(tokens, normalize=True), expected)
    # The front door takes the tokenizer from the export.
    torch.testing.assert_close(convclip.load(done.folder).embed_texts(TEXTS), expected, atol=1e-6, rtol=0)


def test_an_export_starts_another_run(folders, tmp_path):
    """Both towers from the file, under open_clip's names, so that the encoder's folder need hold no weights."""
    folder = shutil.copytree(folders["bert"], tmp_path / "encoder")
    model, config = model_of(folder)
    done = export_open_clip(model, config, tmp_path / "export")
    (folder / "model.safetensors").unlink()
    again = config.model_copy(update={"pretrained": str(done.folder)})
    other = build_model(again)
    assert load_pretrained(other, again).new == []
    torch.testing.assert_close(other.state_dict(), model.state_dict(), atol=0, rtol=0)


def test_an_export_without_its_tokenizer_says_so(folders, tmp_path):
    folder = shutil.copytree(folders["bert"], tmp_path / "encoder")
    model, config = model_of(folder)
    config = with_encoder(config)
    shutil.rmtree(folder)
    done = export_open_clip(model, config, tmp_path / "export")
    assert "the text encoder's tokenizer is gone from its place: copy its files into the folder" in done.note
    with pytest.raises(schema.UserError, match=r"model.text.model: .*encoder"):
        convclip.load(done.folder)
    assert convclip.load(done.folder, tokenizer=folders["bert"]).embed_texts(TEXTS).shape == (3, 16)


def test_a_changed_configuration_is_refused_but_another_place_is_not(folders, tmp_path):
    model, config = model_of(folders["bert"])
    done = export_open_clip(model, config, tmp_path / "export")
    path = done.folder / "convclip_model.json"
    sound = json.loads(path.read_text())
    sound["text"]["model"] = "/moved/elsewhere"
    path.write_text(json.dumps(sound))
    assert load_export(done.folder)[1].text.model == "/moved/elsewhere"
    sound["text"]["config"]["layer_norm_eps"] = 0.1
    path.write_text(json.dumps(sound))
    with pytest.raises(schema.UserError, match="was changed, its weights were exported with"):
        load_export(done.folder)
