"""What a training image goes through after its crop: other colours, an erased rectangle.

Distributions are those of torchvision's `ColorJitter` and timm's `RandomErasing` in its mode `pixel`, which open_clip
takes for both. Shapes: C channels (3), S side of the crop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance

from convclip.schema import Data, ImageTowerConfig

# Of an erased rectangle: its share of the image, its aspect ratio, and how often one is drawn that must fit.
ERASED_SHARE = (0.02, 1 / 3)
ERASED_RATIO = (0.3, 1 / 0.3)
ERASING_ATTEMPTS = 10
# The first three of data.color_jitter; the fourth is the hue.
ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


@dataclass(frozen=True)
class Augmentation:
    """Everything is drawn from the row's generator, after its crop, so a row's pixels depend on nothing but the row.

    The rectangle is filled with normal noise of the tower's `mean` and `std`, in uint8: timm fills after normalising,
    which here is done on the device. Noise below black or above white, 7 % of it with CLIP's mean and std, is cut off.
    """

    random_erasing: float
    color_jitter: tuple[float, float, float, float]
    color_jitter_probability: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def of(cls, data: Data, tower: ImageTowerConfig) -> Augmentation | None:
        """What a recipe asks for beside the crop; None for nothing."""
        if not data.augments:
            return None
        return cls(data.random_erasing, data.color_jitter, data.color_jitter_probability, tower.mean, tower.std)

    def __str__(self) -> str:
        jitter = f"color_jitter {list(self.color_jitter)} of {self.color_jitter_probability:g}"
        erasing = f"random_erasing {self.random_erasing:g}"
        return ", ".join(([jitter] if any(self.color_jitter) else []) + ([erasing] if self.random_erasing else []))

    def recolor(self, image: Image.Image, generator: np.random.Generator) -> Image.Image:
        """The image with its colours changed, RGB, or as it is."""
        if not any(self.color_jitter) or generator.random() >= self.color_jitter_probability:
            return image
        image, places = image.convert("RGB"), generator.random(4).tolist()
        for index in generator.permutation(4).tolist():
            strength, place = self.color_jitter[index], places[index]
            if strength and index < len(ENHANCERS):
                low = max(0.0, 1 - strength)
                image = ENHANCERS[index](image).enhance(low + place * (1 + strength - low))
            elif strength:
                image = turn_hue(image, (2 * place - 1) * strength)
        return image

    def erase(self, pixels: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
        """uint8 [C, S, S], erased in place or left as it is."""
        if not self.random_erasing or generator.random() >= self.random_erasing:
            return pixels
        box = erased_box(pixels.shape[-1], pixels.shape[-2], generator)
        if box is not None:
            left, top, width, height = box
            mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
            noise = mean + std * generator.standard_normal((height, width, 3), dtype=np.float32)
            values = torch.from_numpy(np.rint(255 * noise).clip(0, 255).astype(np.uint8))
            pixels[:, top : top + height, left : left + width] = values.permute(2, 0, 1)
        return pixels


def turn_hue(image: Image.Image, share: float) -> Image.Image:
    """An RGB image with its hues turned by a share of the circle, -0.5 to 0.5."""
    hue, saturation, value = image.convert("HSV").split()
    turned = hue.point([(level + int(255 * share)) % 256 for level in range(256)])
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


def erased_box(width: int, height: int, generator: np.random.Generator) -> tuple[int, int, int, int] | None:
    """(left, top, width, height) of what is erased of an image of that size; None where no rectangle drawn fits."""
    low, high = math.log(ERASED_RATIO[0]), math.log(ERASED_RATIO[1])
    for _ in range(ERASING_ATTEMPTS):
        share, shape, across, down = generator.random(4).tolist()
        area = width * height * (ERASED_SHARE[0] + share * (ERASED_SHARE[1] - ERASED_SHARE[0]))
        ratio = math.exp(low + shape * (high - low))
        erased_width, erased_height = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if erased_width < width and erased_height < height:
            left, top = int(across * (width - erased_width + 1)), int(down * (height - erased_height + 1))
            return left, top, erased_width, erased_height
    return None
