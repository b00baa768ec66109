"""What is said of data that no store can be made of."""

from types import SimpleNamespace

import pytest
import torch

from convclip.engine.stored.extraction import Extraction
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
