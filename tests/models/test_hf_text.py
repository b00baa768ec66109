"""Hugging Face text encoders against transformers' AutoModel, at every cut, in every batch, and in training."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from convclip import schema
from convclip.models import build_model
from convclip.models.dual_tower import Cut
from convclip.models.hf_families import FAMILIES
from convclip.models.hf_text import HfText
from convclip.models.layer_groups import frozen_cut, layer_groups, locked_names, unlocked_names
from convclip.models.towers import build_text_tower
from convclip.models.weights import load_pretrained
from tests.models.hf_folders import KINDS, WIDTH, captions, text_section, write_encoder

IMAGE = schema.ImageTowerConfig(backbone="test_convnext", image_size=32)


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """transformers says where it saves."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{kind: a folder as it is released}."""
    made = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in made.items():
        write_encoder(folder, kind)
    return made


def loaded(folder: Any, **options: Any) -> HfText:
    """The tower with the folder's weights, in eval mode."""
    config = schema.Model(embed_dim=16, image=IMAGE, text=text_section(folder, **options))
    torch.manual_seed(1)
    model = build_model(config)
    report = load_pretrained(model, config)
    assert all(name.startswith(("visual.", "text.proj.", "logit_")) for name in report.new), report.new
    assert isinstance(model.text, HfText)
    return model.text.eval()


def theirs(folder: Any, kind: str) -> Any:
    """transformers' own encoder from the same folder."""
    known = transformers.T5EncoderModel if kind == "t5" else transformers.AutoModel
    return known.from_pretrained(folder).eval()


def pooled(hidden: Tensor, mask: Tensor, pool: str) -> Tensor:
    """Row by row, of the words alone."""
    rows = [row[:length] for row, length in zip(hidden, mask.sum(1), strict=True)]
    ways = {"mean": lambda x: x.mean(0), "cls": lambda x: x[0], "last": lambda x: x[-1], "max": lambda x: x.max(0)[0]}
    return torch.stack([ways[pool](row) for row in rows])


