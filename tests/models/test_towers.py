"""The contract of a tower: what every kind of it must hold, and that a new one needs its own class and one entry."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig, BertModel

from convclip import schema
from convclip.models import build_model
from convclip.models.dual_tower import Cut
from convclip.models.export import export_open_clip
from convclip.models.layer_groups import frozen_cut, layer_groups, locked_names, unlocked_names
from convclip.models.tower import ImageTower, TextTower, names_under
from convclip.models.towers import TEXT_TOWERS, build_image_tower, build_text_tower
from convclip.models.weights import load_pretrained

CLS, SEP, PAD = 1, 2, 0
SIZES = {"width": 16, "heads": 2, "layers": 3, "vocab_size": 20, "context_length": 12}


class BertText(TextTower):
    """What somebody writes who adds a tower: bidirectional, padding masked, pooled at the first token."""

    may_be_new = ("proj.",)

    def __init__(self, config, embed_dim):
        super().__init__()
        self.embed_dim = embed_dim
        sizes = BertConfig(
            hidden_size=config.width,
            num_attention_heads=config.heads,
            num_hidden_layers=config.layers,
            intermediate_size=4 * config.width,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.context_length,
            attn_implementation="sdpa",
        )
        self.transformer = BertModel(sizes, add_pooling_layer=False)
        self.proj = nn.Linear(config.width, embed_dim, bias=False)

    @classmethod
    def build(cls, config, embed_dim):
        return cls(config, embed_dim)

    def layers(self):
        return [(self.transformer.embeddings,), *((block,) for block in self.blocks())]

    def embed(self, tokens):
        return self.transformer.embeddings(tokens)

    def blocks(self):
        return self.transformer.encoder.layer

    def run_block(self, block, hidden, ends):
        is_word = (torch.arange(hidden.shape[1], device=ends.device) <= ends[:, None]).to(hidden.device)
        result = block(hidden, is_word[:, None, None].expand(-1, 1, hidden.shape[1], -1))
        return result if isinstance(result, torch.Tensor) else result[0]

    def ends(self, tokens):
        return (tokens != PAD).sum(dim=-1) - 1

    def pool(self, hidden, ends):
        return hidden[:, 0]

    def embed_head(self):
        return self.proj

    def released_names(self, names):
        part = names_under("text.", names)
        return part or {name: f"transformer.{name.removeprefix('bert.')}" for name in names if "cls." not in name}


@pytest.fixture(autouse=True)
def with_bert(monkeypatch):
    """The entry in the table. The schema's kind is a Literal, so the recipe's is set past its check."""
    monkeypatch.setitem(TEXT_TOWERS, "bert", BertText)


def text_config(kind, **options):
    return schema.TextTowerConfig(**SIZES, **options).model_copy(update={"kind": kind})


def bert_model_config(**options):
    image = schema.ImageTowerConfig(backbone="test_convnext", image_size=32)
    return schema.Model(embed_dim=8, image=image).model_copy(update={"text": text_config("bert", **options)})


def captions():
    """Token ids [3, 12]: first token, words, end token, padding."""
    tokens = torch.full((3, 12), PAD)
    for row, words in zip(tokens, ([7, 19, 5], [9], [4, 3, 8, 6, 11, 12, 13, 14, 15, 16]), strict=True):
        row[: len(words) + 2] = torch.tensor([CLS, *words, SEP])
    return tokens


IMAGES = ("convnextv2_atto", "convnext_atto_ols", "resnet18", "mobilenetv3_small_050", "RN50")


def build(kind):
    """(tower, an input, what the names of its head begin with)."""
    torch.manual_seed(0)
    if kind in IMAGES:
        head = "average_linear" if kind.startswith("mobilenet") else "attention_pool"
        config = schema.ImageTowerConfig(backbone=kind, image_size=64, head=head)
        return build_image_tower(config, 64), torch.randn(2, 3, 64, 64), "attnpool." if kind == "RN50" else "head."
    return build_text_tower(text_config(kind), 8), captions(), "none" if kind == "clip" else "proj."


@pytest.mark.parametrize("kind", [*IMAGES, "clip", "gpt2", "bert"])
def test_layer_groups_hold_every_lockable_parameter_once_in_the_order_of_work(kind):
    tower, inputs, head = build(kind)
    groups = tower.layer_groups()
    names = [name for group in groups for name in group]
    assert sorted(names) == sorted(name for name, _ in tower.named_parameters() if not name.startswith(head))
    assert all(groups) and tower.cuts[0] == 0 and tower.cuts[-1] == len(groups)
    number_of = {name: number for number, group in enumerate(groups) for name in group}
    seen = []

    def record(name):
        own = [f"{name}.{parameter}" for parameter, _ in tower.get_submodule(name).named_parameters(recurse=False)]
        seen.extend(number_of.get(parameter, len(groups)) for parameter in own)

    for name, module in tower.named_modules():
        if name:
            module.register_forward_pre_hook(lambda module, inputs, name=name: record(name))
    tower.eval()(inputs)
    assert seen == sorted(seen) and set(seen) >= set(range(len(groups)))


@pytest.mark.parametrize("kind", [*IMAGES, "clip", "gpt2", "bert"])
def test_cut_anywhere_it_gives_the_same(kind):
    tower, inputs, _ = build(kind)
    tower.eval()
    whole = tower(inputs)
    for cut in tower.cuts:
        if isinstance(tower, ImageTower):
            part = tower.forward_from(tower.forward_prefix(inputs, cut), cut)
        else:
            part = tower(tower(inputs, 0, cut), cut)
        torch.testing.assert_close(part, whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("forgotten", [True, False])
def test_a_parameter_in_no_group_or_in_two_is_named(forgotten):
    class Careless(BertText):
        def layers(self):
            layers = super().layers()
            return layers[1:] if forgotten else [*layers, (self.transformer.embeddings,)]

    times = 0 if forgotten else 2
    with pytest.raises(ValueError, match=rf"word_embeddings.weight is in {times} layer groups of Careless, not in one"):
        Careless(text_config("bert"), 8).layer_groups()


def test_the_table_has_the_schemas_kinds(monkeypatch):
    monkeypatch.undo()
    assert set(schema.TextTowerConfig.model_fields["kind"].annotation.__args__) == set(TEXT_TOWERS)


def test_a_new_text_tower_is_its_class():
    torch.manual_seed(0)
    config = bert_model_config()
    model = build_model(config).eval()
    tokens = captions()
    mask = torch.tensor([[1] * 5 + [0] * 7, [1] * 3 + [0] * 9, [1] * 12])
    hidden = model.text.transformer(tokens, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(model.encode_text(tokens), model.text.proj(hidden[:, 0]), atol=1e-6, rtol=1e-5)
    assert len(layer_groups(model, "text")) == 4
    assert {name.split(".")[4] for name in unlocked_names(model, "text", layers=2)} == {"1", "2"}
    trains = {name for name, _ in model.named_parameters()} - set(locked_names(model, "text"))
    assert frozen_cut(model, trains) == Cut(0, 4) and "text.proj.weight" in trains
    assert frozen_cut(model, {*trains, *unlocked_names(model, "text", layers=2)}) == Cut(0, 2)
    model.locks_heads = True
    assert layer_groups(model, "text")[-1][-1] == "text.proj.weight"


def test_a_new_text_tower_is_measured_by_the_plan():
    """Ends on the CPU, hidden states on the meta device; made-up captions fill the context."""
    with torch.device("meta"):
        tower = build_text_tower(text_config("bert"), 8)
    captions = torch.ones(2, 12, dtype=torch.int64)
    captions[:, -1] = 19
    hidden, ends = tower(captions, 0, 2)
    assert hidden.is_meta and hidden.shape == (2, 12, 16) and ends.tolist() == [11, 11]
    assert tower(captions).shape == (2, 8)


def test_a_new_text_tower_recomputes_its_blocks():
    results = []
    for enable in (False, True):
        torch.manual_seed(0)
        tower = build_text_tower(text_config("bert"), 8).train()
        tower.set_grad_checkpointing(enable)
        ran = []
        tower.blocks()[0].register_forward_pre_hook(lambda block, inputs, ran=ran: ran.append(1))
        torch.manual_seed(1)
        tower(captions()).square().sum().backward()
        results.append([parameter.grad for parameter in tower.parameters()])
        assert len(ran) == (2 if enable else 1)
    torch.testing.assert_close(results[1], results[0])


def test_a_new_text_tower_takes_its_release_and_exports_as_safetensors(tmp_path):
    released = BertModel(build_text_tower(text_config("bert"), 8).transformer.config, add_pooling_layer=False)
    tensors = {f"bert.{name}": value for name, value in released.state_dict().items()}
    save_file({**tensors, "cls.predictions.bias": torch.ones(20)}, tmp_path / "bert.safetensors")
    config = bert_model_config(pretrained=str(tmp_path / "bert.safetensors"))
    model = build_model(config)
    report = load_pretrained(model, config)
    assert [name for name in report.new if name.startswith("text.")] == ["text.proj.weight"]
    torch.testing.assert_close(model.text.transformer.state_dict(), released.state_dict())
    done = export_open_clip(model, bert_model_config(), tmp_path / "export")
    assert not done.for_open_clip and "test_convnext with bert text" in done.note
