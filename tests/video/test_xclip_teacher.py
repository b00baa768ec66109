"""The X-CLIP teacher: its score against plain loops, its network against a second implementation, its checkpoints."""

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from convclip.schema import UserError
from convclip.video.xclip_score import SCORE_MATRICES, fine_target, xclip_score
from convclip.video.xclip_teacher import XClipSize, XClipTeacher, load_xclip, normalize_frames

SMALL = XClipSize(
    embed_dim=64,
    image_size=32,
    patch_size=16,
    vision_width=64,
    vision_layers=2,
    text_width=64,
    text_layers=2,
    context_length=40,
    vocab_size=300,
    temporal_layers=2,
    frame_positions=20,
    frames=4,
    words=6,
)


def random_teacher(seed=0, size=SMALL):
    torch.manual_seed(seed)
    teacher = XClipTeacher(size).eval()
    with torch.no_grad():
        for name in SCORE_MATRICES:
            matrix = getattr(teacher, name)
            matrix += 0.3 * torch.randn_like(matrix)
        for norm in (m for m in teacher.modules() if isinstance(m, torch.nn.LayerNorm)):
            norm.weight += 0.1 * torch.randn_like(norm.weight)
            norm.bias += 0.1 * torch.randn_like(norm.bias)
    return teacher


