"""Tiled losses against open_clip's, against plain autograd, and two ranks against one with everything."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.loss import ClipLoss, SigLipLoss
from torch.utils._python_dispatch import TorchDispatchMode

from convclip.losses.contrastive import clip_loss, siglip_loss
from tests.losses.two_ranks import of_two_ranks, value_and_gradients


def make_batch(rows, width=8, scale=20.0, seed=0, dtype=torch.float64, images=None):
    """(image, text, scale, bias, ids): matching rows are alike; with `images`, that many different image ids."""
    torch.manual_seed(seed)
    image = F.normalize(torch.randn(rows, width, dtype=torch.float64), dim=1)
    text = F.normalize(0.4 * image + torch.randn_like(image) / width**0.5, dim=1)
    ids = None if images is None else torch.randint(0, images, (rows,))
    return image.to(dtype), text.to(dtype), torch.tensor([scale], dtype=dtype), torch.tensor([-4.0], dtype=dtype), ids


def assert_same(results, expected, tolerance):
    """Relative distance in the norm, for each tensor.

    The gradients of scale and bias are sums whose terms, of order one, may cancel: to that order they are compared.
    """
    for result, wanted in zip(results, expected, strict=True):
        assert result.shape == wanted.shape
        size = wanted.double().norm().clamp_min(1e-4 if wanted.ndim == 2 else 1.0)
        distance = (result.double() - wanted.double()).norm() / size
        assert distance <= tolerance, f"{distance:.1e} for {[*wanted.shape]}"


def clip_by_hand(image, text, scale, ids):
    """The definition, one row at a time."""
    total = 0.0
    logits = scale * image @ text.T
    for matrix in (logits, logits.T):
        for i in range(len(matrix)):
            others = [j for j in range(len(matrix)) if j == i or ids[j] != ids[i]]
            total = total + torch.logsumexp(matrix[i, others], 0) - matrix[i, i]
    return total / (2 * len(logits))


def siglip_by_hand(image, text, scale, bias, ids):
    total = 0.0
    for i in range(len(image)):
        for j in range(len(text)):
            if j == i or ids[j] != ids[i]:
                logit = scale * image[i] @ text[j] + bias
                total = total - F.logsigmoid(logit if i == j else -logit).squeeze()
    return total / len(image)


@pytest.mark.parametrize("tile", [None, 1, 7, 16, 33, 100])
def test_equals_open_clip(tile):
    image, text, scale, bias, _ = make_batch(33)
    expected = value_and_gradients(ClipLoss(), image, text, scale)
    assert_same(value_and_gradients(clip_loss, image, text, scale, tile=tile), expected, 1e-12)
    expected = value_and_gradients(SigLipLoss(), image, text, scale, bias)
    assert_same(value_and_gradients(siglip_loss, image, text, scale, bias, tile=tile), expected, 1e-12)


@pytest.mark.parametrize("tile", [None, 4, 11])
def test_rows_of_one_image_are_no_negatives(tile):
    image, text, scale, bias, ids = make_batch(11, images=5)
    assert len(ids.unique()) < 11
    expected = value_and_gradients(lambda *x: clip_by_hand(*x, ids).squeeze(), image, text, scale)
    assert_same(value_and_gradients(clip_loss, image, text, scale, tile=tile, ids=ids), expected, 1e-12)
    expected = value_and_gradients(lambda *x: siglip_by_hand(*x, ids), image, text, scale, bias)
    assert_same(value_and_gradients(siglip_loss, image, text, scale, bias, tile=tile, ids=ids), expected, 1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 45), st.sampled_from([None, 1, 3, 30]), st.floats(1, 100), st.integers(0, 99))
def test_tiled_equals_whole(rows, tile, images, scale, seed):
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-6)):
        # In float32, logits near 100 with little left to learn are rounding in either way of computing them.
        scale = scale if dtype == torch.float64 else min(scale, 20.0)
        *inputs, bias, ids = make_batch(rows, scale=scale, seed=seed, dtype=dtype, images=images)
        whole = value_and_gradients(clip_loss, *inputs, ids=ids)
        assert_same(value_and_gradients(clip_loss, *inputs, ids=ids, tile=tile), whole, tolerance)
        whole = value_and_gradients(siglip_loss, *inputs, bias, ids=ids)
        assert_same(value_and_gradients(siglip_loss, *inputs, bias, ids=ids, tile=tile), whole, tolerance)


def test_one_row_and_one_image():
    """Without any negative the softmax loss is zero and so are its gradients."""
    for batch in (make_batch(1), make_batch(9, images=1)):
        image, text, scale, _, ids = batch
        for tile in (None, 2):
            for result in value_and_gradients(clip_loss, image, text, scale, tile=tile, ids=ids):
                assert result.abs().max() < 1e-15


def test_float32_matches_float64_at_a_large_scale():
    image, text, _, _, _ = make_batch(300, width=64)
    scale = torch.tensor(100.0, dtype=torch.float64)
    expected = value_and_gradients(ClipLoss(), image, text, scale)
    single = value_and_gradients(clip_loss, image.float(), text.float(), scale.float(), tile=64)
    dense = value_and_gradients(ClipLoss(), image.float(), text.float(), scale.float())
    assert_same(single, expected, 1e-5)
    assert_same(dense, expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tile", [None, 16])
def test_half_precision_features_are_summed_in_float32(dtype, tile):
    """Only the features are rounded: the result is that of the rounded features, computed in float64."""
    image, text, scale, bias, _ = make_batch(50, dtype=dtype)
    scale, bias = scale.float(), bias.float()
    for ours, theirs, more in ((clip_loss, ClipLoss(), []), (siglip_loss, SigLipLoss(), [bias])):
        expected = value_and_gradients(theirs, *(x.double() for x in (image, text, scale, *more)))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inputs = [x.clone().requires_grad_() for x in (image, text, scale, *more)]
            value = ours(*inputs, tile=tile)
        value.backward()
        results = [value.detach(), *(x.grad for x in inputs)]
        assert results[0].dtype == torch.float32 and results[1].dtype == dtype
        assert_same([results[0], *results[3:]], [expected[0], *expected[3:]], 2e-6)
        assert_same(results[1:3], expected[1:3], 4e-3)


def test_gradients_by_finite_differences():
    image, text, scale, bias, ids = make_batch(6, width=3, images=4)
    inputs = [x.requires_grad_() for x in (image, text, scale, bias)]
    torch.autograd.gradcheck(lambda *x: clip_loss(*x, tile=4, ids=ids), inputs[:3])
    torch.autograd.gradcheck(lambda *x: siglip_loss(*x, tile=4, ids=ids), inputs)


def test_no_gradient_where_none_is_asked_for():
    image, text, scale, bias, _ = make_batch(9)
    for loss, inputs in ((clip_loss, (image, text, scale)), (siglip_loss, (image, text, scale, bias))):
        expected = loss(*inputs)
        assert not expected.requires_grad
        with torch.no_grad():
            torch.testing.assert_close(loss(*(x.clone().requires_grad_() for x in inputs), tile=4), expected)
        whole = value_and_gradients(loss, *inputs)
        for learns in range(len(inputs)):
            one_learns = [x.clone().requires_grad_(number == learns) for number, x in enumerate(inputs)]
            loss(*one_learns, tile=4).backward()
            torch.testing.assert_close(one_learns[learns].grad, whole[1 + learns])


class LargestTensor(TorchDispatchMode):
    """Remembers the most entries of any tensor that an operation gave back."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor):
                self.most = max(self.most, x.numel())
        return result


