"""Every convolutional model that open_clip has released weights of: named, loaded, used and given back unchanged.

Weights are random, so that no network is needed; open_clip builds the model, computes what is expected, and reads what
is exported.
"""

from __future__ import annotations

import json
import shutil

import numpy
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import convclip
from convclip import schema
from convclip.models import build_model
from convclip.models.export import export_open_clip, open_clip_config

# QuickGELU, and the trunk's own head with text without a causal mask; test_export.py has the other heads, smaller.
QUICK = ("RN50-quickgelu", "MobileCLIP2-S0")
NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.full) for name in schema.RELEASED]
CAPTIONS = ["a dog", "two men in red shirts ride their bicycles along a river", "x " * 100]


def with_random_weights(name: str) -> torch.nn.Module:
    """open_clip's model; what starts at nothing (layer scales, a block's last norm) or at 0 and 1 is random too.

    Batch norms have the statistics of the pictures, or nothing of a picture would be left after fifty layers.
    """
    torch.manual_seed(0)
    model = open_clip.create_model(name)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key.startswith("visual.") and key.endswith(".bias"):
                value.normal_(0, 0.1)
            elif key.startswith("visual.") and key.endswith(("gamma", "bn3.weight")):
                # A branch's last scale: larger, and rounding grows from block to block, in open_clip alone as well.
                value.uniform_(0.05, 0.2)
            elif key.startswith("visual.") and value.ndim == 1:
                value.uniform_(0.2, 0.8)
        norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.momentum = 1.0
        if norms:
            transform, _ = preprocess_of(name)
            model.encode_image(torch.stack([transform(picture) for picture in pictures()]))
    return model.eval()


def pictures() -> list[Image.Image]:
    """Wide, high and small, of coloured fields with sharp edges: resizing by another rule changes them."""
    generator = numpy.random.default_rng(0)
    found = []
    for height, width, side in ((300, 420, 60), (500, 331, 90), (90, 90, 7)):
        fields = generator.integers(0, 256, (height // side + 1, width // side + 1, 3), dtype=numpy.uint8)
        found.append(Image.fromarray(fields.repeat(side, 0).repeat(side, 1)[:height, :width]))
    return found


def preprocess_of(name: str):
    """open_clip's own steps for the first release of `name`, and their configuration."""
    released = open_clip.get_pretrained_cfg(name, open_clip.list_pretrained_tags_by_model(name)[0])
    size = open_clip.get_model_config(name)["vision_cfg"]["image_size"]
    config = PreprocessCfg(**merge_preprocess_dict({"size": size}, released))
    return image_transform_v2(config, is_train=False), config


@torch.no_grad()
def expected(name: str, model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    transform, _ = preprocess_of(name)
    images = torch.cat([model.encode_image(transform(picture)[None], normalize=True) for picture in pictures()])
    return images, model.encode_text(open_clip.get_tokenizer(name)(CAPTIONS), normalize=True)


def save(name: str, model: torch.nn.Module, folder) -> None:
    """As open_clip's release on the Hub: weights and configuration."""
    folder.mkdir()
    config = {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")


def assert_same_file(ours, theirs) -> None:
    with safe_open(ours, "pt") as one, safe_open(theirs, "pt") as other:
        assert sorted(one.keys()) == sorted(other.keys())
        for key in one.keys():  # noqa: SIM118
            assert torch.equal(one.get_tensor(key), other.get_tensor(key)), key


@pytest.mark.parametrize("name", NAMES)
def test_loads_as_open_clip_computes_it_and_exports_the_same_file(name, tmp_path):
    folder, exported = tmp_path / "release", tmp_path / "export"
    try:
        theirs = with_random_weights(name)
        images, texts = expected(name, theirs)
        save(name, theirs, folder)
        del theirs
        clip = convclip.load(f"open_clip:{name}", pretrained=folder)
        difference = [
            (ours - other).abs().max().item()
            for ours, other in (
                (clip.embed_images(pictures(), batch=1), images),
                (clip.embed_texts(CAPTIONS), texts),
            )
        ]
        print(f"{name}: images within {difference[0]:.1e}, texts within {difference[1]:.1e}")
        assert max(difference) < 1e-5
        # Not of a kind that agrees about everything.
        assert (images[0] - images[1]).abs().max() > 1e-3 and (texts[0] - texts[1]).abs().max() > 1e-3
        assert export_open_clip(clip.model, clip.config, exported).for_open_clip
        assert_same_file(exported / "open_clip_model.safetensors", folder / "open_clip_model.safetensors")
        del clip
        shutil.rmtree(folder)
        again, _, transform = open_clip.create_model_and_transforms(f"local-dir:{exported}")
        with torch.no_grad():
            found = again.eval().encode_image(transform(pictures()[0])[None], normalize=True)
        torch.testing.assert_close(found, images[:1], atol=1e-5, rtol=0)
    finally:
        shutil.rmtree(tmp_path)


@pytest.mark.parametrize("name", schema.RELEASED)
def test_the_table_is_open_clips(name):
    """Tags, pixels, activations and sizes: nothing here but open_clip's own tables is believed."""
    released, fields = schema.RELEASED[name], schema.stands_for(name)
    assert list(released.tags) == open_clip.list_pretrained_tags_by_model(name)
    for tag, repository in released.tags.items():
        theirs = open_clip.get_pretrained_cfg(name, tag)
        model = schema.Model.model_validate({"open_clip": name, "pretrained": tag})
        assert f"{repository}/" == theirs["hf_hub"] and model.pretrained == f"hf-hub:{repository}"
        assert (model.text.activation == "quick_gelu") == theirs.get("quick_gelu", False)
        image = model.image
        assert (image.mean, image.std, image.interpolation) == (theirs["mean"], theirs["std"], theirs["interpolation"])
        assert theirs["resize_mode"] == "shortest"
    theirs = open_clip.get_model_config(name)
    assert (fields["text"]["activation"] == "quick_gelu") == theirs.get("quick_gelu", False)
    assert fields["image"]["image_size"] == theirs["vision_cfg"]["image_size"]


def test_every_convolutional_name_with_a_release_is_in_the_table():
    # Of the others, every image tower is a transformer: their names begin with one of these.
    others = ("ViT", "EVA", "coca", "roberta", "xlm", "nllb", "MobileCLIP-B", "MobileCLIP2-B", "MobileCLIP2-L", "PE-")
    named = {name for name, _ in open_clip.list_pretrained() if not name.startswith(others)}
    assert named == schema.RELEASED.keys()


@pytest.mark.parametrize("name", schema.RELEASED)
def test_names_and_shapes_without_memory(name):
    """On the meta device: what open_clip builds by its name, by our configuration, and what we have for it."""
    config = open_clip.get_model_config(name)
    kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    released = schema.Model.model_validate({"open_clip": name})
    with torch.device("meta"):
        theirs, ours = kind(**config).state_dict(), build_model(released)
    said = open_clip_config(ours, released)["model_cfg"]
    assert said.get("custom_text", False) == (kind is open_clip.CustomTextCLIP)
    assert said.get("quick_gelu", False) == config.get("quick_gelu", False)
    assert sum(p.numel() for p in ours.parameters()) == schema.RELEASED[name].parameters
    shapes = {n: t.shape for n, t in theirs.items() if n.startswith("visual.")}
    assert shapes == {f"visual.{ours.visual.exported_name(n)}": t.shape for n, t in ours.visual.state_dict().items()}
