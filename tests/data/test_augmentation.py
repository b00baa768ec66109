"""Random erasing against timm's, colour jitter against torchvision's, and crops that neither changes."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import ColorJitter
from torchvision.transforms import functional as F

from convclip.config import load_recipe
from convclip.data.augmentation import Augmentation, erased_box, turn_hue
from convclip.data.loader import TrainLoader
from convclip.data.transforms import EvalTransform, TrainTransform, Views, normalize
from convclip.engine.stored.frozen import recipe_views
from convclip.schema import BatchConfig, Data, ImageTowerConfig, UserError
from tests.data.makers import noise_jpeg, write_tar

TOWER = ImageTowerConfig(image_size=32)
JITTER = (0.4, 0.3, 0.5, 0.1)
DRAWS = 2000


def data(**values) -> Data:
    return Data.model_validate(values)


def augmentation(**values) -> Augmentation:
    found = Augmentation.of(data(**values), TOWER)
    assert found is not None
    return found


def picture(seed: int = 0, size: tuple[int, int] = (61, 47)) -> Image.Image:
    return Image.open(io.BytesIO(noise_jpeg(seed, size)))


def moments(values: np.ndarray) -> np.ndarray:
    return np.concatenate([values.mean(0), values.std(0)])


@pytest.mark.parametrize("side", [32, 224])
def test_erased_boxes_are_distributed_as_timms(side):
    """Means and spreads of share, aspect ratio and place; the box of timm's is read off an image of zeros."""
    random.seed(0)
    theirs, erasing = [], RandomErasing(1.0, mode="pixel", device="cpu")
    for _ in range(DRAWS):
        where = erasing(torch.zeros(3, side, side))[0].nonzero()
        (top, left), (bottom, right) = where.min(0).values.tolist(), where.max(0).values.tolist()
        theirs.append((left, top, right - left + 1, bottom - top + 1))
    generator = np.random.default_rng(0)
    ours = [erased_box(side, side, generator) for _ in range(DRAWS)]
    rows = []
    for boxes in (ours, theirs):
        left, top, width, height = np.array(boxes, dtype=float).T
        assert ((left >= 0) & (top >= 0) & (left + width <= side) & (top + height <= side)).all()
        rows.append(np.stack([left / side, top / side, width * height / side**2, np.log(height / width)], axis=1))
    spread = rows[1].std(0)
    assert (abs(rows[0].mean(0) - rows[1].mean(0)) < 0.1 * spread).all()
    assert (abs(rows[0].std(0) - rows[1].std(0)) < 0.1 * spread).all()
    assert (rows[0][:, 2].min(), rows[0][:, 2].max()) == pytest.approx((0.02, 1 / 3), abs=0.02)


def test_erasing_happens_so_often_and_leaves_noise_of_the_towers_colours():
    generator, erasing = np.random.default_rng(0), augmentation(random_erasing=0.35)
    plain = torch.zeros(3, 64, 64, dtype=torch.uint8)
    found = [erasing.erase(plain.clone(), generator) for _ in range(DRAWS)]
    assert sum(bool(image.any()) for image in found) / DRAWS == pytest.approx(0.35, abs=0.03)
    noise, always = [], augmentation(random_erasing=1.0)
    for seed in range(300):
        levels = (torch.full_like(plain, level) for level in (0, 255))
        black, white = (always.erase(image, np.random.default_rng(seed)) for image in levels)
        # What is not alike in both is what stayed.
        noise.append(normalize(black[None], TOWER.mean, TOWER.std)[0][:, (black == white).all(0)])
    ours = torch.cat(noise, dim=1)
    ends = torch.tensor([0, 255], dtype=torch.uint8).expand(1, 3, 1, 2)
    black, white = normalize(ends, TOWER.mean, TOWER.std)[0].split(1, dim=-1)
    black, white = black[..., 0], white[..., 0]
    theirs = torch.randn(3, 10**6, generator=torch.Generator().manual_seed(0))
    cut = ((theirs < black) | (theirs > white)).float().mean()
    assert 0.06 < cut < 0.08
    theirs = theirs.maximum(black).minimum(white)
    assert torch.allclose(ours.mean(1), theirs.mean(1), atol=0.02)
    assert torch.allclose(ours.std(1), theirs.std(1), atol=0.02)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_an_adjustment_is_torchvisions_bit_for_bit(mode):
    image = picture().convert(mode)
    rgb = image.convert("RGB")
    for index, adjust in enumerate((F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)):
        strengths = [0.0] * 4
        strengths[index] = 0.5
        jitter = augmentation(color_jitter=strengths)
        for seed in range(10):
            generator = np.random.default_rng(seed)
            assert generator.random() < 1
            place = generator.random(4)[index]
            theirs = adjust(rgb, place - 0.5 if index == 3 else 0.5 + place)
            ours = jitter.recolor(image, np.random.default_rng(seed))
            assert ours.tobytes() == theirs.tobytes() and ours.mode == "RGB"
    for share in (-0.5, -0.1, 0.0, 0.5):
        assert turn_hue(rgb, share).tobytes() == F.adjust_hue(rgb, share).tobytes()


