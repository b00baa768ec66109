"""The TeachCLIP student: against its formulas written out video by video, its start, its masks, its parts."""

import math

import pytest
import torch
import torch.nn.functional as F

from convclip import schema
from convclip.models.dual_tower import build_model
from convclip.models.layer_groups import locked_names, parameter_counts
from convclip.video.student import VideoStudent, mean_pool

D, FRAMES = 128, 5
N_FRAMES = torch.tensor([5, 1, 3, 4])


def towers(text="clip", width=D, context=77):
    torch.manual_seed(0)
    image = {"backbone": "convnextv2_atto", "image_size": 32}
    sizes = {"width": width, "heads": 2, "layers": 5, "vocab_size": 100, "context_length": context}
    return build_model(schema.Model(embed_dim=D, image=image, text={"kind": text, **sizes}))


def random_student(**options):
    """A student none of whose new parameters is zero."""
    student = VideoStudent(towers(), **options).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if name.startswith(("temporal", "aggregation")):
                parameter += 0.1 * torch.randn_like(parameter)
    return student


def features():
    return torch.randn(4, FRAMES, D, generator=torch.Generator().manual_seed(2))


def block_by_hand(block, x, visible):
    """One pre-norm block over [n, D]; row f attends to the frames in `visible`."""
    heads = D // 64
    y = F.layer_norm(x, (D,), block.ln_1.weight, block.ln_1.bias)
    q, k, v = F.linear(y, block.attn.in_proj_weight, block.attn.in_proj_bias).split(D, dim=1)
    rows = []
    for f in range(len(x)):
        parts = []
        for h in range(heads):
            part = slice(64 * h, 64 * (h + 1))
            weights = torch.stack([q[f, part] @ k[o, part] / 8 for o in visible]).softmax(0)
            parts.append(sum(weight * v[o, part] for weight, o in zip(weights, visible, strict=True)))
        rows.append(torch.cat(parts))
    x = x + block.attn.out_proj(torch.stack(rows))
    y = block.mlp.c_fc(F.layer_norm(x, (D,), block.ln_2.weight, block.ln_2.bias))
    return x + block.mlp.c_proj(y * torch.sigmoid(1.702 * y))


def video_by_hand(student, x, n, masked):
    """(video, frame weights) of one video of n real frames."""
    hidden = x + student.temporal.positions.weight[: len(x)]
    for block in student.temporal.blocks.resblocks:
        hidden = block_by_hand(block, hidden, range(n))
    hidden = hidden + x
    first, second = student.aggregation.hidden, student.aggregation.attention
    attention = (F.relu(hidden @ first.weight.T + first.bias) @ second.weight.T + second.bias)[:, 0]
    used = range(n) if masked else range(len(x))
    sharp = torch.stack([attention[f] / 0.1 for f in used]).softmax(0)
    video = sum(weight * hidden[f] / hidden[f].norm() for weight, f in zip(sharp, used, strict=True))
    weights = torch.zeros(len(x))
    weights[: len(used)] = torch.stack([attention[f] for f in used]).softmax(0)
    return video / video.norm(), weights


