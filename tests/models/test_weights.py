"""Loading weights of the right names and shapes, written here, and each way in which a file may not fit."""

import json

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2Model

from convclip import schema
from convclip.engine.task import ImageTextTask
from convclip.models import build_model
from convclip.models.reference_head import load_reference_head
from convclip.models.weights import load_exact, load_pretrained, read_weights

TEXT = {"width": 32, "heads": 4, "layers": 2, "vocab_size": 100, "context_length": 20}
VISION = {"timm_model_name": "convnextv2_atto", "timm_pool": "", "timm_proj": "linear", "image_size": 64}


def config(text="clip", head="attention_pool", image_from=None, text_from=None, both_from=None, **image):
    return schema.Model(
        embed_dim=32,
        image={"backbone": "convnextv2_atto", "image_size": 64, "head": head, "pretrained": image_from, **image},
        text={"kind": text, "pretrained": text_from, **TEXT},
        pretrained=both_from,
    )


def build(**options):
    torch.manual_seed(0)
    return build_model(config(**options)).eval()


def load(**options):
    model = build(**options)
    return model, load_pretrained(model, config(**options))


def open_clip_model(custom: bool = False, **vision):
    torch.manual_seed(5)
    kind = open_clip.model.CustomTextCLIP if custom else open_clip.model.CLIP
    return kind(32, {**VISION, **vision}, TEXT, init_logit_scale=3.0).eval()


def saved(folder, tensors, name="weights.safetensors"):
    path = folder / name
    if path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    else:
        torch.save(tensors, path)
    return str(path)


def batch():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 99, (2, 20), generator=generator)
    tokens[:, 11] = 99
    return torch.randn(2, 3, 64, 64, generator=generator), tokens


def test_nothing_named_nothing_loaded():
    model, report = load()
    assert report.loaded == 0
    assert report.new == list(model.state_dict())


@pytest.mark.parametrize("custom", [False, True], ids=["text at top level", "under text."])
@pytest.mark.parametrize("name", ["w.safetensors", "w.bin"])
def test_open_clip_checkpoint_with_the_same_head_loads_whole(tmp_path, custom, name):
    theirs = open_clip_model(custom)
    model, report = load(head="average_linear", both_from=saved(tmp_path, theirs.state_dict(), name))
    assert report.new == [] and report.loaded == len(theirs.state_dict())
    images, texts = batch()
    torch.testing.assert_close(model.encode_image(images), theirs.encode_image(images))
    torch.testing.assert_close(model.encode_text(texts), theirs.encode_text(texts), atol=1e-6, rtol=1e-5)
    assert model.logit_scale.tolist() == [3.0]


@pytest.mark.parametrize("head", ["attention_pool", "attention_pool_linear"])
def test_another_head_stays_new_and_is_reported(tmp_path, head):
    theirs = open_clip_model()
    model, report = load(head=head, both_from=saved(tmp_path, theirs.state_dict()))
    assert report.new == [name for name in model.state_dict() if name.startswith("visual.head.")]
    assert any(name.endswith("head.pool.pos_embed") for name in report.new)
    assert report.loaded == len(theirs.state_dict()) - 1
    torch.testing.assert_close(model.visual.trunk.head.norm.weight, theirs.visual.trunk.head.norm.weight)
    images, _ = batch()
    torch.testing.assert_close(
        model.visual.forward_prefix(images, model.visual.map_cut), theirs.visual.trunk.forward_features(images)
    )


def test_training_checkpoint_is_unwrapped(tmp_path):
    theirs = open_clip_model()
    content = {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in theirs.state_dict().items()}}
    assert load(head="average_linear", both_from=saved(tmp_path, content, "epoch_3.pt"))[1].new == []


def test_timm_trunk_without_its_classifier(tmp_path):
    torch.manual_seed(5)
    theirs = timm.create_model("convnextv2_atto", num_classes=10).eval()
    model, report = load(image_from=saved(tmp_path, theirs.state_dict()))
    assert report.loaded == len(theirs.state_dict()) - 2
    assert not any(name.startswith("visual.trunk.") for name in report.new)
    assert any(name.startswith("visual.head.") for name in report.new) and "logit_scale" in report.new
    images, _ = batch()
    torch.testing.assert_close(
        model.visual.forward_prefix(images, model.visual.map_cut), theirs.forward_features(images)
    )


def test_timm_trunk_with_batch_norm_statistics(tmp_path):
    torch.manual_seed(5)
    theirs = timm.create_model("resnet18", num_classes=10)
    theirs.layer1[0].bn1.running_mean.fill_(0.25)
    model, _ = load(backbone="resnet18", image_from=saved(tmp_path, theirs.state_dict()))
    assert model.visual.trunk.layer1[0].bn1.running_mean.eq(0.25).all()


def test_image_part_of_an_open_clip_checkpoint(tmp_path):
    theirs = open_clip_model(custom=True)
    model, report = load(head="average_linear", image_from=saved(tmp_path, theirs.state_dict()))
    assert not any(name.startswith("visual.") for name in report.new)
    images, _ = batch()
    torch.testing.assert_close(model.encode_image(images), theirs.encode_image(images))


