"""Random access to the samples of tar shards: where each member lies, and reading it from there.

A shard's members are found by one walk over its headers; the result is kept in the cache folder under the shard's
path, size and modification time, so that the walk happens once. Shapes: N images over all shards.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from convclip.data.samples import BrokenSample, Captions
from convclip.data.shards import Shard, cache_folder, find_shards
from convclip.distributed import is_main
from convclip.files import CannotWrite, Lock, whole_file
from convclip.schema import Data, UserError

log = logging.getLogger(__name__)

TABLE_VERSION = 1
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
NO_TEXT, JSON, TXT = 0, 1, 2
# Bounds on what one sample may make us read; far above any real one.
MAX_TEXT_BYTES = 1 << 22
MAX_IMAGE_BYTES = 1 << 28
OPEN_SHARDS = 128


class ShardTable:
    """The samples of tar shards as a SampleSource: our own, img2dataset's and Karpathy-style shards.

    Raises:
        UserError: a shard is missing, no tar file, or differs from its index.
    """

    def __init__(self, address: str, data: Data):
        self.shards = find_shards(address, data)
        folder = cache_folder(data) / "tables"
        progress = tqdm(self.shards, desc=f"reading headers of {address}", unit="shard", delay=2, disable=not is_main())
        tables = [_table(shard, folder) for shard in progress]
        sizes = [len(table["key"]) for table in tables]
        if not sum(sizes):
            raise UserError(f"the shards of {address!r} hold no samples")
        joined = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
        self.key: np.ndarray = joined["key"]
        self.image: np.ndarray = joined["image"]
        self.text: np.ndarray = joined["text"]
        self.text_kind: np.ndarray = joined["text_kind"]
        self.counts: np.ndarray = joined["counts"]
        self.shard = np.repeat(np.arange(len(tables), dtype=np.int32), sizes)
        self.first_caption = np.cumsum(self.counts) - self.counts
        self._open: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict:
        # File descriptors mean nothing in another process; it opens its own.
        return {**self.__dict__, "_open": OrderedDict()}

    def describe(self) -> str:
        """One line for the log."""
        return f"{len(self.shards):,} shards, {len(self.key):,} images, {int(self.counts.sum()):,} captions"

    def name(self, image: int) -> str:
        """`<shard>:<key>`."""
        return f"{os.path.basename(self.shards[self.shard[image]].path)}:{self.key[image].decode(errors='replace')}"

    def read_captions(self, image: int) -> Captions:
        """All captions of an image; ids are those of the json, else places in the table."""
        name, kind = self.name(image), int(self.text_kind[image])
        if kind == NO_TEXT:
            raise BrokenSample(f"{name}: no json or txt member with captions")
        raw = self._read(image, self.text[image], MAX_TEXT_BYTES)
        try:
            image_id, texts, ids = parse_captions(kind, raw)
        except ValueError as error:
            reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
            raise BrokenSample(f"{name}: captions cannot be read: {reason}") from None
        first = int(self.first_caption[image])
        return Captions(
            image_id=image if image_id is None else image_id,
            texts=texts,
            ids=list(range(first, first + len(texts))) if ids is None else ids,
        )

    def read_image(self, image: int) -> bytes:
        """The image member's bytes."""
        if self.image[image, 1] < 0:
            raise BrokenSample(f"{self.name(image)}: no image member")
        return self._read(image, self.image[image], MAX_IMAGE_BYTES)

    def _read(self, image: int, span: np.ndarray, limit: int) -> bytes:
        offset, size = int(span[0]), int(span[1])
        if size > limit:
            raise BrokenSample(f"{self.name(image)}: member of {size} bytes exceeds {limit}")
        try:
            data = os.pread(self._descriptor(int(self.shard[image])), size, offset)
        except OSError as error:
            raise BrokenSample(f"{self.name(image)}: {error}") from None
        if len(data) < size:
            raise BrokenSample(f"{self.name(image)}: the shard ends inside this member")
        return data

    def _descriptor(self, shard: int) -> int:
        """An open file of the shard; the least recently used one closes when there are many."""
        if shard not in self._open:
            if len(self._open) >= OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1])
            self._open[shard] = os.open(self.shards[shard].path, os.O_RDONLY)
        self._open.move_to_end(shard)
        return self._open[shard]


