"""Transforms against torchvision's and open_clip's own."""

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as F

from convclip.data.transforms import EvalTransform, TrainTransform, normalize, random_crop_box, stack_images
from convclip.schema import ImageTowerConfig

MODES = ("RGB", "L", "RGBA", "CMYK", "P", "LA", "1")
TOWER = ImageTowerConfig()


def _picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(97, 61), (40, 131), (32, 32)])
def test_train_pixels_equal_torchvision_given_the_box(mode, size):
    image = _picture(*size, mode)
    left, top, width, height = random_crop_box(size, (0.3, 1.0), np.random.default_rng(7))
    ours = TrainTransform(32, (0.3, 1.0))(image, np.random.default_rng(7))
    theirs = F.resized_crop(image, top, left, height, width, [32, 32], InterpolationMode.BICUBIC).convert("RGB")
    assert ours.dtype == torch.uint8 and ours.shape == (3, 32, 32)
    assert torch.equal(ours, F.pil_to_tensor(theirs))


def test_train_equals_open_clip_where_the_box_is_the_whole_picture():
    image = _picture(64, 64)
    theirs = image_transform_v2(PreprocessCfg(size=32), is_train=True, aug_cfg={"scale": (1.0, 1.0)})
    # A square at scale 1 only fits with ratio 1 or as the fallback box, which is the whole picture.
    torch.manual_seed(0)
    ours = TrainTransform(32, (1.0, 1.0))(image, np.random.default_rng(0))
    assert torch.equal(normalize(ours[None], TOWER.mean, TOWER.std)[0], theirs(image))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(97, 61), (40, 131), (33, 32), (32, 32), (20, 9)])
def test_eval_equals_open_clip_bit_for_bit(mode, size):
    image = _picture(*size, mode)
    theirs = image_transform_v2(PreprocessCfg(size=32), is_train=False)(image)
    ours = normalize(EvalTransform(32)(image)[None], TOWER.mean, TOWER.std)[0]
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("size", [(97, 61), (40, 131), (20, 9)])
def test_bilinear_pixels_are_open_clips_and_torchvisions(size):
    image, bicubic, bilinear = _picture(*size), EvalTransform(32), EvalTransform(32, "bilinear")
    theirs = image_transform_v2(PreprocessCfg(size=32, interpolation="bilinear"), is_train=False)(image)
    assert torch.equal(normalize(bilinear(image)[None], TOWER.mean, TOWER.std)[0], theirs)
    left, top, width, height = random_crop_box(size, (0.3, 1.0), np.random.default_rng(7))
    cropped = F.resized_crop(image, top, left, height, width, [32, 32], InterpolationMode.BILINEAR)
    ours = TrainTransform(32, (0.3, 1.0), "bilinear")(image, np.random.default_rng(7))
    assert torch.equal(ours, F.pil_to_tensor(cropped)) and not torch.equal(bicubic(image), bilinear(image))
    # Stores of 0.1.0 have this text in their identity.
    assert f"{bilinear}" == f"{bicubic}" == "EvalTransform(size=32)"


@pytest.mark.parametrize("size", [(640, 480), (200, 20), (20, 200)])
def test_crop_boxes_are_distributed_as_torchvisions(size):
    """Means and spreads of area share, ratio and place over 2,000 draws each."""
    generator = np.random.default_rng(0)
    torch.manual_seed(0)
    image = Image.new("L", size)
    ours = np.array([random_crop_box(size, (0.5, 1.0), generator) for _ in range(2000)], dtype=float)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, [0.5, 1.0], [3 / 4, 4 / 3]) for _ in range(2000)], dtype=float
    )
    theirs = theirs[:, [1, 0, 3, 2]]
    assert (ours[:, 0] + ours[:, 2] <= size[0]).all() and (ours[:, 1] + ours[:, 3] <= size[1]).all()
    spread = np.maximum(theirs.std(0), 1)
    assert (abs(ours.mean(0) - theirs.mean(0)) < 0.15 * spread).all()
    assert (abs(ours.std(0) - theirs.std(0)) < 0.15 * spread).all()


def test_normalize_to_half_is_the_rounded_float():
    images = torch.arange(256, dtype=torch.uint8).repeat(3)[: 3 * 4 * 4 * 2].view(2, 3, 4, 4)
    full = normalize(images, TOWER.mean, TOWER.std)
    half = normalize(images, TOWER.mean, TOWER.std, torch.bfloat16)
    assert half.dtype == torch.bfloat16 and torch.equal(half, full.bfloat16()) and images.dtype == torch.uint8


def test_stacked_pictures_are_torchs_stack_and_contiguous_once_normalised():
    pictures = [TrainTransform(32)(_picture(40, 50 + number), np.random.default_rng(0)) for number in range(3)]
    stacked = stack_images(pictures)
    assert torch.equal(stacked, torch.stack(pictures)) and stacked.shape == (3, 3, 32, 32)
    assert normalize(stacked, TOWER.mean, TOWER.std).is_contiguous()


@pytest.mark.parametrize("size", [(8, 900), (8, 901), (1300, 16), (1, 501), (64, 64 * 21)])
def test_a_strip_is_cropped_first_and_shows_the_same(size):
    image = _picture(*size)
    ours = EvalTransform(32)(image)
    # The steps of torchvision, as in EvalTransform for other shapes: resize the whole, then crop.
    theirs = F.pil_to_tensor(F.center_crop(F.resize(image, 32, InterpolationMode.BICUBIC), [32, 32]))
    assert torch.equal(ours, theirs)


def test_a_strip_takes_no_more_memory_than_its_pixels():
    strip = Image.new("RGB", (1, 60_000), (9, 8, 7))
    assert EvalTransform(2048)(strip)[:, 0, 0].tolist() == [9, 8, 7]