@pytest.mark.full
def test_jittered_colours_are_distributed_as_torchvisions():
    """Means and spreads of an image's mean colours and contrast over many draws."""
    rows: list[list[list[float]]] = [[], []]
    image = Image.new("RGB", (8, 8), (150, 90, 40))
    image.paste((60, 120, 200), (0, 0, 5, 5))
    theirs, ours, generator = ColorJitter(*JITTER), augmentation(color_jitter=JITTER), np.random.default_rng(0)
    torch.manual_seed(0)
    for _ in range(DRAWS):
        for row, jittered in zip(rows, (ours.recolor(image, generator), theirs(image)), strict=True):
            pixels = np.asarray(jittered, dtype=float)
            row.append([*pixels.mean((0, 1)), *pixels.std((0, 1))])
    found = [np.array(row) for row in rows]
    spread = found[1].std(0)
    assert (abs(found[0].mean(0) - found[1].mean(0)) < 0.1 * spread).all()
    assert (abs(found[0].std(0) - found[1].std(0)) < 0.1 * spread).all()
    rare = augmentation(color_jitter=JITTER, color_jitter_probability=0.2)
    changed = sum(rare.recolor(image, generator) is not image for _ in range(DRAWS))
    assert changed / DRAWS == pytest.approx(0.2, abs=0.03)


def test_off_is_bitwise_as_before_and_on_leaves_the_crop_where_it_was():
    image = picture()
    for scale in ((0.9, 1.0), (0.33, 1.0)):
        plain = TrainTransform(32, scale)
        assert TrainTransform.of(data(crop_scale=scale), TOWER) == plain
        erasing = TrainTransform.of(data(crop_scale=scale, random_erasing=1.0), TOWER)
        jitter = TrainTransform.of(data(crop_scale=scale, color_jitter=[0, 0, 0, 0.5]), TOWER)
        for seed in range(20):
            crop, erased, turned = (t(image, np.random.default_rng(seed)) for t in (plain, erasing, jitter))
            stayed = (crop == erased).all(0)
            assert 0.5 < stayed.float().mean() < 0.99
            # Turning hues keeps each pixel's brightest channel, but for rounding.
            assert (crop.amax(0).int() - turned.amax(0).int()).abs().max() <= 1 and not torch.equal(crop, turned)


def test_a_rows_pixels_do_not_depend_on_workers_or_ranks(tmp_path):
    write_tar(
        tmp_path / "train-000000.tar",
        {f"{n:03d}": {"jpg": noise_jpeg(n, (40, 36)), "json": b'{"captions": ["a"]}'} for n in range(16)},
    )
    settings = {
        "train": str(tmp_path / "train-000000.tar"),
        "random_erasing": 0.5,
        "color_jitter": [0.4, 0.4, 0.4, 0.1],
    }

    def epoch(world: int, workers: int, **more) -> torch.Tensor:
        found = data(workers=workers, **{**settings, **more})
        batch = BatchConfig.model_validate({"global": 8})
        transform = TrainTransform.of(found, TOWER)
        shares = [
            torch.stack([b["image"] for b in TrainLoader(found, batch, transform, read, rank, world, 3).epoch(1)])
            for rank in range(world)
        ]
        return torch.cat(shares, dim=1)

    read = lambda texts: torch.zeros(len(texts), 4, dtype=torch.int64)  # noqa: E731
    whole = epoch(1, 0)
    assert torch.equal(epoch(2, 0), whole) and torch.equal(epoch(1, 2), whole)
    assert not torch.equal(epoch(1, 0, random_erasing=0), whole)


def test_augmentation_is_part_of_a_view_and_of_a_stores_identity_only_where_set():
    demo = ["features={mode: fill, views: 3}", "freezing.lock=[image, text]"]
    plain, augmented = (recipe_views(load_recipe("demo", [*demo, *more])) for more in ([], ["data.random_erasing=0.5"]))
    assert plain is not None and augmented is not None
    # As a store of 0.1.0 has it.
    assert plain.describe() == "TrainTransform(size=64, crop_scale=(0.9, 1.0)), 3 views, seed 0"
    assert augmented.describe() == plain.describe().replace("), 3", "), random_erasing 0.5, 3")
    image = picture()
    assert any(not torch.equal(plain(image, 7, view), augmented(image, 7, view)) for view in range(3))
    assert torch.equal(augmented(image, 7, 1), augmented(image, 7, 1))
    assert torch.equal(plain.evaluation(image), augmented.evaluation(image))
    both = TrainTransform.of(data(color_jitter=JITTER, color_jitter_probability=0.8, random_erasing=0.35), TOWER)
    assert Views(2, 5, both, EvalTransform(32)).describe() == (
        "TrainTransform(size=32, crop_scale=(0.9, 1.0)), color_jitter [0.4, 0.3, 0.5, 0.1] of 0.8, "
        "random_erasing 0.35, 2 views, seed 5"
    )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.random_erasing=0.35", "features=fill"], ["change nothing", "features.views to 2 or more"]),
        (["data.color_jitter=[0, 0, 0, 0.1]", "features={views: 1}"], ["change nothing", "evaluation crop"]),
        (["data.color_jitter_probability=0.8"], ["color_jitter_probability goes with color_jitter"]),
        (["data.color_jitter=0.4"], ["data.color_jitter", "a list"]),
        (["data.color_jitter=[0.4, 0.4, 0.4]"], ["data.color_jitter.3", "required"]),
        (["data.color_jitter=[0, 0, 0, 0.6]"], ["data.color_jitter.3", "0.5"]),
        (["data.random_erasing=1.5"], ["data.random_erasing", "1.5"]),
        (["data.random_erasing=35"], ["data.random_erasing", "35"]),
    ],
)
def test_settings_that_mean_nothing_are_refused(overrides, words):
    with pytest.raises(UserError) as caught:
        load_recipe("demo", overrides)
    assert all(word in str(caught.value) for word in words), caught.value


def test_live_runs_and_several_views_take_it():
    for overrides in (["data.random_erasing=0.35"], ["data.random_erasing=0.35", "features={mode: fill, views: 2}"]):
        assert load_recipe("demo", [*overrides, "freezing.lock=[image, text]"]).data.random_erasing == 0.35