@pytest.mark.parametrize("masked", [True, False])
def test_videos_equal_the_formulas_written_out(masked):
    student, x = random_student(mask_padding=masked), features()
    with torch.no_grad():
        videos, weights = student.encode_video(x, N_FRAMES)
        for b, n in enumerate(N_FRAMES.tolist()):
            video, expected = video_by_hand(student, x[b], n, masked)
            torch.testing.assert_close(videos[b], video, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(weights[b], expected, rtol=1e-4, atol=1e-5)


def test_what_padded_frames_hold_does_not_matter_unless_asked():
    x, other = features(), features()
    for b, n in enumerate(N_FRAMES.tolist()):
        other[b, n:] = 9
    for masked in (True, False):
        student = random_student(mask_padding=masked)
        with torch.no_grad():
            a, b = student.encode_video(x, N_FRAMES), student.encode_video(other, N_FRAMES)
        same = torch.allclose(a[0], b[0], atol=1e-6) and torch.allclose(a[1], b[1], atol=1e-6)
        assert same == masked
    assert (a[1].sum(1) - 1).abs().max() < 1e-6


def test_temporal_blocks_start_as_the_text_towers_first_four():
    student = VideoStudent(towers())
    text, temporal = student.text, student.temporal
    assert torch.equal(temporal.positions.weight, text.positional_embedding)
    for i in range(4):
        own = dict(temporal.blocks.resblocks[i].named_parameters())
        for name, parameter in text.transformer.resblocks[i].named_parameters():
            assert torch.equal(own[name], parameter), name
            assert own[name] is not parameter
    assert temporal.blocks.resblocks[0].attn.num_heads == D // 64
    assert student.new == [f"aggregation.{name}" for name, _ in student.aggregation.named_parameters()]


@pytest.mark.parametrize(("text", "width"), [("gpt2", 128), ("clip", 64)])
def test_what_cannot_be_copied_is_named_and_starts_aligned(text, width):
    student = VideoStudent(towers(text, width)).eval()
    new = [name for name, _ in student.named_parameters() if name.startswith(("temporal", "aggregation"))]
    assert sorted(student.new) == sorted(new)
    same = F.normalize(torch.randn(4, 1, D), dim=-1).expand(-1, FRAMES, -1)
    with torch.no_grad():
        video, weights = student.encode_video(same, N_FRAMES)
    torch.testing.assert_close(video, same[:, 0], rtol=1e-5, atol=1e-5)
    assert weights[1].tolist() == [1, 0, 0, 0, 0]


def test_positions_of_another_length_are_new_while_blocks_are_copied():
    student = VideoStudent(towers(context=32))
    assert [name for name in student.new if name.startswith("temporal")] == ["temporal.positions.weight"]
    assert not student.temporal.positions.weight.any()
    identity = VideoStudent(towers(), temporal_init="identity")
    assert "temporal.blocks.resblocks.3.mlp.c_proj.weight" in identity.new


def test_forward_from_frames_equals_its_steps_and_stored_features_run_no_tower():
    student = random_student()
    frames = torch.randn(4, FRAMES, 3, 32, 32)
    tokens = torch.randint(1, 99, (4, 16))
    tokens[:, 9:] = 0
    tokens[:, 8] = 99
    with torch.no_grad():
        live = student(frames, tokens, N_FRAMES)
        stored_frames, stored_text = student.encode_frames(frames, N_FRAMES), student.encode_text(tokens)
        for b in range(4):
            torch.testing.assert_close(stored_frames[b], student.encode_image(frames[b]), rtol=1e-4, atol=1e-5)

        def forbidden(*_):
            raise AssertionError("a tower ran")

        hooks = [tower.register_forward_pre_hook(forbidden) for tower in (student.visual, student.text)]
        stored = student(stored_frames, stored_text, N_FRAMES)
        for hook in hooks:
            hook.remove()
    for name in ("image", "text", "logit_scale"):
        torch.testing.assert_close(getattr(live, name), getattr(stored, name), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(live.extras, stored.extras, rtol=1e-5, atol=1e-6)
    assert live.text.norm(dim=-1).sub(1).abs().max() < 1e-5
    assert student(texts=tokens).image is None and student(stored_frames, n_frames=N_FRAMES).text is None


def test_without_masking_padded_frames_are_zeros_after_normalising():
    student = random_student(mask_padding=False)
    frames = torch.full((1, FRAMES, 3, 32, 32), -1.8)
    with torch.no_grad():
        encoded = student.encode_frames(frames, torch.tensor([2]))
        zeros = student.encode_image(torch.zeros(1, 3, 32, 32))
    torch.testing.assert_close(encoded[0, 2:], zeros.expand(3, -1), rtol=1e-4, atol=1e-5)


def test_mean_pool_is_the_mean_of_real_unit_frames():
    x = features()
    pooled = mean_pool(x, N_FRAMES)
    for b, n in enumerate(N_FRAMES.tolist()):
        mean = sum(x[b, f] / x[b, f].norm() for f in range(n)) / n
        torch.testing.assert_close(pooled[b], mean / mean.norm())


def test_parts_have_the_names_and_sizes_that_groups_and_plans_need():
    with torch.device("meta"):
        student = VideoStudent(towers())
    parts = {name.split(".")[0] for name, _ in student.named_parameters()}
    assert parts == {"visual", "text", "logit_scale", "temporal", "aggregation"}
    sizes = dict.fromkeys(parts, 0)
    for name, parameter in student.named_parameters():
        sizes[name.split(".")[0]] += parameter.numel()
    assert sizes["temporal"] == 77 * D + 4 * (12 * D**2 + 13 * D)
    assert sizes["aggregation"] == D**2 + D + D + 1
    frozen = {name for tower in ("image", "text") for name in locked_names(student, tower)}
    trainable = {name for name, _ in student.named_parameters()} - frozen
    assert (
        parameter_counts(student, trainable)["total"]
        == sum(sizes.values()) - parameter_counts(student, frozen)["total"]
    )


def test_locked_towers_still_train_what_is_new():
    student = VideoStudent(towers(), temporal_init="identity").requires_grad_(False)
    student.temporal.requires_grad_()
    student.aggregation.requires_grad_()
    student.train()
    assert not student.visual.training and not student.text.training and student.temporal.training
    video, weights = student.encode_video(features(), N_FRAMES)
    (video[:, 0].sum() - weights[:, 0].clamp_min(1e-6).log().sum()).backward()
    moving = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    assert "temporal.blocks.resblocks.0.attn.out_proj.weight" in moving
    assert {f"aggregation.{n}.weight" for n in ("hidden", "attention")} <= moving


def test_features_leave_a_half_precision_model_in_float32():
    student = random_student().bfloat16()
    with torch.no_grad():
        output = student(features(), torch.randn(4, D).bfloat16(), N_FRAMES)
    values = [output.image, output.text, output.logit_scale, *output.extras.values()]
    assert all(value.dtype == torch.float32 for value in values)
    assert math.isclose(float(output.image.norm(dim=-1).mean()), 1, rel_tol=1e-5)