def random_input(batch=5, size=SMALL, seed=1):
    """Frames with padding behind 1..F real ones, and captions of every length from empty to full."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, size.frames, 3, size.image_size, size.image_size)
    frames = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    n_frames = torch.arange(batch) % size.frames + 1
    tokens = torch.zeros(batch, size.words, dtype=torch.long)
    for row in range(batch):
        length = row % (size.words - 1)
        tokens[row, 0] = size.vocab_size - 2
        tokens[row, 1 : 1 + length] = torch.randint(1, size.vocab_size - 2, (length,), generator=generator)
        tokens[row, 1 + length] = size.vocab_size - 1
        frames[row, n_frames[row] :] = 0
    return frames, n_frames, tokens


def loop_score(word_raw, eot, frame_raw, video_out, parameters):
    """The four terms of the specification, one pair and one index at a time, in float64."""
    p = {name: value.double() for name, value in parameters.items()}
    g, tau = p["logit_scale"].exp(), 1e-2

    def softmax(values):
        values = [float(v) / tau for v in values]
        top = max(values)
        powers = [math.exp(v - top) for v in values]
        return [power / sum(powers) for power in powers]

    def attended(values, matrix):
        weights = softmax(values)
        total = 0.0
        for j in range(len(values)):
            mixed = sum(weights[i] * float(matrix[i, j]) for i in range(len(values)))
            total += mixed * float(values[j])
        return total

    scores = torch.zeros(len(word_raw), len(frame_raw), dtype=torch.float64)
    for t in range(len(word_raw)):
        words = [w.double() / w.double().norm() for w in word_raw[t]]
        s = words[int(eot[t])]
        for v in range(len(frame_raw)):
            frames = [f.double() / f.double().norm() for f in frame_raw[v]]
            u = video_out[v].double() / video_out[v].double().norm()
            vs = float(s @ p["global_mat_weight"] @ u)
            vw = attended([w @ u for w in words], p["word_logit_weight"])
            sf = attended([f @ s for f in frames], p["frame_logit_weight"])
            a = [[float(w @ p["local_mat_weight"] @ f) for f in frames] for w in words]
            a1 = [attended([a[w][f] for w in range(len(words))], p["word_mat_weight"]) for f in range(len(frames))]
            a2 = [attended(a[w], p["frame_mat_weight"]) for w in range(len(words))]
            fw = 0.5 * (attended(a1, p["frame_mat_weight2"]) + attended(a2, p["word_mat_weight2"]))
            scores[t, v] = g * (vs + vw + sf + fw) / 4
    return scores


def test_score_equals_the_plain_loop_over_every_pair():
    teacher = random_teacher()
    with torch.no_grad():
        features = teacher(*random_input())
    parameters = teacher.score_parameters()
    arguments = [features[name] for name in ("word_raw", "eot", "frame_raw", "video_out")]
    expected = loop_score(*arguments, parameters)
    for block_pairs in (16384, 7, 1):
        score = xclip_score(*arguments, parameters, block_pairs=block_pairs)
        assert score.dtype == torch.float32
        torch.testing.assert_close(score.double(), expected, rtol=1e-5, atol=1e-5)


def test_score_of_unequal_numbers_of_captions_and_videos():
    teacher = random_teacher()
    with torch.no_grad():
        features = teacher(*random_input(batch=6))
    words, eot = features["word_raw"], features["eot"]
    frames, video = features["frame_raw"], features["video_out"]
    parameters = teacher.score_parameters()
    whole = xclip_score(words, eot, frames, video, parameters)
    part = xclip_score(words[1:3], eot[1:3], frames, video, parameters, block_pairs=5)
    torch.testing.assert_close(part, whole[1:3])
    assert xclip_score(words, eot, frames[4:], video[4:], parameters).shape == (6, 2)


def test_fine_target_is_the_softmax_of_cosines_of_matched_pairs():
    torch.manual_seed(0)
    words, frames = torch.randn(3, 6, 8).half(), torch.randn(3, 4, 8).half()
    eot = torch.tensor([5, 0, 2])
    target = fine_target(words, eot, frames)
    for b in range(3):
        cosines = [F.cosine_similarity(words[b, eot[b]].double(), f.double(), dim=0) for f in frames[b]]
        expected = torch.stack(cosines).softmax(0)
        torch.testing.assert_close(target[b].double(), expected, rtol=1e-5, atol=1e-6)


def test_network_equals_a_second_implementation_of_the_encoders():
    """Attention, norms and masks written out here; videos one at a time, without their padded frames where masked."""
    teacher = random_teacher(seed=3)
    frames, n_frames, tokens = random_input(seed=4)
    with torch.no_grad():
        features = teacher(frames, n_frames, tokens)
        for b in range(len(frames)):
            n = int(n_frames[b])
            words = _text_by_hand(teacher, tokens[b])
            torch.testing.assert_close(features["word_raw"][b].float(), words, rtol=2e-3, atol=2e-3)
            x = features["frame_raw"][b].float()
            out = x[:n] + teacher.frame_position_embeddings.weight[:n]
            for block in teacher.transformerClip.resblocks:
                out = _block_by_hand(block, out, heads=1, eps=1e-12)
            expected = F.normalize(out + x[:n], dim=-1).mean(0)
            torch.testing.assert_close(features["video_out"][b], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(features["eot"], (tokens == SMALL.vocab_size - 1).int().argmax(-1))


def _block_by_hand(block, x, heads, eps, causal=False):
    n, d = x.shape
    y = F.layer_norm(x, (d,), block.ln_1.weight, block.ln_1.bias, eps)
    q, k, v = F.linear(y, block.attn.in_proj_weight, block.attn.in_proj_bias).split(d, dim=1)
    outputs = []
    for h in range(heads):
        part = slice(h * d // heads, (h + 1) * d // heads)
        logits = q[:, part] @ k[:, part].T / math.sqrt(d // heads)
        if causal:
            logits = logits.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf)
        outputs.append(logits.softmax(-1) @ v[:, part])
    x = x + F.linear(torch.cat(outputs, 1), block.attn.out_proj.weight, block.attn.out_proj.bias)
    y = F.linear(F.layer_norm(x, (d,), block.ln_2.weight, block.ln_2.bias, eps), *_linear(block.mlp.c_fc))
    return x + F.linear(y * torch.sigmoid(1.702 * y), *_linear(block.mlp.c_proj))


def _linear(layer):
    return layer.weight, layer.bias


def _text_by_hand(teacher, tokens):
    clip = teacher.clip
    x = clip.token_embedding.weight[tokens] + clip.positional_embedding[: len(tokens)]
    for block in clip.transformer.resblocks:
        x = _block_by_hand(block, x, heads=1, eps=1e-5, causal=True)
    x = F.layer_norm(x, x.shape[1:], clip.ln_final.weight, clip.ln_final.bias)
    return x @ clip.text_projection


def test_padded_frames_are_one_constant_vector_whatever_they_hold():
    teacher = random_teacher()
    frames, n_frames, tokens = random_input()
    with torch.no_grad():
        features = teacher(frames, n_frames, tokens)
        frames[0, n_frames[0] :] = 77
        again = teacher(frames, n_frames, tokens)
        grey = teacher.clip.encode_image(torch.zeros(1, 3, SMALL.image_size, SMALL.image_size))[0]
    for name, value in features.items():
        assert torch.equal(value, again[name]), name
    torch.testing.assert_close(features["frame_raw"][0, -1].float(), grey, rtol=1e-3, atol=1e-3)


def test_float_frames_are_taken_as_normalised():
    teacher = random_teacher()
    frames, n_frames, _ = random_input()
    with torch.no_grad():
        a = teacher.encode_video(frames, n_frames)
        b = teacher.encode_video(normalize_frames(frames), n_frames)
    assert torch.equal(a["frame_raw"], b["frame_raw"])


def test_stored_features_give_the_live_score():
    """What is stored is fp16 un-normalised; the live teacher rounds there too, so nothing is lost."""
    teacher = random_teacher()
    with torch.no_grad():
        live = teacher(*random_input())
    stored = {name: torch.from_numpy(value.numpy().copy()) for name, value in live.items()}
    assert stored["word_raw"].dtype == stored["frame_raw"].dtype == torch.float16
    names = ("word_raw", "eot", "frame_raw", "video_out")
    q = xclip_score(*[live[n] for n in names], teacher.score_parameters())
    assert torch.equal(q, xclip_score(*[stored[n] for n in names], teacher.score_parameters()))


def test_half_encoders_agree_with_full_ones():
    teacher = random_teacher()
    frames, n_frames, tokens = random_input()
    with torch.no_grad():
        full = teacher(frames, n_frames, tokens)
        half = teacher.half_encoders()(frames, n_frames, tokens)
    for name in ("frame_raw", "word_raw", "video_out"):
        torch.testing.assert_close(half[name].float(), full[name].float(), rtol=0.05, atol=0.02)


def test_wrong_numbers_of_frames_and_words_are_refused():
    teacher = random_teacher()
    frames, n_frames, tokens = random_input()
    with pytest.raises(UserError, match="4 frames, got 3"):
        teacher.encode_video(frames[:, :3], n_frames)
    with pytest.raises(UserError, match="6 words, got 5"):
        teacher.encode_text(tokens[:, :5])


def full_size_shapes():
    """Names and shapes of X-CLIP's ViT-B/32 checkpoint, written down from its published code."""
    shapes = {"clip.visual.conv1.weight": (768, 3, 32, 32), "clip.visual.class_embedding": (768,)}
    shapes |= {"clip.visual.positional_embedding": (50, 768), "clip.visual.proj": (768, 512)}
    shapes |= {f"clip.visual.{n}.{p}": (768,) for n in ("ln_pre", "ln_post") for p in ("weight", "bias")}
    shapes |= {"clip.positional_embedding": (77, 512), "clip.text_projection": (512, 512), "clip.logit_scale": ()}
    shapes |= {"clip.token_embedding.weight": (49408, 512)}
    shapes |= {"clip.ln_final.weight": (512,), "clip.ln_final.bias": (512,)}
    for prefix, layers, width in (("clip.visual.transformer", 12, 768), ("clip.transformer", 12, 512)):
        shapes |= block_shapes(prefix, layers, width)
    shapes |= block_shapes("transformerClip", 4, 512)
    shapes |= {"frame_position_embeddings.weight": (77, 512)}
    shapes |= {"global_mat_weight": (512, 512), "local_mat_weight": (512, 512)}
    shapes |= {"word_logit_weight": (32, 32), "word_mat_weight": (32, 32), "word_mat_weight2": (32, 32)}
    shapes |= {"frame_logit_weight": (12, 12), "frame_mat_weight": (12, 12), "frame_mat_weight2": (12, 12)}
    return shapes