def test_the_tables_have_the_same_encoders():
    assert set(KINDS) == set(FAMILIES)


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_automodels_at_every_cut_with_every_pooling(folders, kind):
    tokens, mask = captions(kind)
    with torch.no_grad():
        hidden = theirs(folders[kind], kind)(input_ids=tokens, attention_mask=mask).last_hidden_state
        tower = loaded(folders[kind], projection="linear")
        assert tower.cuts == [0, 1, 2, 3, 4] and tower.ends(tokens).tolist() == [4, 22, 1, 29]
        seen = []
        for pool in ("mean", "cls", "last", "max"):
            tower.pooling = pool
            expected = tower.proj(pooled(hidden, mask, pool))
            for cut in tower.cuts:
                got = tower(tower(tokens, 0, cut), cut)
                torch.testing.assert_close(
                    got, expected, atol=1e-5, rtol=0, msg=lambda m, c=cut, p=pool: f"{p} {c} {m}"
                )
            seen.append(expected)
    # Not alike by chance: captions, and ways to pool.
    assert min((a - b).abs().max() for i, a in enumerate(seen) for b in seen[:i]) > 1e-2
    assert (seen[0][0] - seen[0][1]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_an_embedding_does_not_depend_on_its_batch(folders, kind):
    tower = loaded(folders[kind])
    tokens, _ = captions(kind)
    with torch.no_grad():
        together = tower(tokens)
        for row, embedding in zip(tokens, together, strict=True):
            torch.testing.assert_close(tower(row[None])[0], embedding, atol=1e-5, rtol=0)
        # What stands in the padding of a short caption's row is never looked at.
        assert tower(tokens[:1], 0, 2)[0].shape == (1, 8, WIDTH)


@pytest.mark.parametrize("kind", KINDS)
def test_layer_groups_are_embeddings_and_blocks(folders, kind):
    tower = build_text_tower(text_section(folders[kind]), 16)
    groups = tower.layer_groups()
    assert len(groups) == 4
    names = [name for group in groups for name in group]
    assert sorted(names) == sorted(name for name, _ in tower.named_parameters() if not name.startswith("proj."))
    assert tower.head_names() == ["proj.0.weight", "proj.2.weight"]
    blocks = FAMILIES[kind].blocks
    assert not any(name.startswith(f"transformer.{blocks}.") for name in groups[0])
    for number, group in enumerate(groups[1:]):
        inside = [name.startswith(f"transformer.{blocks}.{number}.") for name in group]
        # What follows the last block goes with it.
        assert all(inside) or (number == 2 and FAMILIES[kind].norm in group[-1])


def test_events_open_blocks_and_the_projection_always_trains(folders):
    model = build_model(schema.Model(embed_dim=16, image=IMAGE, text=text_section(folders["modernbert"])))
    assert len(layer_groups(model, "text")) == 4
    opened = unlocked_names(model, "text", layers=1)
    assert "text.transformer.final_norm.weight" in opened and all("embeddings" not in name for name in opened)
    trains = {name for name, _ in model.named_parameters()} - set(locked_names(model, "text"))
    assert frozen_cut(model, trains) == Cut(0, 4) and "text.proj.0.weight" in trains
    assert frozen_cut(model, {*trains, *opened}) == Cut(0, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_in_training_is_the_encoders_own(folders, kind):
    """The same draws in the same places as transformers' forward, where all captions have the full length."""
    tokens, mask = captions(kind, (24, 24), total=24)
    tower, other = loaded(folders[kind], projection="linear").train(), theirs(folders[kind], kind).train()
    torch.manual_seed(5)
    got = tower(tokens)
    torch.manual_seed(5)
    hidden = other(input_ids=tokens, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(got, tower.proj(pooled(hidden, mask, "mean")), atol=1e-5, rtol=0)
    assert (tower(tokens) - got).abs().max() > 1e-3
    # Off in what is frozen.
    model = build_model(schema.Model(embed_dim=16, image=IMAGE, text=text_section(folders[kind])))
    for name in locked_names(model, "text"):
        model.get_parameter(name).requires_grad_(False)
    model.train()
    assert torch.equal(model.text(tokens), model.text(tokens))
    # The last block alone: what enters it is not random, what leaves it is.
    for name in unlocked_names(model, "text", layers=1):
        model.get_parameter(name).requires_grad_(True)
    model.train()
    assert torch.equal(model.text(tokens, 0, 3)[0], model.text(tokens, 0, 3)[0])
    assert not torch.equal(model.text(tokens), model.text(tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_memory_only_and_all_parameters_learn(folders, kind):
    results = []
    for enable in (False, True):
        tower = loaded(folders[kind]).train()
        tower.set_grad_checkpointing(enable)
        ran: list[int] = []
        tower.blocks()[0].register_forward_pre_hook(lambda block, inputs, ran=ran: ran.append(1))
        torch.manual_seed(3)
        tower(captions(kind)[0]).square().sum().backward()
        results.append({name: parameter.grad for name, parameter in tower.named_parameters()})
        assert len(ran) == (2 if enable else 1)
    torch.testing.assert_close(results[1], results[0])
    assert [name for name, gradient in results[0].items() if gradient is None] == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_measures_it_on_the_meta_device_and_half_precision_is_close(folders, kind):
    with torch.device("meta"):
        tower = build_text_tower(text_section(folders[kind]), 16)
    # The plan's captions are ones, then the highest id; ids and ends stay on the CPU.
    longest = torch.ones(2, 30, dtype=torch.int64)
    longest[:, -1] = 49
    hidden, ends = tower(longest, 0, 2)
    assert hidden.is_meta and hidden.shape == (2, 30, WIDTH) and ends.tolist() == [29, 29]
    assert tower(longest).shape == (2, 16)
    real = loaded(folders[kind])
    tokens, _ = captions(kind)
    with torch.no_grad():
        expected = real(tokens)
        found = real.bfloat16()(tokens)
    assert found.dtype == torch.bfloat16 and torch.isfinite(found).all()
    cosine = nn.functional.cosine_similarity(found.float(), expected)
    assert cosine.min() > 0.98, cosine


def test_rotations_do_not_lose_precision_with_the_weights(folders):
    """ModernBERT's frequencies are a buffer in transformers, which a model in bf16 rounds; here there is none."""
    tower = loaded(folders["modernbert"])
    assert not list(tower.named_buffers())
    block, words = tower.blocks()[1], torch.ones(1, 1, 1, 30, dtype=torch.bool)
    full = tower._rotary(block, torch.zeros(1, 30, WIDTH), words)["position_embeddings"]
    half = tower._rotary(block, torch.zeros(1, 30, WIDTH, dtype=torch.bfloat16), words)["position_embeddings"]
    for a, b in zip(full, half, strict=True):
        assert torch.equal(a.bfloat16(), b)


def test_transformers_that_mask_modernberts_windows_themselves_are_refused(folders, monkeypatch):
    """5.0 takes a second mask, and would run every block with the whole caption in sight."""

    def forward(self, hidden_states, attention_mask=None, sliding_window_mask=None, position_embeddings=None):
        return hidden_states

    layer = transformers.models.modernbert.modeling_modernbert.ModernBertEncoderLayer
    monkeypatch.setattr(layer, "forward", forward)
    with pytest.raises(schema.UserError, match="ModernBERT in another way: pip install -U transformers"):
        build_text_tower(text_section(folders["modernbert"]), 16)


def test_a_caption_may_hold_the_padding_token_as_a_word(folders):
    tokens, mask = captions("roberta", (9,), total=30)
    tokens[0, 4] = 1
    hidden = theirs(folders["roberta"], "roberta")(input_ids=tokens, attention_mask=mask).last_hidden_state
    tower = loaded(folders["roberta"], projection="linear")
    torch.testing.assert_close(tower(tokens), tower.proj(pooled(hidden, mask, "mean")), atol=1e-5, rtol=0)


def test_projections(folders):
    def proj(projection: str, width: int = 16) -> nn.Module:
        return build_text_tower(text_section(folders["bert"], projection=projection), width).proj

    assert [tuple(layer.weight.shape) for layer in (proj("mlp")[0], proj("mlp")[2])] == [(24, 32), (16, 24)]
    assert proj("linear").weight.shape == (16, 32) and proj("linear").bias is None
    assert isinstance(proj("none", WIDTH), nn.Identity)
    with pytest.raises(
        schema.UserError, match=r"projection none needs model.embed_dim 32, the encoder's width, not 16"
    ):
        proj("none")
