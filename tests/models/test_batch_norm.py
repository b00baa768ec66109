"""Batch norms: float32 statistics beside half-precision weights, and one set of statistics for all ranks."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from convclip import distributed
from convclip.models import batch_norm
from convclip.models.batch_norm import average_running_statistics, synchronised, to_precision
from convclip.schema import UserError
from tests.processes import run_in_world


def rows(seed: int) -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) + 3


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, BatchNormAct2d])
def test_statistics_in_bf16_follow_those_of_float32(kind):
    torch.manual_seed(0)
    exact = nn.Sequential(nn.Conv2d(3, 8, 3), kind(8))
    half, plain = copy.deepcopy(exact), copy.deepcopy(exact).bfloat16()
    to_precision(half, torch.bfloat16)
    for step in range(300):
        exact(rows(step))
        half(rows(step).bfloat16()).float().square().sum().backward()
        plain(rows(step).bfloat16())
    error, naive = ((model[1].running_var.float() - exact[1].running_var).abs().max() for model in (half, plain))
    assert half[1].running_mean.dtype == torch.float32 and half[1].weight.grad.dtype == torch.bfloat16
    assert error < 0.01 * exact[1].running_var.max()
    assert naive > 3 * error
    assert torch.equal(copy.deepcopy(half).eval()(rows(1).bfloat16()), half.eval()(rows(1).bfloat16()))


def averaged() -> tuple[torch.Tensor, torch.Tensor]:
    norm = nn.BatchNorm2d(3)
    norm(rows(distributed.rank()))
    own = norm.running_mean.clone()
    average_running_statistics(nn.Sequential(norm))
    return distributed.gather(own[None]).mean(0), norm.running_mean


def test_ranks_get_the_mean_of_their_statistics():
    results = run_in_world(2, averaged)
    for expected, found in results:
        torch.testing.assert_close(found, expected)
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(*averaged())


def test_synchronised_norms_keep_their_names_and_need_an_accelerator(monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), BatchNormAct2d(8))
    names = list(model.state_dict())
    with pytest.raises(UserError, match=r"batch\.sync_batch_norm"):
        synchronised(model)
    monkeypatch.setattr(batch_norm, "on_accelerator", lambda: True)
    found = synchronised(model)
    assert list(found.state_dict()) == names
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in found[1:])


def locked_and_averaged() -> bool:
    """Ranks whose locked norms differ, which no run has: so that any averaging would show."""
    norm = nn.BatchNorm2d(4)
    norm.running_mean.fill_(distributed.rank() + 1.0)
    average_running_statistics(nn.Sequential(norm.eval()))
    return bool((norm.running_mean == distributed.rank() + 1.0).all())


def test_norms_in_eval_mode_are_left_to_the_bit():
    assert run_in_world(2, locked_and_averaged) == [True, True]