def test_no_tensor_beyond_the_features_and_two_tiles():
    rows, width, tile = 200, 4, 16
    image, text, scale, bias, ids = make_batch(rows, width=width, images=50)
    for loss, inputs in ((clip_loss, (image, text, scale)), (siglip_loss, (image, text, scale, bias))):
        with LargestTensor() as tiled:
            value_and_gradients(loss, *inputs, tile=tile, ids=ids)
        assert tiled.most == rows * width, "tiles are smaller than the features here"
        with LargestTensor() as whole:
            value_and_gradients(loss, *inputs, ids=ids)
        assert whole.most == rows * rows


def test_errors_say_what_is_wrong():
    image, text, scale, _, _ = make_batch(4)
    with pytest.raises(ValueError, match=r"must be \[B, D\] alike, not \[4, 8\] and \[3, 8\]"):
        clip_loss(image, text[:3], scale)
    with pytest.raises(ValueError, match="tile must be a positive number of rows, not 0"):
        clip_loss(image, text, scale, tile=0)
    with pytest.raises(ValueError, match="ids must have one entry for each of the 4 rows"):
        clip_loss(image, text, scale, ids=torch.arange(3))


def test_two_ranks_equal_one_with_everything():
    cases, expected = [], []
    for rows, images in ((2, None), (22, None), (22, 6)):
        image, text, scale, bias, ids = make_batch(rows, images=images)
        for loss, inputs in ((clip_loss, (image, text, scale)), (siglip_loss, (image, text, scale, bias))):
            for tile in (None, 1, 4, 100):
                cases.append((loss, inputs, {"tile": tile, "ids": ids}))
                expected.append(value_and_gradients(loss, *inputs, ids=ids))
    for result, wanted in zip(of_two_ranks(cases), expected, strict=True):
        assert_same([result[0].mean(), *result[1:]], wanted, 1e-12)


def test_two_ranks_in_float32():
    image, text, scale, bias, ids = make_batch(60, width=64, dtype=torch.float32, images=20)
    cases = [
        (loss, inputs, {"tile": tile, "ids": ids})
        for loss, inputs in ((clip_loss, (image, text, scale)), (siglip_loss, (image, text, scale, bias)))
        for tile in (None, 16)
    ]
    for (loss, inputs, _), result in zip(cases, of_two_ranks(cases), strict=True):
        assert_same([result[0].mean(), *result[1:]], value_and_gradients(loss, *inputs, ids=ids), 1e-6)


def test_each_rank_has_the_loss_of_its_own_rows():
    """Value and gradient, rank by rank, also where the ranks weigh their losses differently."""
    image, text, scale, bias, ids = make_batch(20, images=6)
    for loss, inputs in ((clip_loss, (image, text, scale)), (siglip_loss, (image, text, scale, bias))):
        cases = [(loss, inputs, {"tile": tile, "ids": ids}) for tile in (None, 4)]
        whole, tiled = of_two_ranks(cases, upstream=(3.0, 0.5))
        assert_same(tiled, whole, 1e-12)
