"""Random access into shards, against webdataset's own sequential reading."""

import json
import pickle
import tarfile
from functools import partial

import pytest
import webdataset

from convclip.data import shard_writer
from convclip.data.coco import CocoImage
from convclip.data.samples import BrokenSample
from convclip.data.shard_table import ShardTable
from convclip.schema import Data, UserError
from tests.data.makers import caption, jpeg, noise_jpeg, picture, sample, write_index, write_shards, write_tar


@pytest.fixture
def data(tmp_path):
    return Data(cache_folder=str(tmp_path / "cache"))


def test_our_shards_as_webdataset_reads_them(tmp_path, data):
    pattern = write_shards(tmp_path, [3, 4], captions=lambda image: 1 + image % 7)
    table = ShardTable(pattern, data)
    theirs = list(webdataset.WebDataset(pattern, shardshuffle=False, empty_check=False))
    assert len(theirs) == len(table.key) == 7
    assert table.counts.tolist() == [1, 2, 3, 4, 5, 6, 7] and table.shard.tolist() == [0] * 3 + [1] * 4
    # Backwards: random access has no order.
    for number in reversed(range(7)):
        assert table.read_image(number) == theirs[number]["jpg"]
        stored, content = table.read_captions(number), json.loads(theirs[number]["json"])
        assert (stored.image_id, stored.texts, stored.ids) == tuple(
            content[key] for key in ("image_id", "captions", "caption_ids")
        )
        assert table.name(number) == f"train-{number // 3 if number < 3 else 1:06d}.tar:{number:012d}"
    assert table.describe() == "2 shards, 7 images, 28 captions"
    assert pickle.loads(pickle.dumps(table)).read_image(5) == theirs[5]["jpg"]


def test_what_our_writer_wrote(tmp_path, data):
    images = []
    for number in range(5):
        captions = tuple(caption(number, k) for k in range(1 + number))
        images.append(CocoImage(7 * number, f"{number}.jpg", captions, tuple(range(9, 10 + number))))
        (tmp_path / f"{number}.jpg").write_bytes(noise_jpeg(number))
    members = partial(shard_writer.image_members, folder=tmp_path)
    shard_writer.write_shards(images, members, tmp_path / "out", "train", {}, samples_per_shard=2)
    table = ShardTable(str(tmp_path / "out" / "train-{000000..000002}.tar"), data)
    assert table.shards[0].ncaptions == tuple(table.counts[:2])
    read = {table.read_captions(number).image_id: number for number in range(5)}
    for number, image in enumerate(images):
        stored = table.read_captions(read[image.image_id])
        assert (stored.texts, stored.ids) == (list(image.captions), list(image.caption_ids))
        assert table.read_image(read[image.image_id]) == noise_jpeg(number)


def test_img2dataset_shards(tmp_path, data):
    stats = {"count": 2, "status_dict": {"success": 2}}
    for shard in range(2):
        samples = {}
        for number in range(2):
            text = f"picture {shard} {number}"
            content = {
                "caption": text,
                "url": "https://example.org/x.jpg",
                "key": "0",
                "status": "success",
                "width": 40,
            }
            members = {"jpg": jpeg(picture(number)), "txt": text.encode(), "json": json.dumps(content).encode()}
            samples[f"{shard:05d}{number:04d}"] = members
        write_tar(tmp_path / f"{shard:05d}.tar", samples)
        (tmp_path / f"{shard:05d}_stats.json").write_text(json.dumps(stats))
    table = ShardTable(f"{tmp_path}/{{00000..00001}}.tar", data)
    assert [table.read_captions(number).texts for number in range(4)] == [
        [f"picture {shard} {number}"] for shard in range(2) for number in range(2)
    ]
    assert [table.read_captions(number).image_id for number in range(4)] == [0, 1, 2, 3]


def test_karpathy_and_text_shards(tmp_path, data):
    texts = ["a dog", "one dog", "the dog\u00e9"]
    write_tar(
        tmp_path / "0.tar",
        {
            "s0000000": {"jpg": noise_jpeg(), "json": json.dumps({"captions": texts, "cocoid": 7}).encode()},
            "s0000001": {"jpg": noise_jpeg(), "txt": "\n".join(texts).encode() + b"\r\n"},
            "s0000002": {"png": noise_jpeg(), "txt": b"only one", "json": b'{"width": 3}', "cls": b"4"},
        },
    )
    table = ShardTable(f"{tmp_path}/0.tar", data)
    assert table.counts.tolist() == [3, 3, 1]
    assert [table.read_captions(number).texts for number in range(3)] == [texts, texts, ["only one"]]
    assert [table.read_captions(number).ids for number in range(3)] == [[0, 1, 2], [3, 4, 5], [6]]


