"""Broken inputs as data: each function writes one broken thing into a folder and says what must come of it.

REFUSED: one line (UserError) before the first step. COUNTED: read, and every lost sample is in the broken list or the
damage of the source. RIGHT: read as if nothing were wrong. Used here, and by any campaign over many seeds.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.data.makers import jpeg, noise_jpeg, picture, sample, write_index, write_shards, write_tar

REFUSED, COUNTED, RIGHT = "refused", "counted", "right"
SAMPLES = 12


@dataclass(frozen=True)
class Broken:
    """`address`: what to give as data.train (or annotations, …). `message`: a pattern that the line matches."""

    address: str
    outcome: str
    message: str = ""


Maker = Callable[[Path, int], Broken]


def _shard(folder: Path, seed: int = 0, captions: int = 1) -> Path:
    return write_tar(folder / "0.tar", {f"{n:04d}": sample(n, captions) for n in range(SAMPLES)})


def _header_places(path: Path) -> list[int]:
    with tarfile.open(path) as tar:
        return [member.offset for member in tar]


def _damaged_header(folder: Path, seed: int, junk: bytes) -> Path:
    path = _shard(folder)
    places = _header_places(path)
    at = places[int(np.random.default_rng(seed).integers(4, len(places)))]
    data = bytearray(path.read_bytes())
    data[at : at + len(junk)] = junk
    path.write_bytes(data)
    return path


def noise_in_a_header(folder: Path, seed: int) -> Broken:
    junk = np.random.default_rng(seed).integers(1, 256, 512, dtype=np.uint8).tobytes()
    return Broken(str(_damaged_header(folder, seed, junk)), COUNTED, r"0\.tar holds a damaged header \(at byte \d")


def zeros_in_a_header(folder: Path, seed: int) -> Broken:
    path = _damaged_header(folder, seed, bytes(512))
    return Broken(str(path), COUNTED, r"0\.tar goes on behind its end-of-archive mark \(at byte \d")


def cut_shard(folder: Path, seed: int) -> Broken:
    path = _shard(folder)
    places = _header_places(path)
    path.write_bytes(path.read_bytes()[: int(np.random.default_rng(seed).integers(places[2] + 600, places[-1]))])
    return Broken(str(path), COUNTED, r"0\.tar ends without its end-of-archive mark|damaged header")


def two_tars_in_one(folder: Path, seed: int) -> Broken:
    path = _shard(folder)
    path.write_bytes(path.read_bytes() * 2)
    return Broken(str(path), COUNTED, "goes on behind its end-of-archive mark")


def empty_shard(folder: Path, seed: int) -> Broken:
    address = write_shards(folder, [3, 3])
    (folder / "train-000001.tar").write_bytes(b"")
    return Broken(address, REFUSED, r"train-000001.tar is no readable tar file \(it is empty\)")


def shard_of_zeros(folder: Path, seed: int) -> Broken:
    address = write_shards(folder, [3, 3])
    (folder / "train-000001.tar").write_bytes(bytes(20_480))
    return Broken(address, REFUSED, r"train-000001.tar is no readable tar file \(20480 bytes of zeros\)")


def shard_without_samples(folder: Path, seed: int) -> Broken:
    address = write_shards(folder, [SAMPLES, 1])
    (folder / "train-000001.tar").write_bytes(bytes(10_240))
    return Broken(address, COUNTED, "train-000001.tar holds no samples")


def noise_shard(folder: Path, seed: int) -> Broken:
    address = write_shards(folder, [3, 3])
    (folder / "train-000001.tar").write_bytes(np.random.default_rng(seed).bytes(5000))
    return Broken(address, REFUSED, "train-000001.tar is no readable tar file")


def bytes_changed_behind_an_index(folder: Path, seed: int) -> Broken:
    import hashlib

    path = _shard(folder)
    data = bytearray(path.read_bytes())
    entry = {"url": path.name, "nsamples": SAMPLES, "filesize": len(data), "md5sum": hashlib.md5(data).hexdigest()}
    write_index(folder, [entry])
    data[600] ^= 1
    path.write_bytes(data)
    return Broken(str(path), REFUSED, r"0.tar has md5sum \w+ where its index says")


def _with_member(folder: Path, header: bytes, data: bytes = b"x" * 512) -> Path:
    """A sound shard, then this header, then the end."""
    path = _shard(folder)
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1]
        end = end.offset_data + -(-end.size // 512) * 512
    path.write_bytes(path.read_bytes()[:end] + header + data + bytes(1024))
    return path


def declared_size_of_2_62(folder: Path, seed: int) -> Broken:
    member = tarfile.TarInfo("9999.jpg")
    member.size = 2**62
    return Broken(str(_with_member(folder, member.tobuf(tarfile.GNU_FORMAT))), COUNTED, "0.tar")


def pax_size(folder: Path, seed: int) -> Broken:
    size = (2**70, 2**63, 10**30, -5)[seed % 4]
    member = tarfile.TarInfo("9999.jpg")
    member.pax_headers = {"size": str(size)}
    return Broken(str(_with_member(folder, member.tobuf(tarfile.PAX_FORMAT))), COUNTED, "0.tar")


def long_name_of_a_terabyte(folder: Path, seed: int) -> Broken:
    member = tarfile.TarInfo("././@LongLink")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, 2**40
    return Broken(str(_with_member(folder, member.tobuf(tarfile.GNU_FORMAT))), COUNTED, "0.tar holds a damaged header")


INDEX_VALUES = (float("inf"), float("nan"), -1, "7", 1.5, [], True, 10**30)


def index_with_a_wrong_count(folder: Path, seed: int) -> Broken:
    path = _shard(folder)
    key = ("filesize", "nsamples")[seed % 2]
    write_index(folder, [{"url": path.name, key: INDEX_VALUES[seed // 2 % len(INDEX_VALUES)]}])
    return Broken(str(path), REFUSED, f"train.index.json is malformed .*{key} of 0.tar")


def index_with_wrong_captions(folder: Path, seed: int) -> Broken:
    path = _shard(folder)
    counts = ([10**9] * SAMPLES, [-1] * SAMPLES, "12", {"0": 1}, [None], [float("inf")])[seed % 6]
    write_index(folder, [{"url": path.name, "nsamples": SAMPLES, "ncaptions": counts}])
    return Broken(str(path), REFUSED, "train.index.json is malformed .*ncaptions of 0.tar")


def index_of_another_shape(folder: Path, seed: int) -> Broken:
    path = _shard(folder)
    head = '{"__kind__": "wids-shard-index-v1"'
    texts = (
        "[]",
        head + "}",
        head + ', "shardlist": {}}',
        head + ', "shardlist": [1]}',
        "[" * 100_000,
        "\0",
        "",
        "nul",
    )
    (folder / "train.index.json").write_text(texts[seed % len(texts)])
    return Broken(str(path), REFUSED, "index.json")


def endless_pattern(folder: Path, seed: int) -> Broken:
    many = ("{0..99999999999}", "{0..9}" * 11, "{a,b}" * 40, "{000000..999999}{0..99}", "{a..z}" * 9, "{a,{0..99999}}")
    patterns = (*many, "{1..5..0}", "{" * 5000, "{a..1}")
    message = "more than 100,000 shards" if seed % 9 < len(many) else "unbalanced|missing"
    return Broken(f"{folder}/{patterns[seed % len(patterns)]}.tar", REFUSED, message)


def endless_file(folder: Path, seed: int) -> Broken:
    kind = ("fifo.csv", "fifo.tar", "fifo.json", "zero.csv", "zero.tar", "zero.json")[seed % 6]
    path = folder / kind
    if kind.startswith("fifo"):
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    return Broken(str(path), REFUSED, "no regular file|are missing")


def endless_path(folder: Path, seed: int) -> Broken:
    name = ("x" * 5000, "x/" * 2500, "x" * 300)[seed % 3]
    return Broken(f"{folder}/{name}{('.tar', '.csv', '.json')[seed // 3 % 3]}", REFUSED, "cannot be read|missing|exist")


def _csv(folder: Path, text: str | bytes) -> str:
    for number in range(SAMPLES):
        (folder / f"{number}.jpg").write_bytes(jpeg(picture(number)))
    data = text if isinstance(text, bytes) else text.encode()
    (folder / "train.csv").write_bytes(data)
    return str(folder / "train.csv")


def _rows(special: str = "") -> str:
    return "filepath,title\n" + "".join(f"{n}.jpg,{n} 0\n" for n in range(SAMPLES)) + special


def csv_with_byte_order_mark(folder: Path, seed: int) -> Broken:
    return Broken(_csv(folder, b"\xef\xbb\xbf" + _rows().encode()), RIGHT)


def csv_with_newlines_in_cells(folder: Path, seed: int) -> Broken:
    return Broken(_csv(folder, _rows('0.jpg,"7\r\n 7"\n')), RIGHT)


def csv_with_a_broken_row(folder: Path, seed: int) -> Broken:
    rows: tuple[tuple[str | bytes, str], ...] = (
        ("0.jpg,\n", "is empty"),
        ("0.jpg\n", "is empty"),
        ("0.jpg," + "1 " * 500_000 + "\n", "1000000 characters, more than 10000"),
        (b"0.jpg,caf\xe9\n", "not UTF-8"),
        ("a\0b.jpg,1 1\n", "train.csv:"),
        ("x" * 5000 + ".jpg,1 1\n", "name too long"),
        ("/dev/zero,1 1\n", "no regular file"),
        (".,1 1\n", "it is a folder"),
    )
    row, message = rows[seed % len(rows)]
    row = row if isinstance(row, bytes) else row.encode()
    return Broken(_csv(folder, _rows().encode() + row), COUNTED, message)


def csv_with_two_columns_of_a_name(folder: Path, seed: int) -> Broken:
    name = ("filepath", "title")[seed % 2]
    return Broken(_csv(folder, f"filepath,title,{name}\n0.jpg,1 1,2\n"), REFUSED, f"has 2 columns '{name}'")


def text_member(folder: Path, seed: int) -> Broken:
    """One sample whose captions are broken among good ones."""
    members: tuple[tuple[dict[str, bytes], str], ...] = (
        ({"txt": b""}, "no json or txt|has 0 captions"),
        ({"txt": b"\xff\xfe1\x00"}, "not UTF-8"),
        ({"json": json.dumps({"captions": ["7 7"] * 20_000}).encode()}, "20000 captions"),
        ({"json": json.dumps({"captions": ["7 7" + " " * 10**6]}).encode()}, "1000003 characters, more than 10000"),
        ({"json": b'{"captions": ["\\ud83d"]}'}, "not UTF-8"),
        ({"json": b'{"captions": {"a": 1}}'}, "no list of strings"),
    )
    broken, message = members[seed % len(members)]
    samples = {f"{n:04d}": sample(n, 1) for n in range(SAMPLES)}
    return Broken(
        str(write_tar(folder / "0.tar", {**samples, "bad": {"jpg": noise_jpeg(), **broken}})), COUNTED, message
    )


def text_with_byte_order_mark(folder: Path, seed: int) -> Broken:
    text = ({"txt": b"\xef\xbb\xbf3 3"}, {"json": b'\xef\xbb\xbf{"captions": ["3 3"]}'})[seed % 2]
    samples = {f"{n:04d}": sample(n, 1) for n in range(SAMPLES)}
    return Broken(str(write_tar(folder / "0.tar", {**samples, "bom": {"jpg": noise_jpeg(), **text}})), RIGHT)


TRAIN_DATA: dict[Maker, int] = {
    noise_in_a_header: 3,
    zeros_in_a_header: 3,
    cut_shard: 4,
    two_tars_in_one: 1,
    empty_shard: 1,
    shard_of_zeros: 1,
    shard_without_samples: 1,
    noise_shard: 2,
    bytes_changed_behind_an_index: 1,
    declared_size_of_2_62: 1,
    pax_size: 4,
    long_name_of_a_terabyte: 1,
    index_with_a_wrong_count: 2 * len(INDEX_VALUES),
    index_with_wrong_captions: 6,
    index_of_another_shape: 8,
    endless_pattern: 9,
    endless_file: 6,
    endless_path: 9,
    csv_with_byte_order_mark: 1,
    csv_with_newlines_in_cells: 1,
    csv_with_a_broken_row: 8,
    csv_with_two_columns_of_a_name: 2,
    text_member: 6,
    text_with_byte_order_mark: 2,
}
"""Makers of data.train, and how many different seeds each has."""


def annotations(folder: Path, seed: int) -> Broken:
    """Annotation files that make_shards and make_coco_csv must refuse."""
    image = {"id": 1, "file_name": "a.jpg"}
    contents: tuple[object, ...] = (
        b"",
        b"\xff\xd8\xff",
        b"[" * 100_000,
        gzip.compress(b"{")[:-3],
        {"images": [image], "annotations": [{"id": 1, "image_id": 1, "caption": "\ud83d"}]},
        {"images": [{**image, "file_name": "\ud83d.jpg"}], "annotations": []},
        {"images": [{**image, "id": float("inf")}], "annotations": []},
        {"images": [{**image, "id": 2**70}], "annotations": []},
        {"images": [{"filename": "a.jpg", "sentences": [{"raw": 3}]}]},
        {"images": [{"sentences": []}]},
        {"images": [{"filename": "a.jpg", "split": "val", "imgid": 0, "sentences": []}]},
        {"images": [{"filename": "../a.jpg", "imgid": 0, "sentences": []}]},
        [{"image": "a.jpg"}],
        [{"image": 3, "caption": "x"}],
        [3],
        3,
    )
    content = contents[seed % len(contents)]
    name = "captions.json.gz" if isinstance(content, bytes) and content[:2] == b"\x1f\x8b" else "captions.json"
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return Broken(str(path), REFUSED, "captions.json")


def weights(folder: Path, seed: int) -> Broken:
    """Weight files that must be refused."""
    import torch
    from safetensors.torch import save_file

    ones = torch.ones(2)
    contents: tuple[object, ...] = (
        b"",
        b"\x80\x02",
        {},
        {3: ones},
        {"a": torch.eye(3).to_sparse()},
        {"a": torch.ones(2, device="meta")},
        {"a": torch.tensor([1.0, float("nan")])},
        {"a": torch.tensor([1.0, float("inf")], dtype=torch.bfloat16)},
        {"a": "text"},
        [ones],
        {"state_dict": {1: ones}},
        {"state_dict": {"module.a": ones * float("nan")}},
        struct.pack("<Q", 2**62) + b"{}",
        io.BytesIO,
    )
    number = seed % (len(contents) + 1)
    path = folder / ("model.safetensors" if number in (12, len(contents)) else "model.pt")
    if number == len(contents):
        save_file({"a": torch.tensor([float("nan")])}, path)
    elif isinstance(contents[number], bytes):
        path.write_bytes(contents[number])
    else:
        torch.save(contents[number], path)
    return Broken(str(path), REFUSED, "model\\.")


ANNOTATIONS, WEIGHTS = 16, 15
"""How many different seeds `annotations` and `weights` have."""
