"""The attention pool against timm's own."""

import copy

import pytest
import torch
from timm.layers import AttentionPool2d

from convclip.models.attention_pool import AttentionPool


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