def gpt2_file(folder, prefix, with_buffers=True):
    torch.manual_seed(5)
    theirs = GPT2Model(GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=100)).eval()
    tensors = {prefix + key: value for key, value in theirs.state_dict().items()}
    if with_buffers:
        for block in range(2):
            tensors[f"{prefix}h.{block}.attn.bias"] = torch.ones(1, 1, 1024, 1024).tril()
            tensors[f"{prefix}h.{block}.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["lm_head.weight"] = theirs.wte.weight.clone()
    return theirs, saved(folder, tensors)


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("with_buffers", [False, True])
def test_gpt2_file(tmp_path, prefix, with_buffers):
    theirs, path = gpt2_file(tmp_path, prefix, with_buffers)
    model, report = load(text="gpt2", text_from=path)
    assert report.loaded == len(theirs.state_dict())
    assert [name for name in report.new if name.startswith("text.")] == ["text.proj.0.weight", "text.proj.2.weight"]
    torch.testing.assert_close(model.text.transformer.state_dict(), theirs.state_dict())


def test_text_part_of_a_checkpoint(tmp_path):
    clip = open_clip_model()
    model, report = load(text_from=saved(tmp_path, clip.state_dict(), "clip.safetensors"))
    assert not any(name.startswith("text.") for name in report.new)
    torch.testing.assert_close(model.encode_text(batch()[1]), clip.encode_text(batch()[1]), atol=1e-6, rtol=1e-5)
    ours = build(text="gpt2")
    torch.nn.init.ones_(ours.text.proj[0].weight)
    model, report = load(text="gpt2", text_from=saved(tmp_path, ours.state_dict(), "ours.safetensors"))
    assert not any(name.startswith("text.") for name in report.new)
    assert model.text.proj[0].weight.eq(1).all()


def test_a_towers_own_file_wins_over_the_checkpoint_of_both(tmp_path):
    both = saved(tmp_path, open_clip_model().state_dict())
    trunk = timm.create_model("convnextv2_atto", num_classes=0)
    torch.nn.init.constant_(trunk.stem[0].bias, 0.5)
    own = saved(tmp_path, trunk.state_dict(), "trunk.safetensors")
    model, report = load(head="average_linear", both_from=both, image_from=own)
    assert model.visual.trunk.stem[0].bias.eq(0.5).all() and report.new == []


def test_our_own_weights_come_back_exactly(tmp_path):
    ours = build(text="gpt2")
    path = saved(tmp_path, ours.state_dict())
    torch.manual_seed(9)
    other = build_model(config(text="gpt2"))
    assert load_exact(other, path) == len(ours.state_dict())
    torch.testing.assert_close(other.state_dict(), ours.state_dict(), atol=0, rtol=0)
    del ours.visual.head
    with pytest.raises(schema.UserError, match=r"lacks visual\.head\.pool"):
        load_exact(other, saved(tmp_path, ours.state_dict(), "headless.safetensors"))


def test_a_folder_stands_for_the_weights_in_it(tmp_path):
    saved(tmp_path, open_clip_model().state_dict(), "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {}}))
    assert load(head="average_linear", both_from=str(tmp_path))[1].new == []
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"quick_gelu": True}}))
    with pytest.raises(schema.UserError, match="QuickGELU"):
        load(head="average_linear", both_from=str(tmp_path))


def without(tensors, *names):
    return {key: value for key, value in tensors.items() if key not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: without(t, "ln_final.bias"), "lacks text.ln_final.bias: it is of another"),
        (lambda t: {**t, "visual.trunk.extra": torch.ones(2)}, "holds visual.trunk.extra that the model has no place"),
        (lambda t: {**t, "logit_bias": torch.ones(1)}, "holds logit_bias"),
        (
            lambda t: {**t, "text_projection": torch.ones(32, 48)},
            r"text.text_projection has shape \(32, 48\), the model's is \(32, 32\)",
        ),
        (lambda t: {key: value for key, value in t.items() if "visual" in key}, r"lacks .*, .*, .*, .* and \d+ more"),
        (
            lambda t: without(t, "visual.head.proj.weight", "visual.trunk.head.norm.bias"),
            "lacks visual.trunk.head.norm",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, change, message):
    path = saved(tmp_path, change(open_clip_model().state_dict()))
    with pytest.raises(schema.UserError, match=message) as caught:
        load(head="average_linear", both_from=path)
    assert str(caught.value).startswith(path) and "\n" not in str(caught.value)


def test_a_head_is_new_as_a_whole_or_not_at_all(tmp_path):
    path = saved(
        tmp_path,
        without(open_clip_model(timm_pool="abs_attn", timm_proj="").state_dict(), "visual.head.pool.proj.bias"),
    )
    with pytest.raises(schema.UserError, match=r"lacks visual\.head\.pool\.proj\.bias"):
        load(both_from=path)