def block_shapes(prefix, layers, width):
    parts = {"attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,)}
    parts |= {"attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,)}
    parts |= {f"{norm}.{p}": (width,) for norm in ("ln_1", "ln_2") for p in ("weight", "bias")}
    parts |= {"mlp.c_fc.weight": (4 * width, width), "mlp.c_fc.bias": (4 * width,)}
    parts |= {"mlp.c_proj.weight": (width, 4 * width), "mlp.c_proj.bias": (width,)}
    return {f"{prefix}.resblocks.{i}.{name}": shape for i in range(layers) for name, shape in parts.items()}


def test_full_size_checkpoint_of_the_published_names_loads(tmp_path):
    state = {name: torch.full(shape, 0.01, dtype=torch.float16) for name, shape in full_size_shapes().items()}
    torch.save(state, tmp_path / "pytorch_model.bin.4")
    teacher = load_xclip(tmp_path / "pytorch_model.bin.4")
    assert teacher.size == XClipSize()
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    matrices = [value.numel() for name, value in teacher.score_parameters().items() if name != "logit_scale"]
    assert sum(matrices) == 527_792
    assert teacher.transformerClip.resblocks[0].attn.num_heads == 8


def test_size_follows_the_checkpoint(tmp_path):
    teacher = random_teacher()
    torch.save(teacher.state_dict(), tmp_path / "model.bin")
    save_file(teacher.state_dict(), tmp_path / "model.safetensors")
    for name in ("model.bin", "model.safetensors"):
        loaded = load_xclip(tmp_path / name)
        assert loaded.size == SMALL
        for key, value in teacher.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value), key
    half = load_xclip(tmp_path / "model.bin", precision="fp16")
    assert half.clip.visual.conv1.weight.dtype == torch.float16
    assert half.transformerClip.resblocks[0].attn.in_proj_weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("transformerClip.resblocks.1.ln_2.bias"), "missing transformerClip.resblocks.1.ln_2.bias"),
        (lambda s: s.pop("word_logit_weight"), "missing word_logit_weight"),
        (lambda s: s.update(extra=torch.zeros(1)), "left over extra"),
        (lambda s: s.update(frame_mat_weight=torch.eye(5)), r"frame_mat_weight has shape \(5, 5\), expected \(4, 4\)"),
        (lambda s: s.update({"clip.positional_embedding": torch.zeros(4)}), "not a 2-d tensor"),
        (
            lambda s: [s.pop(k) for k in list(s) if k.startswith("transformerClip")],
            r"missing transformerClip\.resblocks",
        ),
        (lambda s: s.update({"vision_model.x": torch.zeros(1)}), "two models share the name"),
    ],
)
def test_checkpoints_that_are_not_the_teachers_are_refused_by_name(tmp_path, change, message):
    state = dict(random_teacher().state_dict())
    change(state)
    torch.save(state, tmp_path / "model.bin")
    with pytest.raises(UserError, match=message):
        load_xclip(tmp_path / "model.bin")


def test_unreadable_files_are_refused(tmp_path):
    bad, code, nested = (tmp_path / name for name in ("bad.bin", "code.bin", "nested.bin"))
    bad.write_bytes(b"not a checkpoint")
    torch.save({"x": Fraction(1, 2)}, code)
    torch.save({"x": {"nested": torch.zeros(1)}}, nested)
    messages = {
        bad: "cannot be read",
        tmp_path / "none.bin": "cannot be read",
        code: "cannot be read",
        nested: "state dict",
    }
    for path, message in messages.items():
        with pytest.raises(UserError, match=message):
            load_xclip(path)
