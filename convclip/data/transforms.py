"""Image to uint8 tensor on the CPU, and uint8 to normalised float on the device.

Shapes: B batch, C channels (3), S side of the square result, H.W the image as stored.
The steps are open_clip's (`open_clip.transform.image_transform`): crop and resize first, RGB conversion last.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch.utils.data import default_collate

from convclip.data.augmentation import Augmentation
from convclip.schema import Data, ImageTowerConfig

# schema.ImageTowerConfig.interpolation
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
CROP_RATIO = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10
# Images longer than this many times their shorter side are cropped before they are resized.
LONGEST = 20
# The random stream of views; apart from those of convclip.data.order and loader.
VIEW = 4


@dataclass(frozen=True)
class TrainTransform:
    """Random resized crop, then augmentation: `transform(image, generator) -> uint8 [C, S, S]`.

    All of it comes from `generator` alone, so that a row's pixels depend on nothing but the row; the crop box comes
    first, so that it is the same with and without augmentation.
    """

    size: int
    crop_scale: tuple[float, float] = (0.9, 1.0)
    # Not shown: a feature store's identity has it from the model, and those of 0.1.0 do not have it.
    interpolation: str = field(default="bicubic", repr=False)
    # Not shown either: `Views.describe` says it where there is one.
    augmentation: Augmentation | None = field(default=None, repr=False)

    @classmethod
    def of(cls, data: Data, tower: ImageTowerConfig) -> TrainTransform:
        """The transform that a recipe asks for."""
        return cls(tower.image_size, data.crop_scale, tower.interpolation, Augmentation.of(data, tower))

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> torch.Tensor:
        left, top, width, height = random_crop_box(image.size, self.crop_scale, generator)
        image = image.crop((left, top, left + width, top + height))
        image = image.resize((self.size, self.size), RESAMPLING[self.interpolation])
        if self.augmentation is None:
            return _to_tensor(image)
        return self.augmentation.erase(_to_tensor(self.augmentation.recolor(image, generator)), generator)


@dataclass(frozen=True)
class EvalTransform:
    """Shorter side to S, then centre crop: `transform(image) -> uint8 [C, S, S]`.

    `generator` is accepted and unused: either transform can be given to a loader.
    """

    size: int
    interpolation: str = field(default="bicubic", repr=False)

    def __call__(self, image: Image.Image, generator: np.random.Generator | None = None) -> torch.Tensor:
        image = _without_ends(image)
        width, height = image.size
        # int(), not round(): torchvision's rule for the longer side.
        if width <= height:
            resized = (self.size, int(self.size * height / width))
        else:
            resized = (int(self.size * width / height), self.size)
        if resized != image.size:
            image = image.resize(resized, RESAMPLING[self.interpolation])
        left = round((resized[0] - self.size) / 2)
        top = round((resized[1] - self.size) / 2)
        return _to_tensor(image.crop((left, top, left + self.size, top + self.size)))


@dataclass(frozen=True)
class Views:
    """A fixed number of views of each image, for work that is done once and stored.

    View v of an image is drawn from (seed, v, image id); a single view is the evaluation transform. Epoch e trains on
    view e mod `count`.
    """

    count: int
    seed: int
    train: TrainTransform
    evaluation: EvalTransform

    def __call__(self, image: Image.Image, image_id: int, view: int) -> torch.Tensor:
        """uint8 [C, S, S]."""
        if self.count == 1:
            return self.evaluation(image)
        return self.train(image, np.random.default_rng((self.seed, VIEW, view, image_id % 2**63)))

    def describe(self) -> str:
        """What makes these views, for the store's identity."""
        if self.count == 1:
            return f"{self.evaluation}"
        augmentation = "" if self.train.augmentation is None else f", {self.train.augmentation}"
        return f"{self.train}{augmentation}, {self.count} views, seed {self.seed}"


def random_crop_box(
    size: tuple[int, int], scale: tuple[float, float], generator: np.random.Generator
) -> tuple[int, int, int, int]:
    """(left, top, width, height) in pixels of an image of `size` (width, height).

    The distribution is torchvision's `RandomResizedCrop.get_params`: area share uniform in `scale`, aspect ratio
    log-uniform in 3/4..4/3, ten attempts, then the largest centred box of an allowed ratio.
    """
    width, height = size
    low, high = math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])
    for _ in range(CROP_ATTEMPTS):
        # Four numbers in one call: a call costs more than a number.
        share, shape, across, down = generator.random(4).tolist()
        area = width * height * (scale[0] + share * (scale[1] - scale[0]))
        ratio = math.exp(low + shape * (high - low))
        crop_width = round(math.sqrt(area * ratio))
        crop_height = round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(across * (width - crop_width + 1))
            top = int(down * (height - crop_height + 1))
            return left, top, crop_width, crop_height
    crop_width, crop_height = width, height
    if width / height < CROP_RATIO[0]:
        crop_height = max(1, round(width / CROP_RATIO[0]))
    elif width / height > CROP_RATIO[1]:
        crop_width = max(1, round(height * CROP_RATIO[1]))
    return (width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height


def _without_ends(image: Image.Image) -> Image.Image:
    """The middle of a strip, LONGEST times as long as wide; others as they are. Whole, 1 x 60,000 takes gigabytes."""
    width, height = image.size
    kept = LONGEST * min(width, height)
    if max(width, height) <= kept:
        return image
    # Both ends lose as many pixels, so that the centre stays.
    ends = (max(width, height) - kept) // 2
    box = (ends, 0, width - ends, height) if width > height else (0, ends, width, height - ends)
    return image.crop(box)


def stack_images(images: list[torch.Tensor]) -> torch.Tensor:
    """Images uint8 [C, S, S] from a transform as one uint8 [B, C, S, S], stored as they are: channels last.

    Bringing the channels to the front costs a data worker a tenth of a millisecond per image and the device
    nothing, so `normalize` does it.
    """
    # default_collate stacks right into shared memory when it runs in a data worker.
    return default_collate([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


def normalize(
    images: torch.Tensor,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """uint8 [B, C, S, S] (0..255) to contiguous `dtype` [B, C, S, S] = (x / 255 - mean) / std, on the images' device.

    Computed in float32 in the order of ToTensor and Normalize, so that the result equals open_clip's bit for bit.
    """
    shape = (-1, 1, 1)
    mean_C11 = torch.tensor(mean, dtype=torch.float32, device=images.device).view(shape)
    std_C11 = torch.tensor(std, dtype=torch.float32, device=images.device).view(shape)
    images = images.to(torch.float32, memory_format=torch.contiguous_format)
    return images.div_(255).sub_(mean_C11).div_(std_C11).to(dtype)


def _to_tensor(image: Image.Image) -> torch.Tensor:
    """An image of any mode as uint8 [C, H, W], a view of its pixels in the order Pillow has them."""
    return torch.from_numpy(np.array(image if image.mode == "RGB" else image.convert("RGB"))).permute(2, 0, 1)
