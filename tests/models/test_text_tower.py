"""Text towers against open_clip's CLIP and transformers' GPT2Model."""

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2Model

from convclip import schema
from convclip.models.clip_text import ClipText
from convclip.models.gpt2_text import Gpt2Text
from convclip.models.tower import cut_to_longest
from convclip.models.towers import build_text_tower

CLIP = schema.TextTowerConfig(width=32, heads=4, layers=3, vocab_size=100, context_length=20)
GPT2 = schema.TextTowerConfig(kind="gpt2", width=32, heads=4, layers=3, vocab_size=100, context_length=20)


def tower(config: schema.TextTowerConfig):
    torch.manual_seed(0)
    return build_text_tower(config, 24)


def captions(lengths=(5, 11, 2), padding: int = 0) -> torch.Tensor:
    """Token ids [B, 20]: random words, the end token (99), then padding."""
    tokens = torch.full((len(lengths), 20), padding)
    for row, length in zip(tokens, lengths, strict=True):
        row[: length - 1] = torch.randint(1, 99, (length - 1,), generator=torch.Generator().manual_seed(length))
        row[length - 1] = 99
    return tokens


@pytest.mark.parametrize("lengths", [(5, 11, 2), (20, 1, 7), (8, 8, 8)])
def test_clip_text_is_open_clips(lengths):
    ours = tower(CLIP).eval()
    sizes = {"width": 32, "heads": 4, "layers": 3, "vocab_size": 100, "context_length": 20}
    theirs = open_clip.model.CLIP(24, {"timm_model_name": "test_convnext"}, sizes).eval()
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not unexpected
    assert all(key.startswith("visual.") or key == "logit_scale" for key in missing)
    torch.testing.assert_close(ours(captions(lengths)), theirs.encode_text(captions(lengths)), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("options", [{"activation": "quick_gelu"}, {"causal": False}], ids=["QuickGELU", "no mask"])
@pytest.mark.parametrize("custom", [False, True], ids=["CLIP", "CustomTextCLIP"])
def test_other_clip_texts_are_open_clips(options, custom):
    """Without a causal mask open_clip lets tokens attend to the padding, so short captions keep their columns."""
    config = CLIP.model_copy(update=options)
    ours = tower(config).eval()
    sizes = {"width": 32, "heads": 4, "layers": 3, "vocab_size": 100, "context_length": 20}
    sizes["no_causal_mask"] = not config.causal
    kind = open_clip.model.CustomTextCLIP if custom else open_clip.model.CLIP
    theirs = kind(24, {"timm_model_name": "test_convnext"}, sizes, quick_gelu="activation" in options).eval()
    prefix = "text." if custom else ""
    _, unexpected = theirs.load_state_dict({f"{prefix}{n}": t for n, t in ours.state_dict().items()}, strict=False)
    assert not unexpected
    for lengths in [(5, 11, 2), (20, 1, 7), (3, 4, 5)]:
        expected = theirs.encode_text(captions(lengths))
        torch.testing.assert_close(ours(captions(lengths)), expected, atol=1e-6, rtol=1e-5)
        for cut in range(1, 5):
            torch.testing.assert_close(ours(ours(captions(lengths), stop=cut), cut), expected, atol=1e-6, rtol=1e-5)
    plain = tower(CLIP).eval()
    plain.load_state_dict(ours.state_dict())
    assert (plain(captions()) - ours(captions())).abs().max() > 1e-4


@pytest.mark.parametrize("padding", [0, 99])
def test_gpt2_is_transformers_gpt2_pooled_at_the_first_end_token(padding):
    ours = tower(GPT2).eval()
    reference = GPT2Model(
        GPT2Config(n_embd=32, n_head=4, n_layer=3, vocab_size=100, bos_token_id=99, eos_token_id=99)
    ).eval()
    reference.load_state_dict(ours.transformer.state_dict(), strict=True)
    tokens = captions(padding=padding)
    hidden = reference(input_ids=tokens).last_hidden_state
    pooled = torch.stack([hidden[0, 4], hidden[1, 10], hidden[2, 1]])
    first, _, second = ours.proj
    expected = torch.nn.functional.gelu(pooled @ first.weight.T) @ second.weight.T
    torch.testing.assert_close(ours(tokens), expected, atol=1e-6, rtol=1e-5)


def test_gpt2_projection_halves_the_way():
    with torch.device("meta"):
        model = build_text_tower(schema.TextTowerConfig(kind="gpt2", layers=1), 512)
    assert [tuple(layer.weight.shape) for layer in (model.proj[0], model.proj[2])] == [(640, 768), (512, 640)]
    assert [name for name, _ in model.proj.named_parameters()] == ["0.weight", "2.weight"]
    assert model.transformer.wpe.weight.shape == (1024, 768)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.sampled_from([0, 99]))
@settings(max_examples=30, deadline=None)
def test_only_padding_is_cut(lengths, padding):
    tokens = captions(lengths, padding)
    ends = tower(CLIP).ends(tokens)
    short = cut_to_longest(tokens, ends)
    assert ends.tolist() == [length - 1 for length in lengths]
    assert short.shape[1] >= max(lengths)
    assert torch.equal(short, tokens[:, : short.shape[1]])
    assert short.shape[1] in (*range(8, 17, 8), 20)


@pytest.mark.parametrize("config", [CLIP, GPT2], ids=["clip", "gpt2"])
def test_an_embedding_does_not_depend_on_its_batch(config):
    model = tower(config).eval()
    together = model(captions((3, 18, 9)))
    alone = torch.cat([model(captions((length,))) for length in (3, 18, 9)])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("config", [CLIP, GPT2], ids=["clip", "gpt2"])
def test_in_two_parts_it_is_the_whole(config):
    model = tower(config).eval()
    whole = model(captions())
    assert model.cuts == list(range(5))
    for cut in model.cuts:
        assert torch.equal(model(model(captions(), 0, cut), cut), whole), cut
    middle = model(captions(), 0, 2)
    assert [x.shape for x in middle] == [(3, 16, 32), (3,)]
    assert [x.shape for x in model(middle, 2, 3)] == [(3, 16, 32), (3,)]
    assert model(middle, 2, 4)[0].shape == (3, 24 if config is CLIP else 32)


@pytest.mark.parametrize("config", [CLIP, GPT2], ids=["clip", "gpt2"])
def test_checkpointing_changes_memory_only(config):
    results = []
    for enable in (False, True):
        model = tower(config).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(3)
        embeddings = model(captions())
        embeddings.square().sum().backward()
        results.append((embeddings, {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(results[1], results[0])


def test_gpt2_checkpointing_can_be_switched_off_again():
    model = tower(GPT2)
    for enable in (True, False):
        model.set_grad_checkpointing(enable)
        assert all(block.gradient_checkpointing == enable for block in model.transformer.h)


def test_gpt2_embedding_dropout_follows_the_embeddings():
    model = tower(GPT2)
    model.transformer.wte.weight.requires_grad_(False)
    assert not model.train().transformer.drop.training
    model.transformer.wte.weight.requires_grad_(True)
    assert model.train().transformer.drop.training
    assert not model.eval().transformer.drop.training


@pytest.mark.parametrize(("config", "kind"), [(CLIP, ClipText), (GPT2, Gpt2Text)], ids=["clip", "gpt2"])
def test_half_precision(config, kind):
    model = tower(config).bfloat16().eval()
    assert isinstance(model, kind)
    assert model(captions()).dtype == torch.bfloat16
