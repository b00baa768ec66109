"""Layer groups against the parameter counts of the experiments (shared/spec/experiments.md), on the meta device."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convclip import schema
from convclip.models import build_model
from convclip.models.dual_tower import Cut
from convclip.models.layer_groups import layer_groups, locked_names, parameter_counts, unlocked_names

BASE_TEXT = {"width": 640, "heads": 10}
CONFIGS = {
    "tiny_gpt2": {"embed_dim": 512, "text": {"kind": "gpt2"}},
    "tiny_cliptext": {"embed_dim": 512},
    "base": {"embed_dim": 640, "image": {"backbone": "convnext_base"}, "text": BASE_TEXT},
    "base_linear": {
        "embed_dim": 640,
        "image": {"backbone": "convnext_base", "head": "attention_pool_linear"},
        "text": BASE_TEXT,
    },
    "rn50": {"embed_dim": 1024, "image": {"backbone": "RN50"}},
    "resnet18": {"embed_dim": 64, "image": {"backbone": "resnet18"}},
}


@pytest.fixture(scope="module")
def models():
    with torch.device("meta"):
        return {name: build_model(schema.Model(**config)) for name, config in CONFIGS.items()}


def everything(model):
    return {name for name, _ in model.named_parameters()}


def trainable(model, *locked):
    return everything(model) - {name for tower in locked for name in locked_names(model, tower)}


@pytest.mark.parametrize(
    ("name", "visual", "visual_locked", "text", "text_locked"),
    [
        ("tiny_gpt2", 30_070_400, 2_203_904, 125_259_008, 819_200),
        ("tiny_cliptext", 30_070_400, 2_203_904, 63_428_096, 0),
        ("base", 91_422_464, 3_856_000, 91_163_520, 0),
        ("base_linear", 91_832_064, 4_265_600, 91_163_520, 0),
    ],
)
def test_parameters_of_each_tower(models, name, visual, visual_locked, text, text_locked):
    model = models[name]
    assert parameter_counts(model, everything(model)) == {"visual": visual, "text": text, "total": visual + text + 1}
    both = parameter_counts(model, trainable(model, "image", "text"))
    assert both == {"visual": visual_locked, "text": text_locked, "total": visual_locked + text_locked + 1}


@pytest.mark.parametrize(
    ("name", "locked", "total"),
    [
        ("tiny_gpt2", (), 155_329_409),
        ("tiny_gpt2", ("image", "text"), 3_023_105),
        ("tiny_cliptext", ("image",), 65_632_001),
        ("base", ("image", "text"), 3_856_001),
        ("base_linear", ("image", "text"), 4_265_601),
    ],
)
def test_total_trainable_at_start(models, name, locked, total):
    assert parameter_counts(models[name], trainable(models[name], *locked))["total"] == total


@pytest.mark.parametrize(
    ("name", "group_count", "counts"),
    [
        ("tiny_gpt2", 20, (2_203_904, 2_205_440, 6_973_952, 11_742_464, 17_692_160, 18_896_768, 20_101_376)),
        ("tiny_cliptext", 20, (2_203_904, 2_205_440, 6_973_952, 11_742_464, 17_692_160, 18_896_768, 20_101_376)),
        ("base", 38, (3_856_000, 3_858_048, 12_306_048, 20_754_048, 31_301_248, 33_428_096, 35_554_944)),
    ],
)
def test_visual_parameters_after_unlocking(models, name, group_count, counts):
    model = models[name]
    assert len(layer_groups(model, "image")) == group_count
    for n, expected in enumerate(counts):
        opened = unlocked_names(model, "image", groups=n) if n else []
        assert parameter_counts(model, trainable(model, "image") | set(opened))["visual"] == expected


@pytest.mark.parametrize("n", range(1, 13))
def test_gpt2_unlocks_blocks_with_the_final_norm(models, n):
    model = models["tiny_gpt2"]
    opened = unlocked_names(model, "text", layers=n)
    assert parameter_counts(model, opened) == {
        "visual": 0,
        "text": n * 7_087_872 + 1_536,
        "total": n * 7_087_872 + 1_536,
    }
    assert not any("wte" in name or "wpe" in name or ".proj." in name for name in opened)


def test_gpt2_embeddings_come_last(models):
    model = models["tiny_gpt2"]
    extra = set(unlocked_names(model, "text", layers=13)) - set(unlocked_names(model, "text", layers=12))
    assert extra == {"text.transformer.wte.weight", "text.transformer.wpe.weight"}


def test_clip_text_unlocks_blocks_with_norm_and_projection(models):
    model = models["tiny_cliptext"]
    opened = set(unlocked_names(model, "text", layers=2))
    assert {"text.ln_final.weight", "text.ln_final.bias", "text.text_projection"} < opened
    assert {name.split(".")[3] for name in opened if "resblocks" in name} == {"10", "11"}
    extra = set(unlocked_names(model, "text", layers=13)) - set(unlocked_names(model, "text", layers=12))
    assert extra == {"text.token_embedding.weight", "text.positional_embedding"}
    assert parameter_counts(model, unlocked_names(model, "text", all=True))["text"] == 63_428_096


def test_resnet_groups_are_its_stem_and_stages(models):
    model = models["rn50"]
    groups = layer_groups(model, "image")
    assert len(groups) == len(model.visual.units()) == 5
    assert [group[0] for group in groups] == [
        "visual.conv1.weight",
        *(f"visual.layer{stage}.0.conv1.weight" for stage in (1, 2, 3, 4)),
    ]
    left = {name for name in everything(model) if name.startswith("visual.")} - set(locked_names(model, "image"))
    assert left and all(name.startswith("visual.attnpool.") for name in left)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tower", ["image", "text"])
def test_groups_are_disjoint_and_open_from_the_end(models, name, tower):
    model = models[name]
    groups = layer_groups(model, tower)
    names = list(itertools.chain(*groups))
    assert len(names) == len(set(names)) and set(names) < everything(model)
    assert locked_names(model, tower) == names == unlocked_names(model, tower, all=True)
    assert unlocked_names(model, tower, groups=len(groups)) == names
    assert unlocked_names(model, tower, groups=1) == unlocked_names(model, tower, layers=1) == groups[-1]


@pytest.mark.parametrize("name", ["tiny_cliptext", "base", "rn50"])
def test_groups_are_the_units_of_the_cut(models, name):
    """Cut b of forward_prefix runs exactly the parameters of the first b groups."""
    model = models[name]
    names = {id(p): name for name, p in model.named_parameters()}
    units = [{names[id(p)] for module in unit for p in module.parameters()} for unit in model.visual.units()]
    assert units == [set(group) for group in layer_groups(model, "image")]


@pytest.mark.parametrize("kind", ["clip", "gpt2"])
def test_what_enters_a_text_group_is_the_work_of_the_groups_below(kind):
    image = {"backbone": "test_convnext", "image_size": 32}
    text = {"kind": kind, "width": 8, "heads": 2, "layers": 3, "vocab_size": 20, "context_length": 8}
    model = build_model(schema.Model(embed_dim=4, image=image, text=text))
    groups = layer_groups(model, "text")
    for cut in range(1, len(groups) + 1):
        model.zero_grad()
        _, (hidden, _) = model(texts=torch.tensor([[3, 4, 19, 0], [5, 19, 0, 0]]), stop=Cut(0, cut))
        hidden.sum().backward()
        worked = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert worked == set(itertools.chain(*groups[:cut]))


@given(first=st.integers(1, 20), second=st.integers(1, 20))
@settings(max_examples=20, deadline=None)
def test_a_larger_amount_opens_a_superset(models, first, second):
    small, large = sorted((first, second))
    model = models["tiny_cliptext"]
    assert set(unlocked_names(model, "image", groups=small)) <= set(unlocked_names(model, "image", groups=large))


def test_too_many_groups_are_refused(models):
    with pytest.raises(schema.UserError, match=r"groups: 21 of the image tower cannot be unlocked, it has 20$"):
        unlocked_names(models["tiny_gpt2"], "image", groups=21)
    with pytest.raises(schema.UserError, match=r"layers: 14 of the text tower .* has 13 \(12 blocks, then the emb"):
        unlocked_names(models["tiny_gpt2"], "text", layers=14)
    with pytest.raises(ValueError, match="give groups"):
        unlocked_names(models["tiny_gpt2"], "image")
    with pytest.raises(ValueError, match="image or text"):
        layer_groups(models["tiny_gpt2"], "visual")
