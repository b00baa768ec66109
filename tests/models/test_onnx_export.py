"""Exports to ONNX: onnxruntime embeds the same, whatever the batch; what is missing or wrong is one line."""

import importlib.util

import pytest
import torch

from convclip import schema
from convclip.models import build_model, onnx_export
from convclip.models.hf_folder import with_encoder
from convclip.models.onnx_export import PACKAGES, export_onnx
from tests.models.hf_folders import captions, text_section, write_encoder

TEXT = {"width": 32, "heads": 2, "layers": 2, "context_length": 20, "vocab_size": 100}
NEEDED = "exports to ONNX need pip install -e .[export]"


@pytest.fixture
def onnxruntime():
    """The module; the test skips where one of the packages is not installed."""
    for name in PACKAGES[:-1]:
        pytest.importorskip(name, reason=NEEDED)
    return pytest.importorskip(PACKAGES[-1], reason=NEEDED)


def model_of(text=None, embed_dim=16, **image):
    image = {"backbone": "test_convnext", "image_size": 64, "head": "average_linear", **image}
    config = schema.Model(embed_dim=embed_dim, image=image, text=text or TEXT)
    torch.manual_seed(0)
    return build_model(config).eval(), config


def tokens_of(size, length):
    """Captions of `length` at most: words, the end token, which has the highest id, and padding."""
    tokens = torch.randint(1, 98, (size, length), generator=torch.Generator().manual_seed(size))
    for number, row in enumerate(tokens):
        row[max(1, length - 1 - number)] = 99
        row[max(1, length - 1 - number) + 1 :] = 0
    return tokens


def agree(onnxruntime, folder, model, images, texts):
    """Batches of both towers give in onnxruntime what they give here."""
    for file, name, batches, encode in (
        ("image.onnx", "pixels", images, model.encode_image),
        ("text.onnx", "tokens", texts, model.encode_text),
    ):
        session = onnxruntime.InferenceSession(str(folder / file), providers=["CPUExecutionProvider"])
        for batch in batches:
            (found,) = session.run(None, {name: batch.numpy()})
            with torch.no_grad():
                torch.testing.assert_close(torch.from_numpy(found), encode(batch, normalize=True), atol=1e-5, rtol=0)


def pictures(*sizes):
    return [torch.randn(size, 3, 64, 64, generator=torch.Generator().manual_seed(size)) for size in sizes]


def test_onnxruntime_embeds_the_same_for_any_batch_and_length(onnxruntime, tmp_path):
    model, config = model_of()
    said = export_onnx(model, config, tmp_path / "export")
    assert [line.split(" equals torch within ")[0] for line in said] == ["image.onnx", "text.onnx"]
    assert {path.name for path in (tmp_path / "export").iterdir()} == {"image.onnx", "text.onnx", "README.md"}
    texts = [tokens_of(1, 20), tokens_of(7, 20), tokens_of(4, 9)]
    agree(onnxruntime, tmp_path / "export", model, pictures(1, 7), texts)
    session = onnxruntime.InferenceSession(str(tmp_path / "export" / "text.onnx"))
    assert session.get_inputs()[0].shape == ["batch", "tokens"] and session.get_inputs()[0].type == "tensor(int64)"


@pytest.mark.full
@pytest.mark.parametrize(
    ("backbone", "head"),
    [
        ("test_convnext", "attention_pool"),
        ("test_convnext", "mlp"),
        ("test_convnext", "none"),
        ("fastvit_t8", "none"),
        ("resnet10t", "attention_pool_linear"),
        ("efficientnet_lite0", "average_linear"),
        ("RN50", "attention_pool"),
    ],
)
def test_every_kind_of_image_tower(onnxruntime, tmp_path, backbone, head):
    # A text tower that reads its padding keeps all columns; QuickGELU is no operator of ONNX.
    text = {**TEXT, "causal": False, "activation": "quick_gelu"}
    model, config = model_of(text, embed_dim=64, backbone=backbone, head=head)
    export_onnx(model, config, tmp_path / "export")
    agree(onnxruntime, tmp_path / "export", model, pictures(1, 5), [tokens_of(1, 20), tokens_of(5, 20)])
    session = onnxruntime.InferenceSession(str(tmp_path / "export" / "text.onnx"))
    assert session.get_inputs()[0].shape == ["batch", 20]


@pytest.mark.full
def test_weights_too_large_for_one_file_stand_beside_it(onnxruntime, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "_MAX_INSIDE", 0)
    model, config = model_of()
    export_onnx(model, config, tmp_path / "export")
    assert {"image.onnx.data", "text.onnx.data"} <= {path.name for path in (tmp_path / "export").iterdir()}
    (tmp_path / "export").rename(tmp_path / "moved")
    agree(onnxruntime, tmp_path / "moved", model, pictures(2), [tokens_of(2, 20)])


@pytest.mark.full
@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "mpnet", "modernbert", "t5", "gpt2"])
def test_every_family_of_hugging_face_text(onnxruntime, tmp_path, kind):
    write_encoder(tmp_path / kind, kind)
    model, config = model_of(text_section(tmp_path / kind, pool="last" if kind == "gpt2" else "mean"))
    export_onnx(model, config, tmp_path / "export")
    texts = [captions(kind, (7,))[0], captions(kind)[0], captions(kind, (9, 7, 3))[0][:, :11]]
    agree(onnxruntime, tmp_path / "export", model, pictures(1), texts)
    assert (tmp_path / "export" / "tokenizer.json").is_file()


def test_a_missing_package_is_one_line_that_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(schema.UserError, match="needs onnxscript: pip install onnxscript") as found:
        export_onnx(*model_of(), tmp_path / "export")
    assert "\n" not in str(found.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [0.1, float("nan")])
def test_other_embeddings_than_torchs_are_no_export(tmp_path, monkeypatch, wrong):
    monkeypatch.setattr(onnx_export, "refuse_without_packages", lambda: None)
    monkeypatch.setattr(onnx_export, "_write", lambda graph, path: path.write_bytes(b"half"))
    monkeypatch.setattr(onnx_export, "_difference", lambda graph, path: wrong)
    with pytest.raises(schema.UserError, match=r"image\.onnx would give other embeddings than torch .*open_clip"):
        export_onnx(*model_of(), tmp_path / "export")
    assert not list(tmp_path.iterdir())


def test_its_checks_have_captions_of_every_length():
    """The end token has the highest id, and behind it stands padding alone."""
    text = schema.TextTowerConfig(**TEXT)
    tokens = onnx_export._captions(text, 3, 20, torch.Generator().manual_seed(0))
    ends = tokens.argmax(dim=1)
    assert len(set(ends.tolist())) == 3 and torch.equal(tokens[torch.arange(3), ends], torch.full((3,), 99))
    assert torch.equal((tokens == 0).sum(dim=1), 19 - ends)


def test_a_text_encoder_whose_tokenizer_is_gone_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "refuse_without_packages", lambda: None)
    write_encoder(tmp_path / "bert", "bert")
    model, config = model_of(text_section(tmp_path / "bert"))
    # As a run stores it.
    config = with_encoder(config)
    (tmp_path / "bert").rename(tmp_path / "moved")
    with pytest.raises(schema.UserError, match=r"tokenizer of .*bert is gone .*--set model.text.tokenizer=FOLDER"):
        export_onnx(model, config, tmp_path / "export")
    assert not (tmp_path / "export").exists()
