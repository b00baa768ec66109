"""The training stream: exactly once, the same for any number of workers and ranks, and sound with broken members."""

import io
import os
import pickle
import signal
import time
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from convclip.data.loader import TrainLoader
from convclip.data.shard_table import ShardTable
from convclip.data.transforms import TrainTransform
from convclip.data.workers import plain_worker_errors
from convclip.schema import BatchConfig, Data, UserError
from tests.data.makers import GREY_STEP, caption, jpeg, noise_jpeg, picture, read_back, sample, write_shards, write_tar


def _loader(train, tmp_path, global_batch=6, rank=0, world=1, transform=None, seed=0, batch=None, **settings):
    settings = {"workers": 0, "shuffle_shards": 2, "cache_folder": str(tmp_path / "cache"), **settings}
    data = Data(train=str(train), **settings)
    batch = BatchConfig.model_validate({"global": global_batch, **(batch or {})})
    return TrainLoader(data, batch, transform or TrainTransform(16), read_back, rank, world, seed)


def _joined(batches, key):
    return torch.cat([batch[key] for batch in batches])


def _same(ours, theirs):
    assert len(ours) == len(theirs)
    for one, two in zip(ours, theirs, strict=True):
        assert one["broken"] == two["broken"]
        assert all(torch.equal(one[key], two[key]) for key in ("image", "text", "image_id", "caption_id"))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_each_row_once_over_ranks_and_workers(tmp_path, world, workers):
    """22 images in shards of 9, 1, 12 with one to six captions: nothing divides evenly."""
    train = write_shards(tmp_path, [9, 1, 12], captions=lambda image: 1 + image % 6)
    loaders = [_loader(train, tmp_path, rank=rank, world=world, workers=workers) for rank in range(world)]
    everything = {100 * image + number for image in range(22) for number in range(1 + image % 6)}
    assert {loader.rows_per_epoch for loader in loaders} == {len(everything)} == {73}
    for epoch in range(2):
        ranks = [list(loader.epoch(epoch)) for loader in loaders]
        assert {len(batches) for batches in ranks} == {73 // 6}
        assert {len(batch["image"]) for batches in ranks for batch in batches} == {6 // world}
        seen = torch.cat([_joined(batches, "caption_id") for batches in ranks]).tolist()
        # All but the incomplete last global batch, none twice.
        assert len(seen) == len(set(seen)) == 72 and set(seen) <= everything


def test_image_caption_and_ids_belong_together(tmp_path):
    train = write_shards(tmp_path, [20, 20])
    for batch in _loader(train, tmp_path).epoch(0):
        assert batch["image"].dtype == torch.uint8 and batch["image"].shape == (6, 3, 16, 16)
        assert batch["text"].dtype == batch["image_id"].dtype == batch["caption_id"].dtype == torch.int64
        shown = (batch["image"].float().mean((1, 2, 3)) / GREY_STEP).round().long()
        assert torch.equal(shown, batch["image_id"]) and torch.equal(batch["text"][:, 0], batch["image_id"])
        assert torch.equal(100 * batch["image_id"] + batch["text"][:, 1], batch["caption_id"])


def test_five_passes_in_the_stream(tmp_path):
    batches = list(_loader(write_shards(tmp_path, [20, 20]), tmp_path, global_batch=8).epoch(0))
    texts = _joined(batches, "text")
    assert texts[:, 1].tolist() == [number for number in range(5) for _ in range(40)]
    assert all(len(set(batch["image_id"].tolist())) == 8 for batch in batches)


def test_workers_and_worlds_do_not_change_the_stream(tmp_path):
    samples = {f"{number:012d}": {**sample(number), "jpg": noise_jpeg(number)} for number in range(10)}
    train = write_tar(tmp_path / "0.tar", samples)
    make = lambda **settings: list(_loader(train, tmp_path, crop_scale=(0.2, 1.0), **settings).epoch(1))  # noqa: E731
    alone = make()
    _same(make(workers=1), alone)
    _same(make(workers=2), alone)
    two = [make(rank=rank, world=2) for rank in range(2)]
    for key in ("image", "text", "image_id", "caption_id"):
        halves = [torch.cat([left[key], right[key]]) for left, right in zip(*two, strict=True)]
        assert torch.equal(torch.cat(halves), _joined(alone, key))
    # Accumulation cuts a step into more micro batches of the same rows.
    _same_rows = _joined(make(batch={"accumulation": 2}), "image")
    assert torch.equal(_same_rows, _joined(alone, "image"))
    # A row's crop is its own: two epochs show an image differently.
    again = list(_loader(train, tmp_path, crop_scale=(0.2, 1.0)).epoch(2))
    assert not torch.equal(_joined(again, "image").sort(0).values, _joined(alone, "image").sort(0).values)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_the_tail_and_workers_survive_epochs(tmp_path, workers):
    train = write_shards(tmp_path, [7, 8])
    options = {"workers": workers, "batch": {"accumulation": 2}, "captions": "one"}
    loader = _loader(train, tmp_path, global_batch=4, **options)
    whole = list(loader.epoch(3))
    assert len(whole) == 2 * loader.steps_per_epoch == 6
    started = loader.epoch(4)
    next(started)
    # Leaving an epoch in its middle must not leak its batches into the next.
    started.close()
    _same(list(loader.epoch(3)), whole)
    _same(list(_loader(train, tmp_path, global_batch=4, **options).epoch(3, start_step=2)), whole[4:])
    assert list(loader.epoch(3, start_step=3)) == []


def test_one_caption_per_image(tmp_path):
    loader = _loader(write_shards(tmp_path, [9, 9]), tmp_path, captions="one")
    epochs = [list(loader.epoch(epoch)) for epoch in range(4)]
    chosen = [
        dict(zip(_joined(e, "image_id").tolist(), _joined(e, "text")[:, 1].tolist(), strict=True)) for e in epochs
    ]
    assert all(sorted(captions) == list(range(18)) for captions in chosen)
    assert len({captions[0] for captions in chosen}) > 1


def test_leaves_torchs_random_stream_alone(tmp_path):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    for workers in (0, 1):
        list(_loader(write_shards(tmp_path, [6]), tmp_path, workers=workers).epoch(0))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_csv_gives_the_same_kind_of_stream(tmp_path):
    rows = ["filepath,title"]
    for image in range(7):
        picture(image).save(tmp_path / f"{image}.png")
        rows += [f"{image}.png,{caption(image, number)}" for number in range(3)]
    (tmp_path / "train.csv").write_text("\n".join(rows))
    loader = _loader(tmp_path / "train.csv", tmp_path, global_batch=7)
    batches = list(loader.epoch(0))
    assert [sorted(batch["image_id"].tolist()) for batch in batches] == [list(range(7))] * 3
    shown = (_joined(batches, "image").float().mean((1, 2, 3)) / GREY_STEP).round().long()
    assert torch.equal(shown, _joined(batches, "image_id")) and torch.equal(shown, _joined(batches, "text")[:, 0])
    assert "7 images, 21 captions" in loader.describe() and "3 steps per epoch" in loader.describe()


def _huge_png() -> bytes:
    """A header of 60,000 x 60,000 pixels over hardly any data."""
    stream = io.BytesIO()
    Image.new("L", (1, 1)).save(stream, "PNG")
    data = bytearray(stream.getvalue())
    data[16:24] = np.array([60_000, 60_000], dtype=">u4").tobytes()
    data[29:33] = np.array([zlib.crc32(data[12:29])], dtype=">u4").tobytes()
    return bytes(data)


BROKEN = {
    "cut": ({"jpg": noise_jpeg()[:-600]}, "truncated"),
    "empty": ({"jpg": b""}, "zero bytes"),
    "html": ({"jpg": b"<html>404</html>"}, "not an image"),
    "script": ({"jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}, "not an image"),
    "bomb": ({"png": _huge_png(), "jpg": None}, "exceed|decompression bomb"),
    "large": ({"jpg": jpeg(Image.new("L", (1100, 1000)))}, "1100 x 1000 pixels exceed data.max_image_pixels"),
    "nopicture": ({"jpg": None}, "no image member"),
    "nojson": ({"json": None}, "no json or txt"),
    "latin": ({"json": None, "txt": "caf\u00e9".encode("latin-1")}, "not UTF-8"),
    "badjson": ({"json": b'{"captions": ["1 1"'}, "captions cannot be read"),
    "blank": ({"json": b'{"captions": [" "]}'}, "caption 0 is empty"),
}


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_members_are_named_and_replaced(tmp_path, workers):
    samples = {f"good{number:03d}": sample(number, captions=1) for number in range(40)}
    for kind, (members, _) in BROKEN.items():
        members = {**sample(50, captions=1), **members}
        samples[kind] = {suffix: data for suffix, data in members.items() if data is not None}
    train = write_tar(tmp_path / "0.tar", samples)
    settings = {"max_broken_share": 0.5, "max_image_pixels": 1_000_000, "workers": workers}
    loader = _loader(train, tmp_path, global_batch=len(samples), **settings)
    (batch,) = list(loader.epoch(0))
    assert len(batch["image"]) == len(samples) == 51 and set(batch["image_id"].tolist()) == set(range(40))
    named = Counter(message.split(":")[1] for message in batch["broken"])
    assert set(named) == set(BROKEN) and loader.broken == len(batch["broken"]) and loader.seen == 51
    for message in batch["broken"]:
        name = message.split(":")[1]
        assert message.startswith(f"0.tar:{name}: ")
        assert any(reason in message for reason in BROKEN[name][1].split("|")), message
    _same([batch], list(_loader(train, tmp_path, global_batch=len(samples), **settings).epoch(0)))


def test_cut_shard_in_the_stream(tmp_path):
    samples = {f"{number}": {"jpg": noise_jpeg(number), "txt": caption(number, 0).encode()} for number in range(30)}
    train = write_tar(tmp_path / "0.tar", samples)
    cut = int(ShardTable(str(train), Data(cache_folder=str(tmp_path / "cache"))).image[21, 0]) + 100
    train.write_bytes(train.read_bytes()[:cut])
    loader = _loader(train, tmp_path, global_batch=1, max_broken_share=0.5)
    batches = list(loader.epoch(0))
    assert loader.broken == 1 and len(batches) == loader.rows_per_epoch == 22
    assert all(len(batch["image"]) == 1 for batch in batches)


def _half_broken(tmp_path, good=50, bad=3):
    samples = {f"{number}": sample(number % 60, captions=1) for number in range(good)}
    samples |= {f"bad{number}": {"jpg": b"no", "txt": b"1 1"} for number in range(bad)}
    return write_tar(tmp_path / "0.tar", samples)


def test_too_many_broken_stop_the_run(tmp_path):
    message = r"of \d+ samples of .*0.tar are broken.*max_broken_share 0.01"
    # A small set: with the last batch of the epoch.
    with pytest.raises(UserError, match=message):
        next(_loader(_half_broken(tmp_path), tmp_path, global_batch=53).epoch(0))
    # A large one: long before.
    loader = _loader(_half_broken(tmp_path, good=400, bad=100), tmp_path, global_batch=10)
    with pytest.raises(UserError, match=message):
        for _ in loader.epoch(0):
            pass
    assert 100 <= loader.seen <= 120
    assert len(list(_loader(_half_broken(tmp_path), tmp_path, global_batch=53, max_broken_share=0.2).epoch(0))) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_broken_samples(tmp_path, workers):
    loader = _loader(_half_broken(tmp_path, good=0, bad=9), tmp_path, workers=workers)
    with pytest.raises(UserError, match=r"^20 samples in a row are broken, the last is 0.tar:bad\d: not an image$"):
        list(loader.epoch(0))


def _die(image, generator):
    os.kill(os.getpid(), signal.SIGKILL)


def test_dead_worker(tmp_path):
    loader = _loader(write_shards(tmp_path, [6]), tmp_path, workers=1, transform=_die)
    with pytest.raises(UserError, match=r"a data worker died .*lower data.workers"):
        list(loader.epoch(0))


@plain_worker_errors()
def _step_while_a_worker_dies(loader):
    """What torch does when a worker dies: it raises wherever the main process is, here in the step."""
    batches = loader.epoch(0)
    next(batches)
    os.kill(loader._loader._iterator._workers[0].pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        time.sleep(0.01)


def test_a_worker_that_dies_during_a_step(tmp_path):
    loader = _loader(write_shards(tmp_path, [6]), tmp_path, workers=1)
    with pytest.raises(UserError, match=r"^a data worker died .*lower data.workers"):
        _step_while_a_worker_dies(loader)


def test_user_errors(tmp_path):
    with pytest.raises(UserError, match=r"30 rows per epoch, fewer than one global batch.*now 31"):
        _loader(write_shards(tmp_path, [6]), tmp_path, global_batch=31)
    with pytest.raises(UserError, match=r"data.train is not set"):
        TrainLoader(Data(), BatchConfig(), TrainTransform(16), read_back, 0, 1, 0)


def test_dataset_can_be_sent_to_spawned_workers(tmp_path):
    loader = _loader(write_shards(tmp_path, [6]), tmp_path)
    (*_, last) = loader.epoch(0)
    dataset = pickle.loads(pickle.dumps(loader._loader.dataset))
    assert torch.equal(dataset[loader._plan.batches[-1]]["image"], last["image"])
