"""The stream and the evaluation set on real pictures: COCO at full size and Flickr8k."""

import json
from pathlib import Path

import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from convclip.data.evaluation_set import load_evaluation_set
from convclip.data.loader import TrainLoader
from convclip.data.tokenizers import build_tokenizer
from convclip.data.transforms import EvalTransform, TrainTransform, normalize
from convclip.schema import BatchConfig, Data, ImageTowerConfig, TextTowerConfig
from tests.data.makers import write_tar

CASES = [("coco", "train2017", 30), ("flickr8k", "train", 60)]


def _annotations(realdata: Path, name: str, split: str, images: int) -> dict[int, tuple[Path, list[str], list[int]]]:
    content = json.loads((realdata / name / "annotations" / f"captions_{split}.json").read_text())
    found = {
        image["id"]: (realdata / name / split / image["file_name"], [], []) for image in content["images"][:images]
    }
    for row in content["annotations"]:
        if row["image_id"] in found:
            found[row["image_id"]][1].append(row["caption"])
            found[row["image_id"]][2].append(row["id"])
    return found


def _shards(folder: Path, found: dict) -> str:
    ids = list(found)
    for shard in range(3):
        samples = {}
        for image_id in ids[shard::3]:
            path, captions, caption_ids = found[image_id]
            content = {"image_id": image_id, "captions": captions, "caption_ids": caption_ids}
            samples[f"{image_id:012d}"] = {"jpg": path.read_bytes(), "json": json.dumps(content).encode()}
        write_tar(folder / f"t-{shard:06d}.tar", samples)
    return str(folder / "t-{000000..000002}.tar")


@pytest.mark.realdata
@pytest.mark.parametrize(("name", "split", "images"), CASES)
def test_real_pictures(realdata, tmp_path, name, split, images):
    found = _annotations(realdata, name, split, images)
    data = Data(train=_shards(tmp_path, found), workers=2, cache_folder=str(tmp_path / "cache"))
    tokenizer = build_tokenizer(TextTowerConfig())
    loader = TrainLoader(data, BatchConfig.model_validate({"global": 30}), TrainTransform(64), tokenizer, 0, 1, 0)
    assert loader.rows_per_epoch == sum(len(captions) for _, captions, _ in found.values()) >= 5 * images
    text_of = {number: text for _, texts, ids in found.values() for text, number in zip(texts, ids, strict=True)}
    seen = []
    for batch in loader.epoch(0):
        seen += batch["caption_id"].tolist()
        assert batch["broken"] == [] and batch["image"].shape == (30, 3, 64, 64)
        assert torch.equal(batch["text"], tokenizer([text_of[number] for number in batch["caption_id"].tolist()]))
    assert len(seen) == len(set(seen)) == loader.steps_per_epoch * 30 and set(seen) <= set(text_of)

    loaded = load_evaluation_set(data.train, data, EvalTransform(64), tokenizer)
    assert len(loaded) == images and loaded.broken == [] and set(loaded.caption_ids.tolist()) == set(text_of)
    theirs = image_transform_v2(PreprocessCfg(size=64), is_train=False)
    tower = ImageTowerConfig()
    for numbers, pixels in loaded.image_batches(0, 1, 16):
        ours = normalize(pixels, tower.mean, tower.std)
        paths = [found[loaded.image_ids[number].item()][0] for number in numbers]
        assert torch.equal(ours, torch.stack([theirs(Image.open(path)) for path in paths]))
