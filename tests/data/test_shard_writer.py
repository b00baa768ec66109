"""Shards: their bytes and index, read back by others; going on after a stop; what must not be overwritten."""

import hashlib
import io
import json
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from convclip.data.coco import CocoImage, read_coco
from convclip.data.shard_writer import Written, image_members, write_shards
from convclip.schema import UserError

PARAMETERS = {"kind": "image", "resize": None}


@pytest.fixture
def pictures(tmp_path) -> tuple[list[CocoImage], Path]:
    """23 JPEGs of different sizes with one to five captions each; ids in no order."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    images = []
    for number in range(23):
        image_id = (number * 7919) % 100003 + 10 ** (number % 12)
        noise = rng.integers(0, 256, (20 + number, 45 - number, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"p{number}.jpg")
        count = number % 5 + 1
        captions = tuple(f"größe {number} caption {k}" for k in range(count))
        images.append(CocoImage(image_id, f"p{number}.jpg", captions, tuple(range(number * 5, number * 5 + count))))
    return images, folder


def write(pictures, output: Path, **options) -> Written:
    images, folder = pictures
    arguments = {"samples_per_shard": 5, "seed": 0, "parameters": PARAMETERS, **options}
    return write_shards(images, partial(image_members, folder=folder), output, "train", **arguments)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def samples_of(shard: Path) -> list[tuple[str, bytes, dict]]:
    """(key, jpg, json) of a shard in order, by tarfile."""
    with tarfile.open(shard) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    pairs = zip(members[::2], members[1::2], strict=True)
    result = []
    for (jpg_name, jpg), (json_name, about) in pairs:
        assert jpg_name[:-4] == json_name[:-5] and jpg_name.endswith(".jpg") and json_name.endswith(".json")
        result.append((jpg_name[:-4], jpg, json.loads(about)))
    return result


def test_every_sample_stands_once_and_whole(pictures, tmp_path):
    images, folder = pictures
    written = write(pictures, tmp_path / "out")
    assert written.shards == 5 and written.samples == 23 and written.reused == 0 and not written.skipped
    assert written.captions == sum(len(image.captions) for image in images)
    assert sorted(contents(tmp_path / "out")) == [
        *(f"train-{number:06d}.tar" for number in range(5)),
        "train.index.json",
        "train.skipped.jsonl",
    ]
    found = [sample for shard in sorted((tmp_path / "out").glob("*.tar")) for sample in samples_of(shard)]
    by_id = {image.image_id: image for image in images}
    assert sorted(about["image_id"] for _, _, about in found) == sorted(by_id)
    for key, jpg, about in found:
        image = by_id[about["image_id"]]
        assert key == f"{image.image_id:012d}" and len(key) == 12
        assert jpg == (folder / image.file_name).read_bytes()
        assert about["captions"] == list(image.captions) and about["caption_ids"] == list(image.caption_ids)
        assert Image.open(io.BytesIO(jpg)).size == (about["width"], about["height"])
        assert set(about) == {"image_id", "captions", "caption_ids", "width", "height"}


def test_order_is_a_seeded_shuffle_that_ignores_the_order_of_the_annotations(pictures, tmp_path):
    images, folder = pictures
    keys = {}
    for name, listed, seed in (("a", images, 0), ("b", images[::-1], 0), ("c", images, 1)):
        write((listed, folder), tmp_path / name, seed=seed)
        keys[name] = [key for shard in sorted((tmp_path / name).glob("*.tar")) for key, _, _ in samples_of(shard)]
    assert keys["a"] == keys["b"] != keys["c"] and sorted(keys["a"]) == sorted(keys["c"]) != keys["a"]
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_members_are_ustar_without_time_or_owner(pictures, tmp_path):
    write(pictures, tmp_path / "out")
    for shard in (tmp_path / "out").glob("*.tar"):
        raw = shard.read_bytes()
        assert raw[257:265] == b"ustar\x0000" and len(raw) % tarfile.RECORDSIZE == 0
        with tarfile.open(shard) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
                assert member.isfile() and member.mode == 0o644 and not member.pax_headers


def test_the_stream_equals_what_tarfile_writes(pictures, tmp_path):
    """The same members through tarfile.TarFile give the same bytes."""
    write(pictures, tmp_path / "out")
    shard = tmp_path / "out" / "train-000000.tar"
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as ours, tarfile.open(shard) as theirs:
        for member in theirs:
            info = tarfile.TarInfo(member.name)
            info.size = member.size
            ours.addfile(info, theirs.extractfile(member))
    assert stream.getvalue() == shard.read_bytes()


def test_index_tells_the_truth(pictures, tmp_path):
    write(pictures, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "train.index.json").read_text())
    assert index["__kind__"] == "wids-shard-index-v1" and index["wids_version"] == 1
    assert [entry["url"] for entry in index["shardlist"]] == [f"train-{number:06d}.tar" for number in range(5)]
    for entry in index["shardlist"]:
        raw = (tmp_path / "out" / entry["url"]).read_bytes()
        samples = samples_of(tmp_path / "out" / entry["url"])
        assert entry["md5sum"] == hashlib.md5(raw).hexdigest() and entry["filesize"] == len(raw)
        assert entry["nsamples"] == len(samples)
        assert entry["ncaptions"] == [len(about["captions"]) for _, _, about in samples]


def test_plain_webdataset_reads_the_shards(pictures, tmp_path):
    images, _ = pictures
    write(pictures, tmp_path / "out")
    urls = sorted(map(str, (tmp_path / "out").glob("*.tar")))
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert {sample["json"]["image_id"] for sample in read} == {image.image_id for image in images}
    for sample in read:
        assert sample["jpg"].size == (sample["json"]["width"], sample["json"]["height"])
        assert sample["__key__"] == f"{sample['json']['image_id']:012d}"


def test_wids_reads_the_index(pictures, tmp_path, monkeypatch):
    wids = pytest.importorskip("wids", reason="this webdataset release does not bring wids")
    write(pictures, tmp_path / "out")
    dataset = wids.ShardListDataset(str(tmp_path / "out" / "train.index.json"), cache_dir=str(tmp_path / "cache"))
    assert len(dataset) == 23
    keys = [key for shard in sorted((tmp_path / "out").glob("*.tar")) for key, _, _ in samples_of(shard)]
    assert [dataset[number]["__key__"] for number in range(23)] == keys


def test_bytes_do_not_depend_on_the_number_of_workers(pictures, tmp_path):
    for workers in (1, 3):
        write(pictures, tmp_path / str(workers), workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_a_second_run_keeps_whole_shards_and_mends_damaged_ones(pictures, tmp_path):
    out = tmp_path / "out"
    write(pictures, out)
    before = contents(out)
    damaged = bytearray(before["train-000001.tar"])
    damaged[1000] ^= 1
    (out / "train-000001.tar").write_bytes(damaged)
    (out / "train-000002.tar").write_bytes(before["train-000002.tar"][:-10])
    (out / "train-000003.tar").unlink()
    times = {name: (out / name).stat().st_mtime_ns for name in ("train-000000.tar", "train-000004.tar")}
    written = write(pictures, out)
    assert written.reused == 2 and written.samples == 23 and contents(out) == before
    assert times == {name: (out / name).stat().st_mtime_ns for name in times}
    assert write(pictures, out).reused == 5 and contents(out) == before


def test_a_stopped_run_is_gone_on_with(pictures, tmp_path):
    """A failing sample stops the run; half a last journal line and a stale part are what a kill leaves besides."""
    images, folder = pictures
    write(pictures, tmp_path / "whole")
    out = tmp_path / "out"
    stop_at = samples_of(tmp_path / "whole" / "train-000003.tar")[2][2]["image_id"]

    def failing(image: CocoImage) -> dict[str, bytes]:
        if image.image_id == stop_at:
            raise KeyboardInterrupt
        return image_members(image, folder)

    with pytest.raises(KeyboardInterrupt):
        write_shards(images, failing, out, "train", PARAMETERS, samples_per_shard=5)
    assert sorted(contents(out)) == [*(f"train-{number:06d}.tar" for number in range(3)), "train.index.json.part"]
    journal = out / "train.index.json.part"
    journal.write_text(journal.read_text()[:-30])
    (out / "train-000003.tar.4242.part").write_bytes(b"half")
    written = write(pictures, out)
    assert written.reused == 2 and contents(out) == contents(tmp_path / "whole")


def test_other_parameters_are_refused_by_name(pictures, tmp_path):
    images, folder = pictures
    out = tmp_path / "out"
    write(pictures, out)
    before = contents(out)
    for options, message in (
        ({"samples_per_shard": 7}, "samples_per_shard 5 where this run has 7"),
        ({"seed": 3}, "seed 0 where this run has 3"),
        ({"parameters": {**PARAMETERS, "resize": 64}}, "resize None where this run has 64"),
    ):
        with pytest.raises(UserError, match=message):
            write(pictures, out, **options)
    with pytest.raises(UserError, match=r"samples \w{16} where this run has \w{16}"):
        write((images[1:], folder), out)
    assert contents(out) == before
    write_shards(images, partial(image_members, folder=folder), out, "val", PARAMETERS)
    assert before.items() <= contents(out).items()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"shardlist": []}', '{"parameters": {}, "shardlist": [5]}'])
def test_foreign_records_and_shards_are_not_overwritten(pictures, tmp_path, text):
    out = tmp_path / "out"
    out.mkdir()
    (out / "train-000000.tar").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"holds train-000000.tar but no record"):
        write(pictures, out)
    (out / "train.index.json").write_text(text)
    with pytest.raises(UserError, match=r"train\.index\.json is not a record"):
        write(pictures, out)
    assert (out / "train-000000.tar").read_bytes() == b"mine"


def test_unusable_pictures_are_left_out_counted_and_named(pictures, tmp_path):
    images, folder = pictures
    (folder / "p3.jpg").write_bytes(b"")
    (folder / "p4.jpg").write_bytes((folder / "p4.jpg").read_bytes()[:-50])
    (folder / "p5.jpg").write_text("no picture")
    before = [{"image_id": 1, "file_name": "x.jpg", "reason": "no captions"}]
    written = write(pictures, tmp_path / "out", skipped=before)
    reasons = {line["file_name"]: line["reason"] for line in written.skipped}
    assert reasons == {
        "x.jpg": "no captions",
        "p3.jpg": "empty file",
        "p4.jpg": "broken image: image file is truncated",
        "p5.jpg": "not an image",
    }
    lines = (tmp_path / "out" / "train.skipped.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == written.skipped
    found = [about for shard in (tmp_path / "out").glob("*.tar") for _, _, about in samples_of(shard)]
    ids = {image.image_id for image in images if image.file_name not in reasons}
    assert {about["image_id"] for about in found} == ids and written.samples == 20 == len(found)
    assert write(pictures, tmp_path / "out", skipped=before).skipped == written.skipped


def test_nothing_is_left_where_every_sample_is_unusable(pictures, tmp_path):
    _, folder = pictures
    for path in folder.iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"no sample to write: 23 skipped \(23 empty file\)"):
        write(pictures, tmp_path / "out")
    assert contents(tmp_path / "out") == {}
    with pytest.raises(UserError, match="no sample to write: there are none"):
        write(([], folder), tmp_path / "out")


@pytest.mark.parametrize("split", ["", "a/b", "../x", "train val", "größe"])
def test_split_must_be_a_file_name(pictures, tmp_path, split):
    images, folder = pictures
    with pytest.raises(UserError, match="split"):
        write_shards(images, partial(image_members, folder=folder), tmp_path / "out", split, PARAMETERS)


def test_big_samples_cross_the_block_size(tmp_path):
    """Members larger than the block that is written at a time, and a shard of one sample."""
    big = {"jpg": bytes(range(256)) * 20_000, "json": b"{}"}
    images = [CocoImage(number, "x", ("c",), (number,)) for number in range(3)]
    write_shards(images, lambda _: big, tmp_path, "train", {}, samples_per_shard=2)
    entries = json.loads((tmp_path / "train.index.json").read_text())["shardlist"]
    for entry, count in zip(entries, (2, 1), strict=True):
        samples = [(jpg, about) for _, jpg, about in samples_of(tmp_path / entry["url"])]
        assert samples == [(big["jpg"], {})] * count
        assert entry["md5sum"] == hashlib.md5((tmp_path / entry["url"]).read_bytes()).hexdigest()


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("name", "split", "resize"), [("coco", "train2017", None), ("coco", "val2017", 256), ("flickr8k", "val", None)]
)
def test_real_pictures(realdata, tmp_path, name, split, resize):
    folder = realdata / name / split
    images = read_coco(realdata / name / "annotations" / f"captions_{split}.json")
    members_of = partial(image_members, folder=folder, shorter_side=resize)
    written = write_shards(images, members_of, tmp_path, split, {}, samples_per_shard=100)
    assert written.samples == len(images) and not written.skipped
    by_id = {image.image_id: image for image in images}
    for shard in tmp_path.glob("*.tar"):
        for _, jpg, about in samples_of(shard):
            image = by_id[about["image_id"]]
            original = (folder / image.file_name).read_bytes()
            if resize is None:
                assert jpg == original
            else:
                assert min(about["width"], about["height"]) == 256 and len(jpg) < len(original)
                assert Image.open(io.BytesIO(jpg)).size == (about["width"], about["height"])
            assert tuple(about["captions"]) == image.captions
