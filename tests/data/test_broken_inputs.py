"""Every broken input of broken_inputs.py comes out as it must: refused in one line, counted, or right."""

import json
import logging
import re

import braceexpand
import pytest

from convclip.data.coco import read_coco
from convclip.data.evaluation_set import load_evaluation_set
from convclip.data.loader import TrainLoader
from convclip.data.shards import _brace_count
from convclip.data.transforms import EvalTransform, TrainTransform
from convclip.models.weights import read_weights
from convclip.schema import BatchConfig, Data, UserError
from tests.data import broken_inputs
from tests.data.broken_inputs import ANNOTATIONS, COUNTED, REFUSED, RIGHT, TRAIN_DATA, WEIGHTS
from tests.data.makers import read_back, write_shards, write_tar


def told(error: pytest.ExceptionInfo) -> str:
    """The one line of a UserError."""
    line = str(error.value)
    assert "\n" not in line
    return line


def read_all(address: str, folder, share: float = 1.0) -> TrainLoader:
    """Read an epoch, and make an evaluation set of the same; what was lost is in `broken` and the log."""
    data = Data(train=address, workers=0, cache_folder=str(folder / "cache"), max_broken_share=share)
    loader = TrainLoader(data, BatchConfig.model_validate({"global": 1}), TrainTransform(8), read_back, 0, 1, 0)
    loader.problems = [line for batch in loader.epoch(0) for line in batch["broken"]]
    loader.evaluation = load_evaluation_set(address, data, EvalTransform(8), read_back)
    return loader


@pytest.mark.parametrize("make", TRAIN_DATA, ids=lambda make: make.__name__)
def test_train_data(tmp_path, make, caplog):
    for seed in range(TRAIN_DATA[make]):
        folder = tmp_path / str(seed)
        folder.mkdir()
        broken = make(folder, seed)
        caplog.clear()
        if broken.outcome == REFUSED:
            with pytest.raises(UserError) as error:
                read_all(broken.address, folder)
            assert re.search(broken.message, told(error)), (seed, told(error))
            continue
        loader = read_all(broken.address, folder)
        lost = [*loader.source.damage, *loader.problems]
        assert bool(lost) == (broken.outcome == COUNTED), (seed, lost)
        if broken.outcome == COUNTED:
            assert any(re.search(broken.message, line) for line in lost), (seed, lost)
            assert all(line in caplog.text for line in loader.source.damage)
            assert set(loader.source.damage) <= set(loader.evaluation.broken)
            # Beyond the share it stops, in training and in evaluation.
            if loader.source.lost or loader.problems:
                with pytest.raises(UserError, match=r"max_broken_share 0\.0 allows"):
                    read_all(broken.address, folder, share=0.0)
        else:
            assert not loader.evaluation.broken and broken.outcome == RIGHT


def test_damage_is_told_to_the_log_of_the_run(tmp_path, caplog):
    """The run's handlers come after the loader is made: the lines come with the first epoch, once."""
    broken = broken_inputs.noise_in_a_header(tmp_path, 0)
    data = Data(train=broken.address, workers=0, cache_folder=str(tmp_path / "cache"), max_broken_share=1)
    loader = TrainLoader(data, BatchConfig.model_validate({"global": 1}), TrainTransform(8), read_back, 0, 1, 0)
    caplog.clear()
    for _ in range(2):
        list(loader.epoch(0))
    lines = [record for record in caplog.records if "damaged header" in record.getMessage()]
    assert len(lines) == 1 and lines[0].levelno == logging.WARNING and lines[0].name.startswith("convclip.")


