"""What is said of data that no store can be made of, and how many images are computed together."""

from types import SimpleNamespace

import pytest
import torch

from convclip.config import load_recipe
from convclip.engine.stored.extraction import Extraction, rows_at_a_time
from convclip.engine.stored.frozen import FrozenWork
from convclip.models import build_model
from convclip.schema import UserError


@pytest.mark.parametrize(
    ("images", "captions", "words"),
    [([1, 2, 2], [1, 2, 3], "image id 2 occurs twice"), ([1, 2, 3], [7, 7, 9], "caption id 7 occurs twice")],
)
def test_equal_ids_within_a_source_are_one_line_that_says_what_to_do(images, captions, words):
    work = Extraction.__new__(Extraction)
    work.recipe = SimpleNamespace(data=SimpleNamespace(train="shards/train-000000.tar"))
    work.views = SimpleNamespace(count=2)
    work.arrays = {name: SimpleNamespace(item_kind=name) for name in ("view", "caption")}
    data = SimpleNamespace(image_ids=torch.tensor(images), caption_ids=torch.tensor(captions))
    with pytest.raises(UserError, match=f"shards/train-000000.tar: {words}.*make them differ") as caught:
        work.item_ids(data)
    assert "\n" not in str(caught.value)


def test_the_last_images_are_computed_as_in_a_full_batch():
    """A MobileNet's small maps differ in the last digits by the size of the batch."""
    recipe = load_recipe("demo", ["model.image={backbone: mobilenetv3_small_050, image_size: 64}", "batch.global=16"])
    work = Extraction.__new__(Extraction)
    torch.manual_seed(0)
    work.recipe, work.model, work.dtype = recipe, build_model(recipe.model).eval(), torch.float32
    work.work, work.rows, work.teacher = FrozenWork(10, False, False), rows_at_a_time(recipe), None
    images = torch.randint(0, 256, (16, 3, 64, 64), dtype=torch.uint8)
    whole = work._images(images)["image_map"]
    assert work.rows == len(whole) == 16
    assert torch.equal(work._images(images[:3])["image_map"], whole[:3])
    work.rows = 3
    torch.testing.assert_close(work._images(images[:3])["image_map"], whole[:3])


@pytest.mark.parametrize(
    ("overrides", "rows"),
    [
        (["batch.global=64"], 64),
        (["batch.global=512"], 128),
        (["batch.global=512", "batch.micro=32"], 32),
        (["batch.global=512", "batch.accumulation=8"], 64),
        # The number of ranks does not divide: others will train.
        (["batch.global=512", "batch.micro=96"], 128),
    ],
)
def test_as_many_images_together_as_in_training_up_to_the_evaluations(overrides, rows):
    assert rows_at_a_time(load_recipe("demo", overrides)) == rows
