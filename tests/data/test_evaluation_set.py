"""Evaluation sets: every image and caption once over the ranks, broken ones dropped by all of them alike."""

import pytest
import torch

from convclip.data.evaluation_set import load_evaluation_set
from convclip.data.transforms import EvalTransform
from convclip.schema import Data, UserError
from tests.data.makers import GREY_STEP, caption, noise_jpeg, picture, read_back, sample, write_shards, write_tar


def _load(address, tmp_path, **settings):
    data = Data(**{"workers": 0, "cache_folder": str(tmp_path / "cache"), **settings})
    return load_evaluation_set(str(address), data, EvalTransform(16), read_back)


@pytest.mark.parametrize(("world", "batch", "workers"), [(1, 4, 0), (3, 4, 0), (4, 3, 2), (16, 5, 0)])
def test_ranks_share_images_and_captions(tmp_path, world, batch, workers):
    captions = lambda image: 1 + image % 6  # noqa: E731
    loaded = _load(write_shards(tmp_path, [6, 7], captions=captions), tmp_path, workers=workers)
    assert len(loaded) == 13 and len(loaded.captions) == sum(map(captions, range(13)))
    assert loaded.image_ids.tolist() == list(range(13)) and loaded.broken == []
    assert loaded.image_of_text.tolist() == [image for image in range(13) for _ in range(captions(image))]
    assert loaded.caption_ids.tolist() == [100 * i + k for i in range(13) for k in range(captions(i))]

    for batches, total in ((loaded.image_batches, 13), (loaded.text_batches, len(loaded.captions))):
        ranks = [list(batches(rank, world, batch, workers)) for rank in range(world)]
        assert len({tuple(len(numbers) for numbers, _ in rank) for rank in ranks}) == 1
        assert all(len(numbers) == len(values) <= batch for rank in ranks for numbers, values in rank)
        numbers = torch.cat([numbers for rank in ranks for numbers, _ in rank])
        values = torch.cat([values for rank in ranks for _, values in rank])
        assert sorted(numbers[numbers >= 0].tolist()) == list(range(total))
        assert (values[numbers < 0] == 0).all()
        if total == 13:
            shown = (values.float().mean((1, 2, 3)) / GREY_STEP).round().long()
            assert torch.equal(shown[numbers >= 0], numbers[numbers >= 0])
        else:
            assert torch.equal(values[numbers >= 0], read_back([loaded.captions[n] for n in numbers if n >= 0]))


def test_broken_images_and_captions_are_dropped(tmp_path):
    samples = {f"{number:02d}": sample(number, captions=2) for number in range(10)}
    samples["03"]["jpg"] = noise_jpeg(1, size=(400, 300))[:-2000]
    samples["05"]["jpg"] = b"not an image"
    del samples["07"]["json"]
    samples["08"]["json"] = b'{"image_id": 8, "captions": ["", "8 1"], "caption_ids": [800, 801]}'
    samples["09"]["json"] = b'{"image_id": 9, "captions": ["", " "]}'
    address = write_tar(tmp_path / "0.tar", samples)
    loaded = _load(address, tmp_path, max_broken_share=0.4)
    assert loaded.image_ids.tolist() == [0, 1, 2, 4, 6, 8]
    assert loaded.captions[-1] == "8 1" and loaded.caption_ids[-1] == 801 and loaded.image_of_text[-1] == 5
    assert [message.split(":")[1] for message in loaded.broken] == ["03", "05", "07", "08", "09", "09"]
    assert sorted(torch.cat([numbers for numbers, _ in loaded.image_batches(0, 1, 4)]).tolist()) == list(range(6))
    with pytest.raises(UserError, match=r"4 of 10 images of .*0.tar are broken, the first is 0.tar:03"):
        _load(address, tmp_path)
    with pytest.raises(UserError, match=r"4 of 10 images"):
        _load(address, tmp_path, workers=1)


def test_csv(tmp_path):
    rows = ["filepath,title"]
    for image in (4, 2):
        picture(image).save(tmp_path / f"{image}.png")
        rows += [f"{image}.png,{caption(image, number)}" for number in range(3)]
    (tmp_path / "val.csv").write_text("\n".join(rows))
    loaded = _load(tmp_path / "val.csv", tmp_path)
    assert loaded.image_of_text.tolist() == [0, 0, 0, 1, 1, 1] and loaded.captions[3] == "2 0"
    ((numbers, images),) = loaded.image_batches(0, 1, 8)
    assert numbers.tolist() == [0, 1] and images[:, 0, 0, 0].tolist() == [4 * GREY_STEP, 2 * GREY_STEP]


def test_image_that_vanishes_after_loading(tmp_path):
    picture(1).save(tmp_path / "1.png")
    (tmp_path / "val.csv").write_text("filepath,title\n1.png,1 0\n")
    loaded = _load(tmp_path / "val.csv", tmp_path)
    (tmp_path / "1.png").unlink()
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"^evaluation image val.csv:1.png was readable at start"):
            list(loaded.image_batches(0, 1, 8, workers))