def test_two_sources_have_ids_apart_and_one_keeps_its_own(tmp_path):
    first, second = (write_shards(tmp_path / name, [4, 3]) for name in ("one", "two"))
    settings = {"workers": 0, "cache_folder": str(tmp_path / "cache")}

    def ids(address: str) -> tuple[list[int], list[int]]:
        found = load_evaluation_set(address, Data(**settings), EvalTransform(8), read_back)
        return found.image_ids.tolist(), found.caption_ids.tolist()

    alone = ids(first)
    assert alone == (list(range(7)), [100 * image + k for image in range(7) for k in range(5)])
    braces = f"{tmp_path}/{{one,two}}/train-{{000000..000001}}.tar"
    for merged in (f"{first}::{second}", braces):
        images, captions = ids(merged)
        assert images == list(range(14)) and captions == list(range(70))
        data = Data(train=merged, **settings)
        loader = TrainLoader(data, BatchConfig.model_validate({"global": 7}), TrainTransform(8), read_back, 0, 1, 0)
        batches = list(loader.epoch(0))
        assert sorted(n for batch in batches for n in batch["caption_id"].tolist()) == captions
        assert "2 sources, numbered anew" in loader.describe()
    # Other names in front of the number, in one folder, are sources too.
    write_tar(tmp_path / "one" / "other-000000.tar", {"a": {"jpg": b"x", "json": b'{"captions": ["1 1"]}'}})
    assert "2 sources" in read_all(f"{tmp_path}/one/*.tar", tmp_path).describe()


def test_annotations(tmp_path):
    for seed in range(ANNOTATIONS):
        folder = tmp_path / str(seed)
        folder.mkdir()
        broken = broken_inputs.annotations(folder, seed)
        with pytest.raises(UserError) as error:
            read_coco(type(tmp_path)(broken.address), "train")
        assert re.search(broken.message, told(error)), seed


def test_weights(tmp_path):
    for seed in range(WEIGHTS):
        folder = tmp_path / str(seed)
        folder.mkdir()
        broken = broken_inputs.weights(folder, seed)
        with pytest.raises(UserError) as error:
            read_weights(broken.address)
        assert re.search(broken.message, told(error)), seed


KARPATHY = {
    "dataset": "coco",
    "images": [
        {"filename": f"{n}.jpg", "filepath": "val2014", "split": split, "imgid": n, "cocoid": 100 + n}
        | {"sentences": [{"raw": f"{n} {k}", "sentid": 10 * n + k, "imgid": n} for k in range(2)]}
        for n, split in enumerate(("train", "restval", "val", "test"))
    ],
}


def test_karpathys_files(tmp_path):
    path = tmp_path / "dataset_coco.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(KARPATHY).encode())
    train = read_coco(path, "train")
    assert [image.image_id for image in train] == [100, 101]
    assert train[1].file_name == "val2014/1.jpg"
    assert train[1].captions == ("1 0", "1 1") and train[1].caption_ids == (10, 11)
    assert [image.image_id for image in read_coco(path, "test")] == [103]
    for split in (None, "dev"):
        with pytest.raises(UserError, match=r"splits restval \(1 images\), test \(1 images\), train .*, val .*--split"):
            read_coco(path, split)
    # Flickr's: no cocoid, no sub-folder.
    flickr = {"images": [{k: v for k, v in i.items() if k not in ("cocoid", "filepath")} for i in KARPATHY["images"]]}
    path.write_text(json.dumps(flickr))
    assert [(image.image_id, image.file_name) for image in read_coco(path, "val")] == [(2, "2.jpg")]
    # The flat list, an image on one row and on two.
    rows = [{"image": "v/a.jpg", "caption": ["x", "y"]}, {"image": "b.jpg", "caption": "z"}]
    path.write_text(json.dumps([*rows, {"image": "v/a.jpg", "caption": "w"}]))
    for split in (None, "train"):
        found = read_coco(path, split)
        assert [(i.image_id, i.file_name, i.captions) for i in found] == [
            (0, "v/a.jpg", ("x", "y", "w")),
            (1, "b.jpg", ("z",)),
        ]
        assert sorted(n for image in found for n in image.caption_ids) == [0, 1, 2, 3]


def test_names_of_a_brace_pattern_are_counted():
    for pattern in (
        "a",
        "{0..9}",
        "{9..0}x{a,b}",
        "{a,b{0..3}c,{d,e}{f,g}}",
        "{a}",
        "a,b",
        "{a..e}{-2..2}",
        r"\{a,b\}",
    ):
        assert _brace_count(pattern) == len(list(braceexpand.braceexpand(pattern))), pattern
