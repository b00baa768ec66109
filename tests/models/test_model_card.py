"""The card of an export: a head that Hugging Face reads, and a size that is bounded."""

import yaml

from convclip import schema
from convclip.models import build_model
from convclip.models.model_card import MAX_CHARACTERS, model_card

CONFIG = schema.Model(
    embed_dim=8,
    image={"backbone": "test_convnext", "image_size": 32},
    text={"width": 16, "heads": 2, "layers": 1, "context_length": 6, "vocab_size": 50},
)


def test_its_head_is_yaml_and_its_numbers_are_the_models():
    model = build_model(CONFIG)
    card = model_card(model, CONFIG, "open_clip", ["import open_clip", "x = 1"], "## Recalls\n\nnone", "Use it well.")
    _, head, text = card.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "open_clip",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["clip", "convclip"],
    }
    assert "```python\nimport open_clip\nx = 1\n```\n\nUse it well.\n\n## Recalls" in text
    for tower in (model.visual, model.text):
        assert f"{sum(p.numel() for p in tower.parameters()):,} parameters" in text


def test_it_is_bounded():
    card = model_card(build_model(CONFIG), CONFIG, "onnx", ["x"], "word " * MAX_CHARACTERS)
    assert len(card) <= MAX_CHARACTERS + 1 and card.endswith("\n")
