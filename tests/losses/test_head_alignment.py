"""Head alignment against torch's own cosine similarity and mean squared error."""

import pytest
import torch
import torch.nn.functional as F

from convclip.losses.head_alignment import head_alignment_loss


def make_pair(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return 3 * torch.randn(7, 16, dtype=dtype), 0.2 * torch.randn(7, 16, dtype=dtype)


def gradient_of(loss, embedding, reference):
    embedding = embedding.clone().requires_grad_()
    value = loss(embedding, reference)
    value.backward()
    return value.detach(), embedding.grad


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("cosine", lambda a, b: (1 - F.cosine_similarity(a, b)).mean()),
        ("mse", lambda a, b: F.mse_loss(F.normalize(a, dim=1), F.normalize(b, dim=1))),
    ],
)
def test_equals_torchs(kind, expected):
    ours = gradient_of(lambda a, b: head_alignment_loss(a, b, kind), *make_pair())
    for result, wanted in zip(ours, gradient_of(expected, *make_pair()), strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_the_reference_stays_as_it_is(kind):
    embedding, reference = make_pair()
    reference.requires_grad_()
    gradient_of(lambda a, b: head_alignment_loss(a, b, kind), embedding, reference)
    assert reference.grad is None


def test_alike_and_opposite():
    embedding, _ = make_pair()
    assert head_alignment_loss(embedding, 5 * embedding).item() == pytest.approx(0, abs=1e-15)
    assert head_alignment_loss(embedding, -embedding).item() == pytest.approx(2)


def test_a_small_angle_keeps_its_digits_in_float32():
    embedding, reference = make_pair(dtype=torch.float32)
    near = embedding + 1e-3 * reference
    expected = head_alignment_loss(embedding.double(), near.double()).item()
    assert 0 < expected < 1e-7
    assert head_alignment_loss(embedding, near).item() == pytest.approx(expected, rel=1e-2)


def test_half_precision_is_computed_in_float32():
    embedding, reference = make_pair(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = head_alignment_loss(embedding, reference)
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(head_alignment_loss(embedding.double(), reference.double()).item(), rel=1e-6)


def test_errors_say_what_is_wrong():
    embedding, reference = make_pair()
    with pytest.raises(ValueError, match=r"alike, not \[7, 16\] and \[7, 15\]"):
        head_alignment_loss(embedding, reference[:, 1:])
    with pytest.raises(ValueError, match="kind must be cosine or mse, not 'l1'"):
        head_alignment_loss(embedding, reference, "l1")
