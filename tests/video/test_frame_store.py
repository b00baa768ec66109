"""The frame store: what is read is what was decoded; killed, repeated, repaired and mismatched writing."""

import json
import os
import pickle
import shutil
import signal
import tarfile

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from test_decode import write_video

from convclip.locks import Lock
from convclip.schema import UserError
from convclip.video import frame_store
from convclip.video.decode import read_clip
from convclip.video.frame_store import FrameSettings, FrameStore, write_frame_store

SMALL = FrameSettings(size=32, frames=4)


@pytest.fixture
def videos(tmp_path):
    """Five good clips of 1..5 seconds, one empty file, one that is not there."""
    folder = tmp_path / "videos"
    folder.mkdir()
    found = {f"video{n}": write_video(folder / f"video{n}.mp4", range(n)) for n in range(1, 6)}
    (folder / "empty.mp4").touch()
    found["empty"] = folder / "empty.mp4"
    found["gone"] = folder / "gone.mp4"
    return found


def test_what_is_read_is_what_was_decoded(videos, tmp_path):
    report = write_frame_store(videos, tmp_path / "store", SMALL, videos_per_shard=3)
    assert (report.decoded, report.reused) == (5, 0)
    assert report.skipped == {"empty": "the file is empty", "gone": "no such file"}
    store = FrameStore(tmp_path / "store", size=32, frames=4)
    assert list(store) == [f"video{n}" for n in range(1, 6)] and len(store) == 5 and "empty" not in store
    for name in store:
        frames, n = store[name]
        # Zero frames stand behind the real ones.
        real = read_clip(videos[name], size=32, frames=4).frames
        expected = torch.cat([real, real.new_zeros(4 - len(real), 3, 32, 32)])
        assert n == len(real) and frames.dtype == torch.uint8 and frames.shape == (4, 3, 32, 32)
        # JPEG of an even picture is off by a level at most.
        assert (frames.int() - expected.int()).abs().max() <= 1
        assert (frames[n:] == 0).all()
    with pytest.raises(UserError, match="no video empty: the file is empty"):
        store["empty"]
    with pytest.raises(UserError, match="no video other: it was not among"):
        store["other"]


def test_the_shards_are_plain_webdataset(videos, tmp_path):
    write_frame_store(videos, tmp_path / "store", SMALL)
    store = FrameStore(tmp_path / "store")
    samples = list(
        webdataset.WebDataset(str(tmp_path / "store" / "frames-000000.tar"), shardshuffle=False).decode("pil")
    )
    assert [sample["__key__"] for sample in samples] == list(store)
    for sample in samples:
        frames, n = store[sample["__key__"]]
        assert sample["json"] == {"video_id": sample["__key__"], "n_frames": n}
        for i in range(n):
            assert np.array_equal(np.asarray(sample[f"{i:02d}.jpg"]), frames[i].permute(1, 2, 0).numpy())


def test_a_second_run_decodes_nothing_and_a_killed_one_only_what_is_missing(videos, tmp_path, monkeypatch):
    folder = tmp_path / "store"
    decode, calls = frame_store.read_clip, []

    def counted(path, *arguments):
        calls.append(path)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return decode(path, *arguments)

    monkeypatch.setattr(frame_store, "read_clip", counted)
    with pytest.raises(KeyboardInterrupt):
        write_frame_store(videos, folder, SMALL, videos_per_shard=2)
    # The second shard was whole; of the third there is only a part, and no index says the store is ready.
    with pytest.raises(UserError, match="was writing finished"):
        FrameStore(folder)
    report = write_frame_store(videos, folder, SMALL, videos_per_shard=2)
    assert (report.reused, report.decoded) == (4, 1) and len(calls) == 5 + 3
    again = write_frame_store(videos, folder, SMALL, videos_per_shard=2)
    assert (again.reused, again.decoded, again.skipped) == (5, 0, report.skipped) and len(calls) == 8
    assert not list(folder.glob("*.part"))
    whole = tmp_path / "whole"
    write_frame_store(videos, whole, SMALL, videos_per_shard=2)
    for path in sorted(folder.iterdir()):
        assert path.read_bytes() == (whole / path.name).read_bytes(), path.name


