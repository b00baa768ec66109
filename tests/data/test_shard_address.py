"""Addresses of shards: what is found, what is fetched, and what is refused at start."""

import hashlib
import multiprocessing
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from convclip.data.shards import find_shards
from convclip.schema import Data, UserError
from tests.data.makers import write_index, write_shards


@pytest.fixture
def data(tmp_path):
    return Data(cache_folder=str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    write_shards(tmp_path / "shards", [2, 3, 1])
    return tmp_path / "shards"


def _names(shards):
    return [Path(shard.path).name for shard in shards]


def test_patterns(folder, data):
    expected = [f"train-{number:06d}.tar" for number in range(3)]
    (folder / "train-000000_stats.json").write_text("{}")
    (folder / "train-000000.parquet").write_text("")
    assert _names(find_shards(f"{folder}/train-{{000000..000002}}.tar", data)) == expected
    assert _names(find_shards(f"{folder}/train-*", data)) == expected
    one, two = f"{folder}/train-000002.tar", f"{folder}/train-000000.tar"
    assert _names(find_shards(f"{one}::{two}", data)) == [expected[2], expected[0]]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("train-{000000..000004}.tar", r"2 of 5 shards .* are missing, the first is .*train-000003.tar"),
        ("none-*.tar", "no .tar file matches"),
        ("train-{000000..", "unbalanced braces"),
        ("", r"is a folder: name its shards, as in .*\*\.tar"),
        ("train-000000.tar.gz", "must not be compressed"),
        ("train-000000.tar::{0}/train-000000.tar", "listed twice"),
        ("train.index.json", "does not exist"),
    ],
)
def test_mistakes_show_at_start(folder, data, pattern, message):
    with pytest.raises(UserError, match=message):
        find_shards(f"{folder}/{pattern.format(folder)}" if "::" in pattern else f"{folder}/{pattern}", data)


def test_index_beside_or_as_the_address(folder, data):
    shard = folder / "train-000001.tar"
    entry = {"url": shard.name, "nsamples": 3, "filesize": shard.stat().st_size, "ncaptions": [5, 5, 5]}
    index = write_index(folder, [entry])
    (found,) = find_shards(str(index), data)
    assert (found.path, found.nsamples, found.ncaptions) == (str(shard), 3, (5, 5, 5))
    assert [shard.nsamples for shard in find_shards(f"{folder}/*.tar", data)] == [None, 3, None]

    shard.write_bytes(shard.read_bytes()[:-700])
    with pytest.raises(UserError, match=r"train-000001.tar has \d+ bytes where its index says"):
        find_shards(f"{folder}/*.tar", data)


@pytest.mark.parametrize(
    "text", ["{", '{"__kind__": "other"}', '{"__kind__": "wids-shard-index-v1", "shardlist": [{}]}']
)
def test_bad_index(folder, data, text):
    (folder / "train.index.json").write_text(text)
    with pytest.raises(UserError, match=r"train.index.json"):
        find_shards(f"{folder}/*.tar", data)


def test_pipe_needs_permission(folder, data, tmp_path):
    command = f"pipe:touch {tmp_path}/ran; cat {folder}/train-000000.tar"
    index = write_index(tmp_path, [{"url": command, "nsamples": 2, "filesize": 10240}])
    for address in (command, str(index)):
        with pytest.raises(UserError, match=r"runs a shell command: set data.allow_pipe"):
            find_shards(address, data)
    assert not (tmp_path / "ran").exists()
    (shard,) = find_shards(command, data.model_copy(update={"allow_pipe": True}))
    assert (tmp_path / "ran").exists()
    assert Path(shard.path).read_bytes() == (folder / "train-000000.tar").read_bytes()


def test_file_url_is_read_once(folder, data, tmp_path):
    address = f"file:{folder}/train-{{000000..000001}}.tar"
    first = find_shards(address, data)
    originals = [(folder / f"train-{number:06d}.tar").read_bytes() for number in range(2)]
    for path in folder.glob("*.tar"):
        path.unlink()
    again = find_shards(address, data)
    assert again == first and [Path(shard.path).read_bytes() for shard in again] == originals
    assert not list((tmp_path / "cache").rglob("*.part"))


def _fetch(address, data, _):
    return find_shards(address, data)[0].path


def test_processes_fetch_a_shard_once(folder, data, tmp_path):
    command = f"pipe:echo once >> {tmp_path}/runs; sleep 0.2; cat {folder}/train-000000.tar"
    with multiprocessing.get_context("fork").Pool(3) as pool:
        paths = pool.map(partial(_fetch, command, data.model_copy(update={"allow_pipe": True})), range(3))
    assert len(set(paths)) == 1 and (tmp_path / "runs").read_text() == "once\n"


@pytest.fixture
def server(folder):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_http(server, folder, data, tmp_path):
    shards = find_shards(f"{server}/train-{{000000..000002}}.tar", data)
    assert [Path(s.path).read_bytes() for s in shards] == [p.read_bytes() for p in sorted(folder.glob("*.tar"))]
    with pytest.raises(UserError, match=r"shard http.*train-000009.tar cannot be fetched"):
        find_shards(f"{server}/train-000009.tar", data)
    right = hashlib.md5((folder / "train-000000.tar").read_bytes()).hexdigest()
    entries = [{"url": f"{server}/train-000000.tar?again={md5sum}", "md5sum": md5sum} for md5sum in (right, "0" * 32)]
    find_shards(str(write_index(tmp_path, entries[:1])), data)
    with pytest.raises(UserError, match="md5sum"):
        find_shards(str(write_index(tmp_path, entries)), data)
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_unknown_scheme(data):
    with pytest.raises(UserError, match=r"shard s3://bucket/a.tar cannot be fetched"):
        find_shards("s3://bucket/a.tar", data)
