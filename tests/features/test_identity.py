"""How a store differs is said in words: no key's checksum is shown to anybody."""

import json
import re
from pathlib import Path

import pytest

from convclip.features.identity import check_identity, identity_difference
from convclip.schema import UserError

HASHES = "ab" * 32, "cd" * 32
MODELS = [json.dumps({"embed_dim": 16, "image": {"backbone": name}}) for name in ("convnext_tiny", "resnet50")]
VIEWS = "train crop", "train crop, 3 views, seed 0", "train crop, 3 views, seed 1"
IDS = [f"{count}, sha256 {HASHES[0]}" for count in (41, 40)]


@pytest.mark.parametrize(
    ("key", "found", "wanted", "words"),
    [
        (
            "weights_sha256",
            *HASHES,
            "made with other weights: the locked towers' weight files, or the seed of new ones",
        ),
        ("teacher_sha256", *HASHES, "made with other weights of the teacher"),
        (
            "captions_sha256",
            *HASHES,
            "made from other training data: its images and captions, other than the data have",
        ),
        ("caption_ids", *IDS, "made from other training data: 41 captions, the data now have 40 captions"),
        ("model", *MODELS, "made with another model: model.image.backbone convnext_tiny, the recipe has resnet50"),
        ("transform", VIEWS[1], VIEWS[0], "made with 3 views of each image, the recipe has 1 (features.views)"),
        ("transform", VIEWS[0], VIEWS[1], "made with 1 view of each image, the recipe has 3 (features.views)"),
        (
            "transform",
            VIEWS[1],
            VIEWS[2],
            "made from other crops: train crop, 3 views, seed 0, the recipe has train crop",
        ),
        ("precision", "float32", "bfloat16", "made in float32, this run computes in bfloat16"),
        ("text", False, True, "it holds no text embeddings, the recipe needs them"),
        ("frames_stored", True, False, "it holds frame embeddings, the recipe has no use for them"),
        ("kind", "xclip", "video towers", "it holds features of xclip, wanted are those of video towers"),
        ("frames", 12, 8, "made with 12 frames of each video, the recipe has video.frames 8"),
        ("words", 32, 30, "made with 32 words of each caption, the recipe has video.words 30"),
        ("fps", 1.0, 2.0, "made of a frame store with 1.0 frames per second, this one has 2.0"),
    ],
)
def test_a_difference_is_one_line_in_words(key, found, wanted, words):
    with pytest.raises(UserError) as caught:
        check_identity(Path("runs/features.h5"), {"boundary": 3, key: found}, {"boundary": 3, key: wanted})
    message = str(caught.value)
    assert message.startswith(f"runs/features.h5: {words}") and "extract again" in message, message
    assert "\n" not in message and not re.search("[0-9a-f]{64}", message)


def test_a_store_of_the_other_task_is_named():
    with pytest.raises(UserError, match="it holds features of video towers, wanted are those of an image recipe"):
        check_identity(Path("f.h5"), {"kind": "video towers"}, {"boundary": 3})
    with pytest.raises(UserError, match="it holds features of an image recipe, wanted are those of xclip"):
        check_identity(Path("f.h5"), {"boundary": 3}, {"kind": "xclip"})


@pytest.mark.parametrize(
    ("then", "now", "text", "words"),
    [
        ({"init_logit_bias": None}, {"init_logit_bias": -10.0}, True, None),
        ({"image": {"head": "attention_pool"}}, {"image": {"head": "attention_pool_linear"}}, True, None),
        ({"image": {"head": "mlp"}}, {"image": {"head": "average_linear"}}, True, None),
        # These pool before the head: at the highest cut other things are stored.
        ({"image": {"head": "attention_pool"}}, {"image": {"head": "mlp"}}, True, "model.image.head attention_pool"),
        ({"image": {"head": "none"}}, {"image": {"head": "average_linear"}}, True, "model.image.head none"),
        ({"image": {"drop_path": 0.0}}, {"image": {"drop_path": 0.1}}, True, "model.image.drop_path 0.0"),
        ({"embed_dim": 16, "text": {"layers": 1}}, {"embed_dim": 8, "text": {"layers": 2}}, False, None),
        ({"embed_dim": 16}, {"embed_dim": 8}, True, "model.embed_dim 16, the recipe has 8"),
        ({"init_logit_scale": 1.0, "text": {"layers": 1}}, {"text": {"layers": 2}}, True, "model.text.layers 1"),
    ],
)
def test_of_a_model_counts_what_is_stored(then, now, text, words):
    found, wanted = ({"model": json.dumps(model), "boundary": 3, "text": text} for model in (then, now))
    difference = identity_difference(found, wanted)
    assert difference is None if words is None else words in difference, difference
    # A video's locked head is stored.
    assert identity_difference({**found, "kind": "video towers"}, {**wanted, "kind": "video towers"}) is not None
