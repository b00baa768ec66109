"""Image towers against open_clip's own, and their cuts, checkpointing and errors."""

import pytest
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel

from convclip import schema
from convclip.models.openclip_resnet import OpenClipResNet
from convclip.models.towers import build_image_tower

# head -> open_clip's (pool, proj)
OPEN_CLIP_HEADS = {
    "attention_pool": ("abs_attn", ""),
    "attention_pool_linear": ("abs_attn", "linear"),
    "average_linear": ("", "linear"),
}


def tower(backbone: str = "convnextv2_atto", embed_dim: int = 32, **options):
    torch.manual_seed(0)
    return build_image_tower(schema.ImageTowerConfig(backbone=backbone, image_size=64, **options), embed_dim)


def small_resnet() -> OpenClipResNet:
    torch.manual_seed(0)
    return OpenClipResNet(layers=[1, 2, 1, 1], output_dim=32, heads=4, image_size=64, width=8)


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("head", OPEN_CLIP_HEADS)
@pytest.mark.parametrize("backbone", ["convnextv2_atto", "convnext_atto", "resnet18"])
def test_names_and_embeddings_are_open_clips(backbone, head):
    ours = tower(backbone, head=head).eval()
    pool, proj = OPEN_CLIP_HEADS[head]
    theirs = TimmModel(backbone, 32, image_size=64, pool=pool, proj=proj).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    torch.testing.assert_close(ours(images()), theirs(images()), atol=1e-6, rtol=1e-5)


def test_resnet_names_and_embeddings_are_open_clips():
    ours = tower("RN50", embed_dim=64).eval()
    theirs = ModifiedResNet([3, 4, 6, 3], output_dim=64, heads=32, image_size=64, width=64).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    torch.testing.assert_close(ours(images()), theirs(images()), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "width"), [("RN50", 64), ("RN101", 64), ("RN50x4", 80)])
def test_resnet_sizes_come_from_open_clip(name, width):
    with torch.device("meta"):
        model = build_image_tower(schema.ImageTowerConfig(backbone=name, image_size=288), 512)
    assert model.conv3.out_channels == width
    assert model.attnpool.num_heads == width * 32 // 64
    assert model.attnpool.positional_embedding.shape[0] == 82


@pytest.mark.parametrize("head", OPEN_CLIP_HEADS)
def test_every_cut_of_a_convnext_equals_the_whole(head):
    model = tower(head=head).eval()
    whole = model(images())
    assert len(model.layer_groups()) == 14 and model.cuts == list(range(15))
    for cut in model.cuts:
        torch.testing.assert_close(model.forward_from(model.forward_prefix(images(), cut), cut), whole)
    torch.testing.assert_close(model.head(model.trunk(images())), whole)


def test_every_cut_of_a_resnet_equals_the_whole():
    model = small_resnet().eval()
    whole = ModifiedResNet.forward(model, images())
    assert model.cuts == list(range(6))
    for cut in model.cuts:
        part = model.forward_from(model.forward_prefix(images(), cut), cut)
        torch.testing.assert_close(part, whole, atol=1e-6, rtol=1e-5)


def test_a_backbone_that_is_no_chain_is_cut_at_its_ends_only():
    model = tower("ghostnet_050").eval()
    assert model.cuts == [0, len(model.layer_groups())] == [0, 18]
    whole = model(images())
    torch.testing.assert_close(model.forward_from(model.forward_prefix(images(), 18), 18), whole)
    with pytest.raises(ValueError, match=r"cannot be cut at layer group 3; it can at \[0, 18\]"):
        model.forward_prefix(images(), 3)


@pytest.mark.parametrize("backbone", ["convnextv2_atto", "resnet18", "RN50"])
def test_feature_map_then_head_is_the_whole(backbone):
    model = tower(backbone, embed_dim=64).eval()
    features = model.forward_prefix(images(), model.map_cut)
    assert features.ndim == 4 and features.shape[2:] == (2, 2)
    torch.testing.assert_close(model.forward_from(features, model.map_cut), model(images()), atol=1e-6, rtol=1e-5)


def test_feature_map_of_a_convnext_comes_before_its_final_norm():
    attention, average = tower().eval(), tower(head="average_linear").eval()
    average.trunk.load_state_dict(attention.trunk.state_dict())
    features = attention.forward_prefix(images(), attention.map_cut)
    torch.testing.assert_close(features, average.forward_prefix(images(), average.map_cut))
    torch.testing.assert_close(features, average.trunk.forward_features(images()))


@pytest.mark.parametrize("build", [tower, small_resnet, lambda: tower("resnet18"), lambda: tower("ghostnet_050")])
def test_checkpointing_changes_memory_only(build):
    results = []
    for enable in (False, True):
        model = build().train()
        model.set_grad_checkpointing(enable)
        embeddings = model(images(4))
        embeddings.square().sum().backward()
        results.append((embeddings, [p.grad for p in model.parameters()], dict(model.named_buffers())))
    (plain, plain_grads, plain_buffers), (saved, saved_grads, saved_buffers) = results
    torch.testing.assert_close(saved, plain)
    torch.testing.assert_close(saved_grads, plain_grads, atol=1e-5, rtol=1e-4)
    if build is small_resnet:
        for name, value in plain_buffers.items():
            if "running" in name:
                torch.testing.assert_close(saved_buffers[name], value, msg=name)


def test_checkpointing_recomputes_the_same_drop_path():
    grads = []
    for enable in (False, True):
        model = tower(drop_path=0.5).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(7)
        model(images(4)).square().sum().backward()
        grads.append(model.trunk.stem[0].weight.grad)
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("build", [tower, small_resnet])
def test_layout_changes_no_result(build):
    model = build().eval()
    model.channels_last = False
    plain = model(images())
    model.channels_last = True
    assert model.forward_prefix(images(), 0).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(images()), plain, atol=1e-5, rtol=1e-4)
    assert all(p.is_contiguous() for p in model.parameters())


def test_float_images_suit_a_half_precision_tower():
    assert tower().bfloat16().eval()(images()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "convnextv2_tinny"}, "did you mean 'convnextv2_tiny'"),
        ({"backbone": "vit_tiny_patch16_224"}, "gives no feature map"),
        ({"backbone": "swin_tiny_patch4_window7_224"}, "gives no feature map"),
        ({"backbone": "vgg11", "drop_path": 0.1}, "refuses an option"),
        ({"backbone": "convnext_atto_ols", "head": "attention_pool", "drop_path": 0.1}, None),
        ({"backbone": "RN50", "head": "average_linear"}, "pool of its own"),
        ({"backbone": "RN50", "image_size": 100}, "32 divides"),
    ],
)
def test_impossible_towers_are_refused_in_one_line(options, message):
    with torch.device("meta"):
        if message is None:
            build_image_tower(schema.ImageTowerConfig(**options), 32)
            return
        with pytest.raises(schema.UserError, match=message) as caught:
            build_image_tower(schema.ImageTowerConfig(**options), 32)
    assert "\n" not in str(caught.value)