def test_a_folder_has_one_writer_at_a_time(videos, tmp_path):
    """Also where the writer before was killed as it began: its lock file alone does not make the folder another's."""
    folder = tmp_path / "store"
    folder.mkdir()
    reading, writing = os.pipe()
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            Lock(folder / frame_store.LOCK, folder).acquire()
            os.write(tell, b".")
            os.read(reading, 1)
        finally:
            os._exit(1)
    assert os.read(told, 1)
    with pytest.raises(UserError, match=rf"{folder}: another process is writing it \(.*, pid {child}, "):
        write_frame_store(videos, folder, SMALL)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for descriptor in (reading, writing, told, tell):
        os.close(descriptor)
    assert [path.name for path in folder.iterdir()] == [frame_store.LOCK]
    (folder / "plan.json.part").write_bytes(b"{")
    assert write_frame_store(videos, folder, SMALL).decoded == 5
    (folder / "plan.json.part").unlink()
    (folder / "frames-000000.tar.part").write_bytes(b"half")  # as convclip 0.1.0 left it
    assert write_frame_store(videos, folder, SMALL).reused == 5
    assert not [path.name for path in folder.iterdir() if "lock" in path.name or "part" in path.name]


def test_a_repaired_file_is_picked_up(videos, tmp_path):
    folder = tmp_path / "store"
    write_frame_store(videos, folder, SMALL, videos_per_shard=3)
    shutil.copy(videos["video3"], videos["gone"])
    report = write_frame_store(videos, folder, SMALL, videos_per_shard=3)
    assert (report.reused, report.decoded) == (5, 1) and "gone" not in report.skipped
    assert FrameStore(folder)["gone"][1] == 3


def test_other_settings_videos_or_folders_are_refused(videos, tmp_path):
    folder = tmp_path / "store"
    write_frame_store(videos, folder, SMALL)
    with pytest.raises(UserError, match=r"size 32 \(asked for 64\)"):
        write_frame_store(videos, folder, FrameSettings(size=64, frames=4))
    with pytest.raises(UserError, match=r"videos 7 \(asked for 6\)"):
        write_frame_store({k: v for k, v in videos.items() if k != "gone"}, folder, SMALL)
    with pytest.raises(UserError, match="has frames 4, the recipe needs 12"):
        FrameStore(folder, size=32, frames=12)
    with pytest.raises(UserError, match="not empty and no frame store"):
        write_frame_store(videos, videos["empty"].parent, SMALL)
    with pytest.raises(UserError, match=r"'a\.b' cannot name"):
        write_frame_store({"a.b": "x.mp4"}, tmp_path / "new", SMALL)
    with pytest.raises(UserError, match="none of 2 videos can be used; empty: the file is empty"):
        write_frame_store({k: videos[k] for k in ("empty", "gone")}, tmp_path / "bad", SMALL)
    with pytest.raises(UserError, match="no frame store at"):
        FrameStore(tmp_path / "nothing")


def test_damage_to_a_store_is_named(videos, tmp_path):
    folder = tmp_path / "store"
    write_frame_store(videos, folder, SMALL)
    tar = folder / "frames-000000.tar"
    data = tar.read_bytes()
    tar.write_bytes(data[:2000])
    with pytest.raises(UserError, match="video video5 is damaged"):
        FrameStore(folder)["video5"]
    tar.unlink()
    with pytest.raises(UserError, match=r"lacks 1 of its shards, the first is frames-000000\.tar"):
        FrameStore(folder)
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "version": 99}))
    with pytest.raises(UserError, match="version 99"):
        FrameStore(folder)


def test_damaged_tars_and_entries_are_written_again(videos, tmp_path):
    folder, good = tmp_path / "store", tmp_path / "good"
    write_frame_store(videos, folder, SMALL)
    shutil.copytree(folder, good)
    tar, entry = folder / "frames-000000.tar", folder / "frames-000000.json"
    data, about = tar.read_bytes(), json.loads(entry.read_text())
    flipped = bytearray(data)
    start, lengths = about["videos"]["video3"]
    # In the compressed pixels, where JPEG notices nothing.
    flipped[start + 512 + lengths[0] - 40] ^= 1
    tar.write_bytes(flipped)
    with pytest.raises(UserError, match=r"video3 is damaged \(its checksum differs\): the same make_shards command"):
        FrameStore(folder)["video3"]
    for damaged in (bytes(flipped), data[:2000], data[:-600], data + b"x" * 512, b""):
        tar.write_bytes(damaged)
        assert write_frame_store(videos, folder, SMALL).decoded == 5
        assert tar.read_bytes() == data
    for text in ("", "[]", "{}", "\0", '{"file": 3}', json.dumps({**about, "videos": []}), "[" * 100_000):
        entry.write_text(text)
        assert write_frame_store(videos, folder, SMALL).decoded == 5
    assert all(path.read_bytes() == (good / path.name).read_bytes() for path in folder.iterdir())
    # As 0.1.0 wrote it: read and kept without checksums, a cut one found by its end.
    old = {key: value for key, value in about.items() if key not in ("crc32", "filesize")}
    entry.write_text(json.dumps(old))
    assert write_frame_store(videos, folder, SMALL).reused == 5 and FrameStore(folder)["video3"][1] == 3
    tar.write_bytes(data[: start + 600])
    assert write_frame_store(videos, folder, SMALL).decoded == 5


