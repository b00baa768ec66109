"""Every kind of damage is planted once, and found where it is; sound data have no findings."""

import hashlib
import io
import json
import re
import zlib

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from convclip.features.layout import ArraySpec, read_layout
from convclip.features.writer import FeatureWriter
from convclip.video import frame_store
from convclip.video.frame_store import FrameSettings, write_frame_store
from tests.conftest import REPOSITORY
from tests.data import broken_inputs
from tests.data.makers import jpeg, noise_jpeg, picture, sample, write_index, write_shards, write_tar
from tools import check_data


@pytest.fixture
def checked(capsys):
    """(exit code, standard output) of the tool; {kind: count} of its table."""

    def call(address, *more):
        code = check_data.main([str(address), "--workers", "2", *more])
        out = capsys.readouterr().out
        table = out.partition("   count  kind")[2]
        kinds = {kind: int(count) for count, kind in re.findall(r"^ +(\d+)  (\S.*)$", table, re.MULTILINE)}
        assert bool(kinds) == (code == 1)
        return code, out, kinds

    return call


def png(mode, size=(8, 6)):
    stream = io.BytesIO()
    Image.new(mode, size).save(stream, "PNG")
    return stream.getvalue()


def captioned(*captions, number=0, **more):
    return json.dumps({"image_id": number, "captions": list(captions), **more}).encode()


def test_sound_shards_have_no_findings(tmp_path, checked):
    address = write_shards(tmp_path, [3, 4])
    shards = [tmp_path / f"train-00000{n}.tar" for n in range(2)]
    sums = [hashlib.md5(path.read_bytes()).hexdigest() for path in shards]
    write_index(
        tmp_path,
        [
            {"url": path.name, "nsamples": count, "filesize": path.stat().st_size, "md5sum": md5}
            for path, count, md5 in zip(shards, (3, 4), sums, strict=True)
        ],
    )
    code, out, _ = checked(address)
    assert code == 0 and "2 shards, 7 images, 35 captions" in out
    assert "modes: RGB 7; sizes: 40 x 30 7" in out and out.endswith("no findings\n")