def test_clip_text_for_a_gpt2_tower_is_refused(tmp_path):
    path = saved(tmp_path, open_clip_model().state_dict())
    with pytest.raises(schema.UserError, match=r"holds text\..* lacks text\.transformer\.wte\.weight"):
        load(text="gpt2", head="average_linear", both_from=path)
    with pytest.raises(schema.UserError, match=r"lacks text\.transformer\.wte\.weight"):
        load(text="gpt2", text_from=path)


@pytest.mark.parametrize("name", ["w.safetensors", "w.bin"])
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_a_cut_file_is_one_clear_line(tmp_path, name, share):
    path = tmp_path / name
    saved(tmp_path, open_clip_model().state_dict(), name)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(schema.UserError, match="damaged, cut short or no weight file") as caught:
        load(both_from=str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_changed_bit_in_a_torch_file_is_seen(tmp_path):
    """torch.load does not compare the checksums that torch.save writes."""
    path = tmp_path / "w.pt"
    torch.save({"a": torch.ones(1000)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(torch.ones(8).numpy().tobytes()) + 1] ^= 1
    path.write_bytes(content)
    assert not torch.equal(torch.load(path, weights_only=True)["a"], torch.ones(1000))
    with pytest.raises(schema.UserError, match=r"w\.pt: damaged.*CRC"):
        read_weights(str(path))
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(1000)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_weights(str(path))["a"], torch.ones(1000))


class Unsafe:
    def __reduce__(self):
        return (print, ("loaded code ran",))


def test_a_file_with_code_is_refused_and_not_run(tmp_path, capsys):
    path = saved(tmp_path, {"state_dict": Unsafe()}, "w.bin")
    with pytest.raises(schema.UserError, match="holds more than tensors"):
        load(both_from=path)
    assert capsys.readouterr().out == ""
    with pytest.raises(schema.UserError, match="no state_dict"):
        load(both_from=saved(tmp_path, {"epoch": 3}, "w.bin"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"both_from": "/nowhere/w.bin"}, "/nowhere/w.bin: no such weight file"),
        ({"both_from": "hf-hub:nobody/nothing"}, "hf-hub:nobody/nothing: not downloaded before and no network"),
        ({"both_from": "hf-hub:/:/"}, "cannot be downloaded"),
        ({"image_from": "timm"}, "timm's weights of convnextv2_atto cannot be had"),
        ({"image_from": "timm", "backbone": "RN50"}, "timm has no RN50"),
    ],
)
def test_weights_that_cannot_be_had(options, message):
    with pytest.raises(schema.UserError, match=message) as caught:
        load(**options)
    assert "\n" not in str(caught.value)


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(schema.UserError, match="the folder holds none of open_clip_model"):
        load(both_from=str(tmp_path))


def test_reference_head_is_the_pretrained_models_own(tmp_path):
    theirs = open_clip_model()
    torch.nn.init.normal_(theirs.visual.trunk.head.norm.weight)
    path = saved(tmp_path, theirs.state_dict())
    model, _ = load(both_from=path)
    reference = load_reference_head(config(both_from=path))
    images, _ = batch()
    torch.testing.assert_close(
        reference(model.visual.forward_prefix(images, model.visual.map_cut)), theirs.encode_image(images)
    )
    assert not any(p.requires_grad for p in reference.parameters())


def test_reference_head_of_a_trunk_without_a_norm_behind_its_map(tmp_path):
    """An EfficientNet ends with its last map: its released head is average pool and linear alone."""
    image = {"backbone": "test_efficientnet", "image_size": 32, "head": "average_linear"}
    released = build_model(schema.Model(embed_dim=16, image=image, text={"layers": 1})).eval()
    path = saved(tmp_path, released.state_dict())
    model = {"embed_dim": 16, "image": {**image, "head": "attention_pool"}, "text": {"layers": 1}, "pretrained": path}
    recipe = schema.Recipe(name="align", epochs=1, model=model, head_alignment={"kind": "cosine"})
    student, _ = ImageTextTask(recipe).initial_model()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    outputs = student.eval()(images, torch.ones(2, 77, dtype=torch.int64))
    torch.testing.assert_close(outputs.extras["reference"], released.encode_image(images, normalize=True))
    assert not [name for name, _ in student.reference.named_parameters() if name != "proj.weight"]


def test_reference_head_needs_such_a_checkpoint(tmp_path):
    with pytest.raises(schema.UserError, match="head_alignment needs"):
        load_reference_head(config())
    pooled = saved(tmp_path, open_clip_model(timm_pool="abs_attn", timm_proj="").state_dict())
    with pytest.raises(schema.UserError, match="nothing to align to"):
        load_reference_head(config(both_from=pooled))
    wide = saved(tmp_path, {**open_clip_model().state_dict(), "visual.head.proj.weight": torch.ones(48, 320)}, "w.bin")
    with pytest.raises(schema.UserError, match="embeds into 48"):
        load_reference_head(config(both_from=wide))