def parse_captions(kind: int, raw: bytes) -> tuple[int | None, list[str], list[int] | None]:
    """(image id or None, captions, caption ids or None) of a json or txt member; ValueError when malformed.

    json: `captions` (ours, Karpathy-style) or one `caption` (img2dataset). txt: one caption per line.
    """
    if kind == TXT:
        # Not splitlines(): it also splits at characters that captions from the web contain (U+2028, form feed).
        return None, [line.strip() for line in raw.decode("utf-8-sig").split("\n") if line.strip()], None
    try:
        content = json.loads(raw.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("the json member is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("the json member is no object")
    texts = content.get("captions")
    if texts is None:
        texts = [content["caption"]] if content.get("caption") is not None else []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("captions in the json member are no list of strings")
    ids = content.get("caption_ids")
    if not isinstance(ids, list) or len(ids) != len(texts) or not all(_is_id(number) for number in ids):
        ids = None
    image_id = content.get("image_id")
    return image_id if _is_id(image_id) else None, texts, ids


def _is_id(value: object) -> bool:
    """True for an integer that a tensor of int64 can hold (json knows larger ones, and true and false)."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _table(shard: Shard, folder: Path) -> dict[str, np.ndarray]:
    """The shard's member table, from the cache or from its headers; UserError when it differs from the index."""
    status = os.stat(shard.path)
    identity = f"{TABLE_VERSION} {os.path.abspath(shard.path)} {status.st_size} {status.st_mtime_ns} {shard.ncaptions}"
    cached = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.npz"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The first process of this machine walks the headers, the others wait and read.
        with Lock(f"{cached}.lock", cached, wait=True):
            table = _load(cached)
            if table is None:
                table, complete = scan_shard(shard)
                # A cut shard is walked, and warned of, each time.
                if complete:
                    with whole_file(cached) as part, open(part, "wb") as output:
                        np.savez(output, **table)
    except (OSError, CannotWrite) as error:
        log.warning("member tables cannot be kept in %s (%s): set data.cache_folder", folder, error)
        table, _ = scan_shard(shard)
    held = len(table["key"])
    if shard.nsamples is not None and held != shard.nsamples:
        raise UserError(f"shard {shard.path} holds {held} samples, its index says {shard.nsamples}: build it again")
    return table


def _load(cached: Path) -> dict[str, np.ndarray] | None:
    if not cached.exists():
        return None
    try:
        with np.load(cached, allow_pickle=False) as stored:
            return dict(stored)
    except (ValueError, zipfile.BadZipFile, EOFError):
        return None


def scan_shard(shard: Shard) -> tuple[dict[str, np.ndarray], bool]:
    """One walk over the headers of a tar file, reading only the caption members; False where the file is cut.

    Returns arrays over its samples: key (bytes), image and text (int64 [n, 2]: offset, size; size -1: absent),
    text_kind (NO_TEXT, JSON, TXT) and counts (int64, captions; 1 where they cannot be read, so that the sample
    appears in the stream once and is reported there).
    """
    samples, complete = _members(shard.path)
    if not complete:
        log.warning("shard %s ends without its end-of-archive mark: it seems to be cut", shard.path)
    absent = (0, -1)
    keys = list(samples)
    table: dict[str, list] = {"image": [], "text": [], "text_kind": [], "counts": []}
    known = shard.ncaptions if shard.ncaptions is not None and len(shard.ncaptions) == len(keys) else None
    with open(shard.path, "rb") as tar:
        for number, key in enumerate(keys):
            members = samples[key]
            kind, count = (JSON, known[number]) if known else _text_member(tar.fileno(), members)
            table["image"].append(next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), absent))
            table["text"].append(members.get({JSON: "json", TXT: "txt"}.get(kind, ""), absent))
            table["text_kind"].append(kind if table["text"][-1] != absent else NO_TEXT)
            table["counts"].append(max(1, count))
    spans = {name: np.array(table[name], dtype=np.int64).reshape(-1, 2) for name in ("image", "text")}
    arrays = {
        "key": np.array([key.encode(errors="surrogateescape") for key in keys], dtype=np.bytes_),
        "text_kind": np.array(table["text_kind"], dtype=np.int8),
        "counts": np.array(table["counts"], dtype=np.int64),
        **spans,
    }
    return arrays, complete


def _members(path: str) -> tuple[dict[str, dict[str, tuple[int, int]]], bool]:
    """{key: {suffix: (offset, size)}} of a tar file in its order, and whether it ends as a tar file should.

    The key is the path up to the first dot of its last part (webdataset's rule). A member cut by the end of the file
    is listed: reading it reports it.
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    with open(path, "rb") as stream:
        try:
            archive = tarfile.open(fileobj=stream, mode="r:", errorlevel=0)  # noqa: SIM115 (its file is closed here)
            for member in archive:
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                wanted = suffix.lower() in (*IMAGE_SUFFIXES, "json", "txt")
                if wanted and stem and member.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    key = f"{folder}/{stem}" if folder else stem
                    samples.setdefault(key, {})[suffix.lower()] = (member.offset_data, member.size)
                archive.members.clear()
        except (tarfile.TarError, ValueError, OverflowError) as error:
            if not samples:
                raise UserError(f"shard {path} is no readable tar file ({error})") from None
            return samples, False
        stream.seek(archive.offset)
        end = stream.read(tarfile.BLOCKSIZE)
    return samples, len(end) == tarfile.BLOCKSIZE and not any(end)


def _text_member(descriptor: int, members: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """(kind, number of captions) of the member that holds a sample's captions; json wins where it has any."""
    found = NO_TEXT
    for kind, suffix in ((JSON, "json"), (TXT, "txt")):
        offset, size = members.get(suffix, (0, -1))
        if not 0 <= size <= MAX_TEXT_BYTES:
            continue
        found = found or kind
        try:
            count = len(parse_captions(kind, os.pread(descriptor, size, offset))[1])
        except ValueError:
            continue
        if count:
            return kind, count
    return found, 0