def test_each_broken_sample_is_counted_under_its_own_kind(tmp_path, checked):
    whole = noise_jpeg(1)
    samples = {
        "good": {"jpg": noise_jpeg(2), "json": captioned("a", number=1)},
        "cut": {"jpg": whole[: len(whole) // 2], "json": captioned("a", number=2)},
        "none": {"json": captioned("a", number=3)},
        "text": {"jpg": b"no picture", "json": captioned("a", number=4)},
        "blank": {"jpg": noise_jpeg(3), "json": captioned("a", " ", "", number=5)},
        "long": {"jpg": noise_jpeg(4), "json": captioned("a" * 10_001, number=6)},
        "latin": {"jpg": noise_jpeg(5), "txt": b"caf\xe9"},
        "mute": {"jpg": noise_jpeg(6)},
        "grey": {"png": png("L"), "json": captioned("a", number=7)},
        "alpha": {"png": png("RGBA", (9, 9)), "json": captioned("a", number=8)},
    }
    path = write_tar(tmp_path / "0.tar", samples)
    code, out, kinds = checked(path)
    assert code == 1 and "10 images" in out
    assert kinds.pop("caption N is empty") == 2
    assert {kind: count for kind, count in kinds.items() if count != 1} == {}
    words = ("truncated", "no image member", "not an image", "characters, more than N", "not UTF-8", "no json or txt")
    assert len(kinds) == len(words) and all(any(word in kind for kind in kinds) for word in words), kinds
    offset = check_data.ShardTable.of_one(check_data.Shard(str(path), str(path))).image[1, 0]
    assert f"0.tar:cut (image at byte {offset:,}): image file is truncated" in out
    assert path.read_bytes()[offset : offset + 2] == b"\xff\xd8"
    assert "RGB 5" in out and "L 1" in out and "RGBA 1" in out and "9 x 9 1" in out


def test_what_occurs_twice_is_named_with_the_first(tmp_path, checked):
    twin = {"jpg": jpeg(picture(1)), "json": captioned("b", number=7, caption_ids=[701])}
    write_tar(tmp_path / "a" / "0.tar", {"0001": sample(1, 2), "0002": {"jpg": noise_jpeg(), "json": captioned("a")}})
    write_tar(tmp_path / "a" / "1.tar", {"0003": {**twin, "jpg": noise_jpeg(1)}, "0004": twin})
    # Another source may use the same ids; its pictures are compared all the same.
    write_tar(tmp_path / "b" / "0.tar", {"0001": {**sample(1, 2), "jpg": noise_jpeg()}})
    code, out, kinds = checked(f"{tmp_path}/a/{{0,1}}.tar::{tmp_path}/b/0.tar")
    assert code == 1 and kinds == {
        "picture occurs twice, byte for byte": 2,
        "id of an image occurs twice": 1,
        "id of a caption occurs twice": 1,
    }
    assert "1.tar:0004: as in 0.tar:0001" in out and "1.tar:0004: as in 1.tar:0003" in out


def test_a_shard_that_differs_from_its_index(tmp_path, checked):
    path = write_tar(tmp_path / "0.tar", {"0001": sample(1)})
    write_index(tmp_path, [{"url": "0.tar", "nsamples": 2, "filesize": 7, "md5sum": "0" * 32, "ncaptions": [1, 1]}])
    code, out, kinds = checked(path)
    assert code == 1 and kinds == {"shard differs from its index": 3}
    assert "bytes where its index says 7" in out and "1 samples, its index says 2" in out and "has md5sum" in out
    write_index(tmp_path, [{"url": "0.tar", "ncaptions": [4]}])
    code, out, kinds = checked(path)
    assert code == 1 and kinds == {"has N captions, its table says N": 1}


@pytest.mark.parametrize(
    "maker", [broken_inputs.noise_in_a_header, broken_inputs.zeros_in_a_header, broken_inputs.two_tars_in_one]
)
def test_damage_of_a_tar_with_its_byte(maker, tmp_path, checked):
    broken = maker(tmp_path, 0)
    code, out, kinds = checked(broken.address)
    assert code == 1 and kinds["shard is damaged"] == 1 and re.search(broken.message, out)


def test_one_unreadable_shard_is_a_finding_and_all_of_them_an_error(tmp_path, checked, capsys):
    address = broken_inputs.noise_shard(tmp_path, 0).address
    code, out, kinds = checked(address)
    assert code == 1 and kinds == {"shard cannot be read": 1} and "train-000001.tar" in out and "3 images" in out
    for wrong in (tmp_path / "train-000001.tar", tmp_path / "absent-{0..3}.tar", tmp_path, tmp_path / "no.h5"):
        assert check_data.main([str(wrong)]) == 2
        assert capsys.readouterr().err.startswith("check_data: ")
    assert check_data.main([address, "--workers", "0"]) == 2


def test_a_csv_table(tmp_path, checked, monkeypatch):
    monkeypatch.setattr(check_data, "IMAGES_AT_ONCE", 2)
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(picture(number)))
    (tmp_path / "twin.jpg").write_bytes(jpeg(picture(0)))
    rows = b"name;text\n0.jpg;a\n1.jpg;b\n2.jpg;caf\xe9\nlost.jpg;d\ntwin.jpg;e\n0.jpg;\n"
    (tmp_path / "t.csv").write_bytes(rows)
    flags = ["data.csv_separator=;", "data.csv_image_key=name", "data.csv_caption_key=text"]
    code, out, kinds = checked(tmp_path / "t.csv", *(word for flag in flags for word in ("--set", flag)))
    assert code == 1 and "5 images, 6 captions" in out and "t.csv:twin.jpg: as in t.csv:0.jpg" in out
    assert kinds == {
        "caption N is not UTF-8": 1,
        "caption N is empty": 1,
        "No such file or directory": 1,
        "picture occurs twice, byte for byte": 1,
    }


def feature_store(path):
    arrays = {"map": ArraySpec((3,), "bfloat16", "1", "image"), "eot": ArraySpec((), "uint8", "1", "image")}
    writer = FeatureWriter(path, arrays, {"model": "tiny"}, {"image": np.arange(10, 20)}, 0, 1)
    values = torch.arange(30.0).view(10, 3)
    writer.write(np.arange(10, 20), {"map": values.bfloat16(), "eot": torch.arange(10, dtype=torch.uint8)})
    assert writer.finish()


def test_a_feature_store(tmp_path, checked):
    path = tmp_path / "f.h5"
    feature_store(path)
    assert checked(path)[0] == 0
    # The writer refuses such values: planted here, with their checksum.
    layout, data = read_layout(path), bytearray(path.read_bytes())
    place = layout.offsets["arrays/map"] + 4 * 6
    data[place + 2 : place + 4] = b"\x80\x7f"
    checksum = layout.offsets["crc32/map"] + 4 * 4
    data[checksum : checksum + 4] = zlib.crc32(data[place : place + 6]).to_bytes(4, "little")
    path.write_bytes(data)
    code, out, kinds = checked(path)
    assert code == 1 and kinds == {"row of a feature store has values that are not finite": 1}
    assert "20 rows" in out and "array map, row 4 (image 14)" in out
    for row in (2, 7):
        data[layout.offsets["arrays/eot"] + row] ^= 1
    path.write_bytes(data)
    code, out, kinds = checked(path)
    assert code == 1 and kinds["row of a feature store is damaged"] == 2
    assert "array eot, row 2 (image 12)" in out and "array eot, row 7 (image 17)" in out
    with h5py.File(tmp_path / "other.h5", "w"):
        pass
    assert check_data.main([str(tmp_path / "other.h5")]) == 2


def test_a_frame_store(tmp_path, checked, monkeypatch):

    def clip(file, size, frames, fps):
        pixels = torch.full((2, 3, size, size), 50, dtype=torch.uint8)
        return frame_store_clip(frames=pixels, note="")

    class frame_store_clip:
        def __init__(self, frames, note):
            self.frames, self.note = frames, note

    monkeypatch.setattr(frame_store, "read_clip", clip)
    folder = tmp_path / "frames"
    write_frame_store({f"v{n}": tmp_path / f"{n}.mp4" for n in range(3)}, folder, FrameSettings(32, 2))
    code, out, _ = checked(folder)
    assert code == 0 and "1 shards, 3 videos" in out
    tar = folder / "frames-000000.tar"
    whole = tar.read_bytes()
    start, lengths = json.loads((folder / "index.json").read_text())["shards"][0]["videos"]["v1"]
    data = bytearray(whole)
    data[start + 512 + lengths[0] // 2] ^= 1
    tar.write_bytes(data)
    code, out, kinds = checked(folder)
    assert (
        code == 1 and kinds == {"video of a frame store is damaged": 1} and "video v1 is damaged (its checksum" in out
    )
    tar.write_bytes(whole + bytes(512))
    assert checked(folder)[2] == {"tar of a frame store is damaged": 1}
    tar.unlink()
    assert check_data.main([str(folder)]) == 2


def test_what_0_1_0_wrote_is_sound(checked):
    shards = REPOSITORY / "tests" / "fixtures" / "0.1.0" / "shards" / "train-{000000..000001}.tar"
    code, out, _ = checked(shards)
    assert code == 0 and "12 images, 24 captions" in out


@pytest.mark.parametrize("maker", broken_inputs.TRAIN_DATA, ids=lambda maker: maker.__name__)
def test_every_broken_input_is_found_or_refused(maker, tmp_path, checked):
    """What training counts is a finding; what it refuses is one too, or cannot be read; nothing is a traceback."""
    codes = {broken_inputs.REFUSED: (1, 2), broken_inputs.COUNTED: (1,), broken_inputs.RIGHT: (0,)}
    for seed in range(broken_inputs.TRAIN_DATA[maker]):
        folder = tmp_path / str(seed)
        folder.mkdir()
        broken = maker(folder, seed)
        code, out, _ = checked(broken.address)
        assert code in codes[broken.outcome], (seed, broken, out)
