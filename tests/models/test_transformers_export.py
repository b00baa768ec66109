"""Exports for transformers: plain transformers embeds the same; what it cannot hold is refused."""

import numpy
import pytest
import torch
import transformers
from PIL import Image

from convclip import schema
from convclip.data.tokenizers import build_tokenizer
from convclip.models import build_model
from convclip.models.transformers_export import export_transformers
from tests.models.hf_folders import text_section, write_encoder

TEXT = {"width": 32, "heads": 2, "layers": 2, "context_length": 20}
CAPTIONS = ["a dog on a beach", "Ünïcode   caps, it's 3x", "many " * 50]


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """transformers says where it loads."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def model_of(text=None, embed_dim=16, bias=None, **image):
    image = {"backbone": "test_convnext", "image_size": 64, "head": "average_linear", **image}
    config = schema.Model(embed_dim=embed_dim, image=image, text={**TEXT, **(text or {})}, init_logit_bias=bias)
    torch.manual_seed(0)
    model = build_model(config).eval()
    for parameter in model.parameters():
        # Norms and biases that are not 1 and 0: a swap of two would not show otherwise.
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, parameter.mean().item(), 0.1)
    return model, config


@pytest.mark.parametrize(
    ("image", "text"),
    [
        ({}, {}),
        ({"backbone": "convnext_atto", "drop_path": 0.1}, {"activation": "quick_gelu"}),
        ({"backbone": "resnet10t"}, {}),
        ({"backbone": "fastvit_t8"}, {}),
        ({"backbone": "mobilenetv4_conv_small"}, {}),
    ],
    ids=str,
)
def test_plain_transformers_embeds_the_same(tmp_path, image, text):
    model, config = model_of(text, **image)
    assert export_transformers(model, config, tmp_path / "export") == []
    theirs, said = transformers.AutoModel.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert isinstance(theirs, transformers.VisionTextDualEncoderModel) and not any(said.values())
    tokens = build_tokenizer(config.text)(CAPTIONS)
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, other = model(images, tokens), theirs.eval()(input_ids=tokens, pixel_values=images)
    torch.testing.assert_close(other.image_embeds, ours.image, atol=1e-5, rtol=0)
    torch.testing.assert_close(other.text_embeds, ours.text, atol=1e-5, rtol=0)
    torch.testing.assert_close(other.logits_per_image, ours.logit_scale * ours.image @ ours.text.T, atol=1e-4, rtol=0)


def test_its_processor_prepares_images_and_captions_as_here(tmp_path):
    model, config = model_of(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bilinear")
    export_transformers(model, config, tmp_path / "export")
    processor = transformers.VisionTextDualEncoderProcessor.from_pretrained(tmp_path / "export")
    grey = Image.fromarray(numpy.full((64, 100, 3), 128, dtype=numpy.uint8))
    found = processor(text=CAPTIONS, images=[grey], padding=True, truncation=True, return_tensors="pt")
    expected = (torch.tensor(128 / 255) - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([0.4, 0.5, 0.6])
    torch.testing.assert_close(found["pixel_values"][0], expected[:, None, None].expand(3, 64, 64))
    own = build_tokenizer(config.text)(CAPTIONS)
    # Behind the end token stand end tokens there, zeros here.
    ends = torch.arange(20) > own.argmax(dim=1, keepdim=True)
    assert torch.equal(found["input_ids"], own.masked_fill(ends, 49407))
    # As its card says; the padding and its mask change nothing.
    theirs = transformers.VisionTextDualEncoderModel.from_pretrained(tmp_path / "export").eval()
    with torch.no_grad():
        text = theirs(**found).text_embeds
        torch.testing.assert_close(text, model.encode_text(own, normalize=True), atol=1e-5, rtol=0)


def test_another_tokenizer_stays_behind_and_that_is_said(tmp_path):
    model, config = model_of({"tokenizer": "/some/folder", "vocab_size": 99})
    (note,) = export_transformers(model, config, tmp_path / "export")
    assert "the tokenizer is not exported" in note and not (tmp_path / "export" / "vocab.json").exists()
    card = (tmp_path / "export" / "README.md").read_text()
    assert "input_ids=tokens" in card and "/some" not in card


@pytest.mark.parametrize(
    ("image", "text", "more", "names"),
    [
        ({"head": "attention_pool"}, {}, {}, "head attention_pool .*average_linear"),
        ({"head": "mlp"}, {}, {}, "head mlp"),
        ({"head": "none"}, {}, {"embed_dim": 64}, "head none"),
        ({"backbone": "RN50", "head": "attention_pool"}, {}, {}, "head attention_pool"),
        ({}, {"causal": False}, {}, "without a causal mask"),
        ({}, {"kind": "gpt2", "vocab_size": 99}, {}, "text of kind gpt2"),
        ({}, {}, {"bias": -10.0}, "a logit bias"),
    ],
    ids=str,
)
def test_what_transformers_cannot_hold_is_refused_in_one_line(tmp_path, image, text, more, names):
    model, config = model_of(text, **more, **image)
    with pytest.raises(schema.UserError, match=f"cannot hold .*{names}.*use --format open_clip") as found:
        export_transformers(model, config, tmp_path / "export")
    assert "\n" not in str(found.value) and not list(tmp_path.iterdir())


def test_no_pooled_output_of_transformers_is_one_of_ours(tmp_path):
    """BERT's pooled output is the first token's through a linear map and tanh, so its family is refused."""
    write_encoder(tmp_path / "bert", "bert")
    config = schema.Model(
        embed_dim=16,
        image={"backbone": "test_convnext", "image_size": 64, "head": "average_linear"},
        text=text_section(tmp_path / "bert", pool="cls", projection="linear"),
    )
    with pytest.raises(schema.UserError, match=r"text of kind hf .*cls pooling"):
        export_transformers(build_model(config), config, tmp_path / "export")
    bert = transformers.AutoModel.from_pretrained(tmp_path / "bert").eval()
    found = bert(input_ids=torch.arange(5, 12)[None])
    assert (found.pooler_output - found.last_hidden_state[:, 0]).abs().max() > 0.1


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(schema.UserError, match="already holds files"):
        export_transformers(*model_of(), tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "precious"
