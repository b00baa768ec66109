"""Distillation against open_clip's DistillClipLoss, tiled against whole, two ranks against one with everything."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.loss import DistillClipLoss

from convclip.losses.distillation import distillation_loss
from tests.losses.two_ranks import of_two_ranks, value_and_gradients


def make_batch(rows, width=8, teacher_width=5, scale=15.0, seed=0, dtype=torch.float64):
    """(student image, text, scale), (teacher image, text, scale): matching rows are alike."""
    torch.manual_seed(seed)

    def tower(width, scale):
        image = F.normalize(torch.randn(rows, width, dtype=torch.float64), dim=1)
        text = F.normalize(0.5 * image + torch.randn_like(image) / width**0.5, dim=1)
        return [image.to(dtype), text.to(dtype), torch.tensor([scale], dtype=dtype)]

    return tower(width, scale), tower(teacher_width, 1.3 * scale)


def loss_of_student(image, text, scale, teacher, **options):
    """The loss as a function of what is trained."""
    return distillation_loss(image, text, scale, *teacher, **options)


def assert_same(results, expected, tolerance):
    for result, wanted in zip(results, expected, strict=True):
        assert result.shape == wanted.shape
        size = wanted.double().norm().clamp_min(1e-3 if wanted.ndim == 2 else 1.0)
        distance = (result.double() - wanted.double()).norm() / size
        assert distance <= tolerance, f"{distance:.1e} for {[*wanted.shape]}"


@pytest.mark.parametrize("tile", [None, 1, 7, 23, 100])
def test_equals_open_clip(tile):
    student, teacher = make_batch(23)
    expected = value_and_gradients(lambda *x: DistillClipLoss()(*x, *teacher)[1], *student)
    assert_same(value_and_gradients(loss_of_student, *student, teacher=teacher, tile=tile), expected, 1e-12)


@pytest.mark.parametrize("tile", [None, 4])
def test_temperature_divides_both_logits(tile):
    student, teacher = make_batch(9)
    cooled = [[image, text, scale / 2.5] for image, text, scale in (student, teacher)]
    expected = value_and_gradients(lambda *x: DistillClipLoss()(*x, *cooled[1])[1], *cooled[0])
    result = value_and_gradients(loss_of_student, *student, teacher=teacher, tile=tile, temperature=2.5)
    expected[3] = expected[3] / 2.5
    assert_same(result, expected, 1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 45), st.floats(1, 30), st.integers(0, 99))
def test_tiled_equals_whole(rows, tile, scale, seed):
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-6)):
        student, teacher = make_batch(rows, scale=scale, seed=seed, dtype=dtype)
        whole = value_and_gradients(loss_of_student, *student, teacher=teacher)
        assert_same(value_and_gradients(loss_of_student, *student, teacher=teacher, tile=tile), whole, tolerance)


def test_two_ranks_equal_one_with_everything():
    cases, expected = [], []
    for rows in (2, 14):
        student, teacher = make_batch(rows)
        for tile in (None, 1, 4, 100):
            cases.append((distillation_loss, student + teacher, {"tile": tile}))
            expected.append(value_and_gradients(loss_of_student, *student, teacher=teacher))
    for result, wanted in zip(of_two_ranks(cases), expected, strict=True):
        assert_same([result[0].mean(), *result[1:]], wanted, 1e-12)
    weighed = [(distillation_loss, student + teacher, {"tile": tile}) for tile in (None, 4)]
    whole, tiled = of_two_ranks(weighed, upstream=(3.0, 0.5))
    assert_same(tiled, whole, 1e-12)


@pytest.mark.parametrize("tile", [None, 4])
def test_nothing_reaches_the_teacher(tile):
    student, teacher = make_batch(9)
    teacher = [x.requires_grad_() for x in teacher]
    value_and_gradients(loss_of_student, *student, teacher=teacher, tile=tile)
    assert all(x.grad is None for x in teacher)


def test_a_student_like_its_teacher_has_nothing_to_learn():
    student, _ = make_batch(12)
    value, *gradients = value_and_gradients(loss_of_student, *student, teacher=student, tile=5)
    assert value > 0.1 and all(x.abs().max() < 1e-12 for x in gradients)


@pytest.mark.parametrize("tile", [None, 16])
def test_half_precision_is_summed_in_float32(tile):
    student, teacher = make_batch(50, dtype=torch.bfloat16)
    expected = DistillClipLoss()(*(x.double() for x in student + teacher))[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = distillation_loss(*student, *teacher, tile=tile)
    assert result.dtype == torch.float32 and result.item() == pytest.approx(expected.item(), rel=1e-6)


def test_errors_say_what_is_wrong():
    student, teacher = make_batch(4)
    with pytest.raises(ValueError, match="need as many rows and the temperature must be positive, not 3, 4 and 1"):
        distillation_loss(*student, teacher[0][:3], teacher[1][:3], teacher[2])
    with pytest.raises(ValueError, match="temperature must be positive, not 4, 4 and 0"):
        distillation_loss(*student, *teacher, temperature=0)
    with pytest.raises(ValueError, match=r"alike, not \[4, 5\] and \[4, 8\]"):
        distillation_loss(*student, teacher[0], student[1], teacher[2])
