"""TeachCLIP's losses against plain loops and the dense form in float64, and two ranks against one."""

import math

import pytest
import torch

from convclip.video.teachclip_loss import (
    TeacherTargets,
    coarse_loss,
    fine_loss,
    ground_truth_loss,
    stuck_at_chance,
    student_logits,
    teachclip_loss,
)
from convclip.video.xclip_score import SCORE_MATRICES, fine_target, score_targets, xclip_score
from tests.processes import run_in_world

B, D, F = 6, 8, 5


def batch(seed=0):
    torch.manual_seed(seed)
    text, video = (torch.nn.functional.normalize(torch.randn(B, D), dim=-1) for _ in range(2))
    attention = torch.randn(B, F)
    n_frames = torch.tensor([5, 1, 2, 3, 4, 5])
    mask = torch.arange(F) < n_frames[:, None]
    return text, video, torch.tensor([7.0]), attention, mask


def teachers(seed=1, fine=True):
    torch.manual_seed(seed)
    q = 5 * torch.randn(B, B)
    return TeacherTargets(q, q.T, torch.randn(B, F).softmax(-1) if fine else None)


def softmax(values):
    top = max(values)
    powers = [math.exp(v - top) for v in values]
    return [p / sum(powers) for p in powers]


def correlation(x, y):
    mx, my = sum(x) / len(x), sum(y) / len(y)
    top = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return top / math.sqrt(sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y))


def loop_losses(s, q, w, r, mask, kind):
    """Ground truth, coarse and fine written as sums over Python numbers."""
    n = len(s)
    s, q = s.tolist(), q.tolist()
    columns = lambda m: [list(c) for c in zip(*m, strict=True)]  # noqa: E731
    truth = coarse = 0.0
    for student, teacher in ((s, q), (columns(s), columns(q))):
        for i in range(n):
            p = softmax(student[i])
            truth -= math.log(p[i]) / n / 2
            if kind == "pearson":
                coarse += (1 - correlation(p, softmax(teacher[i]))) / n
            else:
                soft = softmax(teacher[i])
                coarse -= sum(t * math.log(x) for t, x in zip(soft, p, strict=True)) / n**2
    fine = 0.0
    for b in range(n):
        real = [f for f in range(F) if mask is None or mask[b, f]]
        total = sum(float(r[b, f]) for f in real)
        fine -= sum(math.log(float(w[b, f])) * float(r[b, f]) / total for f in real) / (n * F)
    return truth, coarse, fine


@pytest.mark.parametrize("kind", ["pearson", "ce"])
@pytest.mark.parametrize("masked", [True, False])
def test_losses_equal_plain_loops(kind, masked):
    text, video, scale, attention, mask = batch()
    weights = attention.masked_fill(~mask, -math.inf).softmax(-1) if masked else attention.softmax(-1)
    teacher = teachers()
    parts = teachclip_loss(text, video, scale, weights, [teacher], mask if masked else None, coarse=kind)
    s = 7.0 * text @ video.T
    expected = loop_losses(s, teacher.rows, weights, teacher.frames, mask if masked else None, kind)
    for name, value in zip(("ground_truth", "coarse", "fine"), expected, strict=True):
        assert float(parts[name]) == pytest.approx(value, rel=1e-5), name
    factors = (0.2, 1, 2) if kind == "pearson" else (1, 10, 1)
    total = sum(f * v for f, v in zip(factors, expected, strict=True))
    assert float(parts["total"]) == pytest.approx(total, rel=1e-5)


def dense_total(text, video, scale, attention, mask, teacher):
    """The whole batch's loss in one formula, with torch.corrcoef for the correlation."""
    s = scale * text @ video.T
    places = torch.arange(len(s))
    truth = (torch.nn.functional.cross_entropy(s, places) + torch.nn.functional.cross_entropy(s.T, places)) / 2
    coarse = 0
    for a, b in ((s, teacher.rows.to(s)), (s.T, teacher.columns.to(s))):
        for i in range(len(s)):
            coarse = coarse + (1 - torch.corrcoef(torch.stack([a[i].softmax(0), b[i].softmax(0)]))[0, 1]) / len(s)
    fine = 0
    for b in range(len(s)):
        real = mask[b]
        r = teacher.frames[b, real].to(s)
        fine = fine - (attention[b, real].log_softmax(0) * r / r.sum()).sum() / mask.numel()
    return 0.2 * truth + coarse + 2 * fine


def test_gradients_equal_the_dense_form_in_float64():
    *inputs, mask = batch()
    teacher = teachers()
    dense = [x.double().requires_grad_() for x in inputs]
    dense_total(*dense, mask, teacher).backward()
    ours = [x.clone().requires_grad_() for x in inputs]
    weights = ours[3].masked_fill(~mask, -math.inf).softmax(-1)
    teachclip_loss(*ours[:3], weights, [teacher], mask)["total"].backward()
    for a, b in zip(ours, dense, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-6)


