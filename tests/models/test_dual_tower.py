"""The dual tower against open_clip's CustomTextCLIP, and how locked parts behave in training."""

import math

import pytest
import torch
from open_clip.model import CustomTextCLIP
from torch import nn

from convclip import schema
from convclip.models.dual_tower import INPUT, Cut, build_model

TEXT = {"width": 32, "heads": 4, "layers": 2, "vocab_size": 100, "context_length": 20}


def model_config(text: str = "clip", **image) -> schema.Model:
    image = {"backbone": "convnextv2_atto", "image_size": 64, **image}
    return schema.Model(embed_dim=32, image=image, text={"kind": text, **TEXT})


def build(text: str = "clip", **image):
    torch.manual_seed(0)
    return build_model(model_config(text, **image))


def batch():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 99, (3, 20), generator=generator)
    tokens[:, 9:] = 0
    tokens[:, 8] = 99
    return torch.randn(3, 3, 64, 64, generator=generator), tokens


def test_features_and_names_are_open_clips():
    ours = build().eval()
    vision = {"timm_model_name": "convnextv2_atto", "timm_pool": "abs_attn", "timm_proj": "", "image_size": 64}
    theirs = CustomTextCLIP(32, vision, TEXT, nonscalar_logit_scale=True).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(tuple(ours(*batch())[:3]), theirs(*batch()), atol=1e-6, rtol=1e-5)


def test_forward_gives_none_for_what_it_was_not_given():
    model = build().eval()
    images, texts = batch()
    of_images, of_texts = model(images=images), model(texts=texts)
    assert of_images.text is None and of_texts.image is None
    assert of_images.logit_bias is None and not of_images.extras
    assert of_images.logit_scale.shape == (1,)
    assert math.isclose(of_images.logit_scale.item(), 1 / 0.07, rel_tol=1e-6)
    torch.testing.assert_close(of_images.image, model.encode_image(images, normalize=True))
    torch.testing.assert_close(of_texts.text, nn.functional.normalize(model.encode_text(texts)))


def test_features_leave_half_precision_models_in_float32():
    model = build().bfloat16().eval()
    for output in model(*batch())[:3]:
        assert output.dtype == torch.float32
    torch.testing.assert_close(model(*batch()).image.norm(dim=1), torch.ones(3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("cut", [INPUT, Cut(9), Cut(0, 2), Cut(3, 1)])
def test_both_towers_run_in_two_parts(cut):
    model = build().eval()
    in_two, whole = model(*model(*batch(), stop=cut), start=cut), model(*batch())
    torch.testing.assert_close(in_two[:3], whole[:3])


@pytest.mark.parametrize("text", ["clip", "gpt2"])
def test_builds_on_meta_with_no_parameter_without_dimension(text):
    with torch.device("meta"):
        model = build_model(model_config(text))
    assert all(p.is_meta and p.ndim > 0 for p in model.parameters())


def test_a_locked_trunk_rests_while_its_head_trains():
    model = build(drop_path=0.5)
    model.visual.trunk.requires_grad_(False)
    model.text.requires_grad_(False)
    model.train()
    assert model.training and model.visual.head.training
    assert not any(module.training for module in (*model.visual.trunk.modules(), *model.text.modules()))
    images, _ = batch()
    maps = [model.visual.forward_prefix(images, model.visual.map_cut) for _ in range(2)]
    torch.testing.assert_close(maps[0], maps[1], atol=0, rtol=0)


def test_unlocked_blocks_train_and_the_others_rest():
    model = build(drop_path=0.5)
    model.visual.trunk.requires_grad_(False)
    last_stage = model.visual.trunk.stages[3]
    last_stage.blocks.requires_grad_(True)
    model.train()
    assert last_stage.blocks[0].drop_path.training
    assert not last_stage.downsample.training
    assert not any(module.training for stage in model.visual.trunk.stages[:3] for module in stage.modules())
    model.visual.trunk.requires_grad_(True)
    assert all(module.training for module in model.train().modules())
    assert not any(module.training for module in model.eval().modules())


def test_locked_batch_norms_keep_their_statistics():
    model = build(backbone="resnet18")
    model.visual.trunk.requires_grad_(False)
    before = {name: value.clone() for name, value in model.visual.trunk.named_buffers()}
    model.train().visual(batch()[0])
    for name, value in model.visual.trunk.named_buffers():
        assert torch.equal(value, before[name]), name


def test_locked_gpt2_has_no_dropout_but_its_projection_trains():
    model = build("gpt2")
    model.text.transformer.requires_grad_(False)
    model.train()
    assert model.text.proj.training
    _, texts = batch()
    torch.testing.assert_close(model.text(texts), model.text(texts), atol=0, rtol=0)
    model.text.transformer.h[-1].requires_grad_(True)
    model.train()
    assert model.text.transformer.h[-1].attn.attn_dropout.training
    assert not model.text.transformer.h[0].attn.attn_dropout.training
    assert not model.text.transformer.drop.training


def test_checkpointing_switches_both_towers():
    model = build("gpt2")
    model.set_grad_checkpointing(True)
    assert model.visual.checkpointing and model.text.transformer.h[0].gradient_checkpointing