def test_an_index_of_any_other_shape_is_one_line(videos, tmp_path):
    folder = tmp_path / "store"
    write_frame_store({"video2": videos["video2"]}, folder, SMALL)
    index = json.loads((folder / "index.json").read_text())
    shard, settings = index["shards"][0], index["settings"]
    wrong_shards = [
        {**shard, key: value}
        for key in shard
        for value in (None, 3, [3], {"video2": None}, {"video2": "x"})
        if not (key == "filesize" and value in (None, 3))
        and (key, value) != ("skipped", {"video2": "x"})
        and (key, value) != ("notes", {"video2": "x"})
    ]
    wrong_shards += [{**shard, "file": name} for name in ("../x.tar", "/etc/passwd", "")]
    wrong_shards += [{**shard, "videos": {"video2": [0, lengths]}} for lengths in ([], [-1], [1] * 9, [2**40], "a", {})]
    wrong_shards += [{k: v for k, v in shard.items() if k != key} for key in ("file", "videos", "skipped")]
    bad = {"size": 10**9, "frames": -1, "fps": "fast", "quality": None}
    contents = [{**index, "shards": [wrong]} for wrong in wrong_shards]
    contents += [{**index, "settings": {**settings, key: value}} for key, value in bad.items()]
    contents += [{**index, key: value} for key in index for value in (None, [3], "x", {"a": 1})]
    contents += [[], 3, None, {}, {"version": 1}, {**index, "settings": {**settings, "fps": float("inf")}}]
    for content in contents:
        (folder / "index.json").write_text(json.dumps(content))
        with pytest.raises(UserError) as error:
            FrameStore(folder)["video2"]
        assert "\n" not in str(error.value)
    for data in (b"", b"\xff\x00", b"[" * 100_000):
        (folder / "index.json").write_bytes(data)
        with pytest.raises(UserError, match="not JSON"):
            FrameStore(folder)
        (folder / "plan.json").write_bytes(data or b"[]")
        with pytest.raises(UserError, match=r"plan"):
            write_frame_store({"video2": videos["video2"]}, folder, SMALL)


def test_a_damaged_video_is_noted(tmp_path):
    path = write_video(tmp_path / "a.mkv", range(6))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * 0.7)])
    report = write_frame_store({"a": path}, tmp_path / "store", SMALL)
    assert report.decoded == 1 and list(report.notes) == (["a"] if read_clip(path, 32, 4).note else [])


def test_a_store_goes_to_workers(videos, tmp_path):
    write_frame_store(videos, tmp_path / "store", SMALL)
    store = FrameStore(tmp_path / "store")
    frames, n = store["video2"]
    copy = pickle.loads(pickle.dumps(store))
    assert copy["video2"][1] == n and torch.equal(copy["video2"][0], frames)


def test_places_in_the_index_are_those_of_the_tar(videos, tmp_path):
    write_frame_store(videos, tmp_path / "store", SMALL)
    store = FrameStore(tmp_path / "store")
    with tarfile.open(tmp_path / "store" / "frames-000000.tar") as tar:
        members = {member.name: member for member in tar}
    for name, (_, start, lengths) in store.places.items():
        assert members[f"{name}.00.jpg"].offset == start
        assert [members[f"{name}.{i:02d}.jpg"].size for i in range(len(lengths))] == lengths


@pytest.mark.realdata
def test_real_videos_in_parallel_equal_one_process(realdata, tmp_path):
    folder = realdata / "msrvtt" / "VideoData"
    videos = {path.stem: path for path in sorted(folder.iterdir())[:12]}
    settings = FrameSettings(size=64)
    report = write_frame_store(videos, tmp_path / "two", settings, workers=2, videos_per_shard=6)
    assert report.decoded == 12 and not report.skipped and not report.notes
    write_frame_store(videos, tmp_path / "one", settings, videos_per_shard=6)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    store = FrameStore(tmp_path / "one")
    for name, path in videos.items():
        frames, n = store[name]
        live = read_clip(path, size=64).frames
        assert n == len(live) and (frames[:n].float() - live.float()).abs().mean() < 3
        assert Image.fromarray(frames[0].permute(1, 2, 0).numpy()).size == (64, 64)