def test_tars_of_plain_tar(tmp_path, data):
    """Folders, long names, links and AppleDouble files, all images before all captions."""
    folder = tmp_path / "files" / ("long" * 40)
    folder.mkdir(parents=True)
    for number in range(2):
        (folder / f"{number}.JPG").write_bytes(noise_jpeg(number))
        (folder / f"{number}.txt").write_text(f"caption {number}")
    (folder / "._0.jpg").write_bytes(b"resource fork")
    (folder / "2.jpg").symlink_to("/etc/hostname")
    with tarfile.open(tmp_path / "plain.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        archive.add(folder, arcname=folder.name, recursive=False)
        for path in sorted(folder.iterdir(), key=lambda path: (path.suffix, path.name)):
            archive.add(path, arcname=f"{folder.name}/{path.name}")
    table = ShardTable(f"{tmp_path}/plain.tar", data)
    assert [table.read_captions(number).texts for number in range(len(table.key))] == [["caption 0"], ["caption 1"]]
    assert table.read_image(1) == noise_jpeg(1)


def test_tables_are_kept_until_the_shard_changes(tmp_path, data, monkeypatch):
    pattern = write_shards(tmp_path, [3, 2])
    first = ShardTable(pattern, data)
    with monkeypatch.context() as patch:
        patch.setattr("convclip.data.shard_table.scan_shard", lambda shard: pytest.fail("headers were read again"))
        again = ShardTable(pattern, data)
    assert again.image.tolist() == first.image.tolist() and again.key.tolist() == first.key.tolist()

    write_tar(tmp_path / "train-000000.tar", {"000000000009": sample(9, 2)})
    assert ShardTable(pattern, data).counts.tolist() == [2, 5, 5]
    for kept in (tmp_path / "cache").rglob("*.npz"):
        kept.write_bytes(b"cut")
    assert ShardTable(pattern, data).counts.tolist() == [2, 5, 5]


def test_cache_folder_that_cannot_be_written(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    table = ShardTable(write_shards(tmp_path, [2]), Data(cache_folder=str(tmp_path / "file")))
    assert len(table.key) == 2 and "set data.cache_folder" in caplog.text


def test_index_counts_save_reading_the_captions(tmp_path, data):
    pattern = write_shards(tmp_path, [2])
    write_index(tmp_path, [{"url": "train-000000.tar", "nsamples": 2, "ncaptions": [5, 4]}])
    table = ShardTable(pattern, data)
    assert table.counts.tolist() == [5, 4]
    assert table.read_captions(1).texts == [caption(1, number) for number in range(5)]
    write_index(tmp_path, [{"url": "train-000000.tar", "nsamples": 3}])
    with pytest.raises(UserError, match=r"train-000000.tar holds 2 samples, its index says 3"):
        ShardTable(pattern, data)


@pytest.mark.parametrize("cut", [100, 700, 1500])
def test_cut_shard_keeps_what_is_whole(tmp_path, data, caplog, cut):
    path = write_tar(tmp_path / "0.tar", {f"{number}": {"jpg": noise_jpeg(number), "txt": b"x"} for number in range(3)})
    whole = ShardTable(str(path), data)
    path.write_bytes(path.read_bytes()[: int(whole.image[2, 0]) + cut])
    for _ in range(2):
        caplog.clear()
        table = ShardTable(str(path), data)
        assert "0.tar ends without its end-of-archive mark" in caplog.text
    assert [table.read_image(number) == noise_jpeg(number) for number in range(2)] == [True, True]
    assert len(table.key) == 3 and table.counts.tolist() == [1, 1, 1]
    with pytest.raises(BrokenSample, match=r"0.tar:2: the shard ends inside this member"):
        table.read_image(2)
    with pytest.raises(BrokenSample, match="no json or txt"):
        table.read_captions(2)


@pytest.mark.parametrize("content", [b"", b"no tar file at all" * 100, b"\x00" * 10240])
def test_not_a_tar(tmp_path, data, content):
    (tmp_path / "0.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"no readable tar file|hold no samples"):
        ShardTable(f"{tmp_path}/0.tar", data)


@pytest.mark.parametrize(
    "text",
    [
        {"json": b"\xff\xfe"},
        {"json": b"{"},
        {"json": b"[1]"},
        {"json": b'{"captions": "one"}'},
        {"json": b'{"captions": [1]}'},
        {"json": ("[" * 100_000).encode()},
        {"txt": "caf\u00e9".encode("latin-1")},
    ],
)
def test_unreadable_captions_break_their_sample_only(tmp_path, data, text):
    path = write_tar(tmp_path / "0.tar", {"a": {"jpg": noise_jpeg(), **text}, "b": sample(1)})
    table = ShardTable(str(path), data)
    assert table.counts.tolist() == [1, 5]
    with pytest.raises(BrokenSample, match=r"0.tar:a: "):
        table.read_captions(0)
    assert len(table.read_captions(1).texts) == 5