def test_several_teachers_are_averaged_and_a_coarse_only_one_has_no_say_on_frames():
    text, video, scale, attention, _ = batch()
    weights = attention.softmax(-1)
    first, second = teachers(1), teachers(2, fine=False)
    alone = [teachclip_loss(text, video, scale, weights, [t]) for t in (first, second)]
    both = teachclip_loss(text, video, scale, weights, [first, second])
    torch.testing.assert_close(both["coarse"], (alone[0]["coarse"] + alone[1]["coarse"]) / 2)
    torch.testing.assert_close(both["fine"], alone[0]["fine"])
    assert alone[1]["fine"] == 0
    none = teachclip_loss(text, video, scale, weights, [], weights=(1.0, 1.0, 1.0))
    torch.testing.assert_close(none["total"], none["ground_truth"])


def test_a_perfect_student_has_no_coarse_loss():
    q = teachers().rows
    assert float(coarse_loss(q, q.T, q, q.T)) == pytest.approx(0, abs=1e-5)
    assert float(coarse_loss(-q, -q.T, q, q.T)) > 1


def test_collapsed_features_stay_finite_and_are_noticed():
    ones = torch.nn.functional.normalize(torch.ones(B, D), dim=-1).requires_grad_()
    weights = torch.zeros(B, F).softmax(-1)
    parts = teachclip_loss(ones, ones, torch.tensor([7.0]), weights, [teachers()])
    parts["total"].backward()
    assert torch.isfinite(ones.grad).all()
    assert stuck_at_chance([parts["ground_truth"].item()] * 3, B)
    assert not stuck_at_chance([parts["ground_truth"].item(), 0.5], B)
    assert not stuck_at_chance([], B)


def test_a_frame_weight_of_zero_does_not_make_the_loss_infinite():
    weights = torch.tensor([[1.0, 0.0]], requires_grad=True)
    loss = fine_loss(weights, torch.tensor([[0.5, 0.5]]))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(weights.grad).all()


def test_ground_truth_counts_from_the_ranks_first_place():
    text, video, scale, *_ = batch()
    rows, columns = student_logits(text, video, scale)
    whole = ground_truth_loss(rows, columns, 0)
    parts = [ground_truth_loss(rows[i : i + 2], columns[i : i + 2], i) for i in (0, 2, 4)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


def features(seed=3):
    torch.manual_seed(seed)
    made = {"word_raw": torch.randn(B, 4, D).half(), "eot": torch.randint(0, 4, (B,))}
    made |= {"frame_raw": torch.randn(B, F, D).half(), "video_out": torch.randn(B, D)}
    sides = {"global": D, "local": D, "word": 4, "frame": F}
    parameters = {name: torch.randn(sides[name.split("_")[0]], sides[name.split("_")[0]]) for name in SCORE_MATRICES}
    return made, parameters | {"logit_scale": torch.tensor(1.0)}


def one_rank():
    """Loss and gradients of this rank's rows, its teacher read from the whole batch's stored features."""
    import torch.distributed as dist

    world, mine = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    own = slice(mine * B // world, (mine + 1) * B // world)
    text, video, scale, attention, mask = batch()
    inputs = [x.requires_grad_() for x in (text[own].clone(), video[own].clone(), scale, attention[own].clone())]
    stored, parameters = features()
    teacher = TeacherTargets(*score_targets(stored, parameters, own))
    weights = inputs[3].masked_fill(~mask[own], -math.inf).softmax(-1)
    parts = teachclip_loss(*inputs[:3], weights, [teacher], mask[own])
    parts["total"].backward()
    return {name: value.item() for name, value in parts.items()}, [x.grad for x in inputs]


def test_two_ranks_equal_one():
    losses, gradients = one_rank()
    ranks = run_in_world(2, one_rank)
    for name, value in losses.items():
        assert sum(r[0][name] for r in ranks) / 2 == pytest.approx(value, rel=1e-5), name
    # The mean over ranks of the gradients: own rows are half their sum, logit_scale the mean.
    for i in (0, 1, 3):
        torch.testing.assert_close(torch.cat([r[1][i] for r in ranks]) / 2, gradients[i], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close((ranks[0][1][2] + ranks[1][1][2]) / 2, gradients[2], rtol=1e-4, atol=1e-6)


def test_score_targets_are_the_score_matrixs_own_rows_and_columns():
    stored, parameters = features()
    arguments = [stored[name] for name in ("word_raw", "eot", "frame_raw", "video_out")]
    q = xclip_score(*arguments, parameters)
    r = fine_target(*arguments[:3])
    for own in (slice(0, B), slice(2, 4)):
        rows, columns, target = score_targets(stored, parameters, own)
        torch.testing.assert_close(rows, q[own])
        torch.testing.assert_close(columns, q.T[own])
        torch.testing.assert_close(target, r[own])
