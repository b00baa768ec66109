"""The attention pool against timm's own."""

import copy

import pytest
import torch
from timm.layers import AttentionPool2d

from convclip import schema
from convclip.models import build_model
from convclip.models.attention_pool import AttentionPool, pool_heads
from convclip.models.export import export_open_clip, load_export


def pools() -> tuple[AttentionPool, AttentionPool2d]:
    torch.manual_seed(0)
    theirs = AttentionPool2d(128, 7, out_features=48).double()
    torch.nn.init.normal_(theirs.qkv.bias)
    ours = AttentionPool(128, 7, 48).double()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("size", [(7, 7), (9, 5), (1, 1)])
def test_output_and_gradients_are_timms(size):
    ours, theirs = pools()
    maps = torch.randn(3, 128, *size, dtype=torch.double)
    weights = torch.randn(3, 48, dtype=torch.double)
    found = []
    for pool in (ours, theirs):
        x = maps.clone().requires_grad_()
        (pool(x) * weights).sum().backward()
        found.append([pool(x).detach(), x.grad, *(parameter.grad for parameter in pool.parameters())])
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize(("width", "heads"), [(64, 1), (1280, 20), (960, 15), (1088, 17), (368, 8), (168, 3), (67, 1)])
def test_heads_are_timms_where_64_divides_the_width_and_near_that_size_elsewhere(width, heads):
    assert pool_heads(width) == heads
    with torch.device("meta"):
        ours, theirs = AttentionPool(width, 2, 8), AttentionPool2d(width, 2, out_features=8, num_heads=heads)
    assert ours.num_heads == theirs.num_heads
    if width % 64 == 0:
        with torch.device("meta"):
            assert AttentionPool2d(width, 2).num_heads == heads


def test_any_width_is_timms_attention_with_that_many_heads():
    torch.manual_seed(0)
    theirs = AttentionPool2d(46, 3, out_features=8, num_heads=pool_heads(46)).double()
    ours = AttentionPool(46, 3, 8).double()
    ours.load_state_dict(theirs.state_dict())
    maps = torch.randn(2, 46, 3, 3, dtype=torch.double)
    torch.testing.assert_close(ours(maps), theirs(maps), atol=1e-12, rtol=1e-9)


def test_a_width_that_open_clip_has_no_pool_for_is_exported_for_convclip_and_says_so(tmp_path):
    image = schema.ImageTowerConfig(backbone="regnety_002", image_size=64)
    text = schema.TextTowerConfig(width=16, heads=2, layers=1, vocab_size=20, context_length=8)
    config = schema.Model(embed_dim=8, image=image, text=text)
    torch.manual_seed(0)
    model = build_model(config).eval()
    done = export_open_clip(model, config, tmp_path / "out")
    assert not done.for_open_clip and "64 does not divide" in done.note and "regnety_002" in done.note
    images = torch.randn(2, 3, 64, 64)
    again, _ = load_export(tmp_path / "out")
    torch.testing.assert_close(again.encode_image(images), model.encode_image(images), atol=0, rtol=0)


def test_names_and_first_weights_are_timms():
    torch.manual_seed(3)
    theirs = AttentionPool2d(64, 2, out_features=8)
    torch.manual_seed(3)
    ours = AttentionPool(64, 2, 8)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), atol=0, rtol=0)
    torch.testing.assert_close(copy.deepcopy(ours).state_dict(), ours.state_dict(), atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_strays_no_further_than_timms(dtype):
    ours, theirs = pools()
    maps = torch.randn(16, 128, 7, 7, dtype=torch.double)
    exact = theirs(maps)
    own, other = ((pool.to(dtype)(maps.to(dtype)).double() - exact).abs().mean().item() for pool in (ours, theirs))
    assert own <= 1.5 * other
