"""The heads `mlp` and `none` against open_clip's TimmModel, taken from a release, replaced, locked around, refused."""

import pytest
import torch
from open_clip.timm_model import TimmModel

from convclip import schema
from convclip.models import build_model
from convclip.models.layer_groups import frozen_cut, locked_names
from convclip.models.weights import load_exact, load_pretrained
from tests.models.test_weights import TEXT, saved

# open_clip's (pool, proj) for our head
HEADS = {"mlp": ("", "mlp"), "none": ("avg", None)}
BACKBONES = ("resnet18", "fastvit_t8", "convnext_atto")
# The classifiers have three different names. open_clip gives MobileNetV3 an mlp of a width that it has not.
CASES = [*((backbone, head) for backbone in BACKBONES for head in HEADS), ("mobilenetv3_small_050", "none")]


def config(backbone, head, source=None):
    image = {"backbone": backbone, "head": head, "image_size": 64}
    return schema.Model(embed_dim=32, image=image, text=TEXT, pretrained=source)


def release(folder, backbone, head):
    """open_clip's tower with random weights, and a whole model's file that holds it."""
    torch.manual_seed(3)
    pool, proj = HEADS[head]
    theirs = TimmModel(backbone, 32, 64, pool=pool, proj=proj).eval()
    rest = {n: t for n, t in build_model(config(backbone, head)).state_dict().items() if not n.startswith("visual.")}
    return theirs, saved(folder, {**rest, **{f"visual.{n}": t for n, t in theirs.state_dict().items()}})


@pytest.mark.parametrize(("backbone", "head"), CASES)
def test_a_release_gives_open_clips_embeddings_at_every_cut(tmp_path, backbone, head):
    theirs, path = release(tmp_path, backbone, head)
    model = build_model(config(backbone, head)).eval()
    assert load_pretrained(model, config(backbone, head, path)).new == []
    images = torch.randn(3, 3, 64, 64)
    expected = theirs(images)
    torch.testing.assert_close(model.encode_image(images), expected, atol=1e-6, rtol=1e-5)
    for cut in model.visual.cuts:
        features = model.visual.forward_prefix(images, cut)
        torch.testing.assert_close(model.encode_image(features, cut=cut), expected, atol=1e-6, rtol=1e-5)
    again = build_model(config(backbone, head)).eval()
    assert load_exact(again, path) == len(again.state_dict())
    torch.testing.assert_close(again.encode_image(images), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_a_head_always_trains_and_lies_above_the_highest_cut(head):
    model = build_model(config("fastvit_t8", head))
    locked = {*locked_names(model, "image"), *locked_names(model, "text")}
    trains = {name for name, _ in model.named_parameters()} - locked
    heads = {"mlp": {"mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight"}, "none": {"fc.weight", "fc.bias"}}
    assert trains == {"logit_scale", *(f"visual.head.{name}" for name in heads[head])}
    assert frozen_cut(model, trains).image == model.visual.cuts[-1]


@pytest.mark.parametrize(("released", "wanted"), [("none", "mlp"), ("mlp", "none"), ("none", "average_linear")])
def test_a_released_trunk_takes_a_new_head(tmp_path, released, wanted):
    theirs, path = release(tmp_path, "fastvit_t8", released)
    model = build_model(config("fastvit_t8", wanted))
    report = load_pretrained(model, config("fastvit_t8", wanted, path))
    assert report.new == [name for name in model.state_dict() if name.startswith("visual.head.")]
    weights = theirs.trunk.state_dict()
    ours = model.visual.trunk.state_dict()
    assert ours.keys() <= weights.keys() and all(torch.equal(ours[name], weights[name]) for name in ours)
    with pytest.raises(schema.UserError, match=r"lacks visual\.head"):
        load_exact(model, path)


@pytest.mark.parametrize(
    ("backbone", "head", "message"),
    [
        ("dpn48b", "none", "none needs a backbone whose classifier is one linear layer behind its pool, which dpn48b"),
        ("repvit_m1", "none", "which repvit_m1 has not: set average_linear"),
        # Its classifier has a norm of its own.
        ("efficientvit_m0", "none", "which efficientvit_m0 has not: set average_linear"),
        ("RN50", "none", "RN50 has a pool of its own; set attention_pool instead of none"),
        ("RN50", "mlp", "RN50 has a pool of its own; set attention_pool instead of mlp"),
    ],
)
def test_a_head_that_the_trunk_cannot_have_is_refused(backbone, head, message):
    with torch.device("meta"), pytest.raises(schema.UserError, match=message) as caught:
        build_model(config(backbone, head))
    assert str(caught.value).startswith("model.image.head: ")
