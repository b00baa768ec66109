"""Random access to the samples of tar shards: where each member lies, and reading it from there.

A shard's members are found by one walk over its headers; the result is kept in the cache folder under the shard's
path, size and modification time, so that the walk happens once. Shapes: N images over all shards.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
from tqdm import tqdm

from convclip.data.samples import BrokenSample, Captions
from convclip.data.shard_scan import MAX_TEXT_BYTES, NO_TEXT, md5_of, parse_captions, scan_shard
from convclip.data.shards import Shard, cache_folder, find_shards, is_url
from convclip.distributed import is_main
from convclip.files import CannotWrite, whole_file
from convclip.locks import Lock
from convclip.schema import Data, UserError

log = logging.getLogger(__name__)

TABLE_VERSION = 2
# A bound on what one sample may make us read; far above any real one.
MAX_IMAGE_BYTES = 1 << 28
# Shards with an md5sum in their index are compared with it once, if all together have no more bytes than this: about
# two seconds. Larger sets are left to tools that read every byte; sizes are compared at every start.
HASHED_AT_START = 1 << 30
OPEN_SHARDS = 128


class ShardTable:
    """The samples of tar shards as a SampleSource: our own, img2dataset's and Karpathy-style shards.

    Image and caption ids are those of the json members. Shards of more than one source (other folders, or other names
    in front of the number) may use the same ids for other things: all ids are then places in the table instead.

    Raises:
        UserError: a shard is missing, no tar file, empty, or differs from its index.
    """

    def __init__(self, address: str, data: Data):
        self.shards = find_shards(address, data)
        folder = cache_folder(data) / "tables"
        progress = tqdm(self.shards, desc=f"reading headers of {address}", unit="shard", delay=2, disable=not is_main())
        hashed = sum(os.path.getsize(s.path) for s in self.shards if s.md5sum is not None) <= HASHED_AT_START
        self._join([_table(shard, folder, hashed) for shard in progress])
        for line in self.damage:
            log.warning(line)
        if not len(self.key):
            raise UserError(f"the shards of {address!r} hold no samples")

    @classmethod
    def of_one(cls, shard: Shard) -> ShardTable:
        """One shard as it is: its headers walked anew, nothing compared with its index or kept; it may hold no samples.

        UserError: nothing can be read of it.
        """
        table = cls.__new__(cls)
        table.shards = [shard]
        table._join([scan_shard(shard)])
        return table

    def _join(self, scans: list[tuple[dict[str, np.ndarray], tuple[str, int] | None]]) -> None:
        """Take the tables and the damage of all shards."""
        tables = [table for table, _ in scans]
        damage = [found for _, found in scans if found is not None]
        self.damage = [line for line, _ in damage]
        self.lost = sum(lost for _, lost in damage)
        self.sources = len({source_of(shard.address) for shard in self.shards})
        sizes = [len(table["key"]) for table in tables]
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

    def close(self) -> None:
        """Close the shards' files; reading opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def describe(self) -> str:
        """One line for the log."""
        merged = f" of {self.sources} sources, numbered anew" if self.sources > 1 else ""
        return f"{len(self.shards):,} shards, {len(self.key):,} images, {int(self.counts.sum()):,} captions{merged}"

    def name(self, image: int) -> str:
        """`<shard>:<key>`."""
        return f"{os.path.basename(self.shards[self.shard[image]].path)}:{self.key[image].decode(errors='replace')}"

    def read_captions(self, image: int) -> Captions:
        """All captions of an image; ids are those of the json where there is one source, else places in the table."""
        image_id, texts, ids = self.read_stored(image)
        if self.sources > 1:
            image_id, ids = None, None
        first = int(self.first_caption[image])
        return Captions(
            image_id=image if image_id is None else image_id,
            texts=texts,
            ids=list(range(first, first + len(texts))) if ids is None else ids,
        )

    def read_stored(self, image: int) -> tuple[int | None, list[str], list[int] | None]:
        """(image id, captions, caption ids) as the member has them; None where it has no id."""
        name, kind = self.name(image), int(self.text_kind[image])
        if kind == NO_TEXT:
            raise BrokenSample(f"{name}: no json or txt member with captions")
        raw = self._read(image, self.text[image], MAX_TEXT_BYTES)
        try:
            return parse_captions(kind, raw)
        except ValueError as error:
            reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
            raise BrokenSample(f"{name}: captions cannot be read: {reason}") from None

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


def source_of(address: str) -> str:
    """What the shards of one data set have in common: the address without the last number in the file's name."""
    folder, _, name = urlparse(address).path.rpartition("/") if is_url(address) else address.rpartition("/")
    return f"{folder}/{re.sub(r'[0-9]+(?=[^0-9]*$)', '', name)}"


def _table(shard: Shard, folder: Path, hashed: bool) -> tuple[dict[str, np.ndarray], tuple[str, int] | None]:
    """The shard's member table, from the cache or from its headers, and its damage: a line, and samples lost.

    UserError when it differs from its index, or nothing can be read of it.
    """
    status = os.stat(shard.path)
    identity = f"{TABLE_VERSION} {os.path.abspath(shard.path)} {status.st_size} {status.st_mtime_ns} {shard.ncaptions}"
    cached = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.npz"
    damage = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The first process of this machine walks the headers, the others wait and read.
        with Lock(f"{cached}.lock", cached, wait=True):
            table = _load(cached)
            if table is None:
                table, damage = _walk(shard, hashed)
                # A damaged shard is walked, and warned of, each time.
                if damage is None:
                    with whole_file(cached) as part, open(part, "wb") as output:
                        np.savez(output, **table)  # type: ignore[arg-type]  # no column is called allow_pickle
    except (OSError, CannotWrite) as error:
        log.warning("member tables cannot be kept in %s (%s): set data.cache_folder", folder, error)
        table, damage = _walk(shard, hashed)
    _compare(shard, table)
    return table, damage


def _walk(shard: Shard, hashed: bool) -> tuple[dict[str, np.ndarray], tuple[str, int] | None]:
    """As `scan_shard`, with the file's md5 sum in the table (b"" where it is not asked for)."""
    table, damage = scan_shard(shard)
    md5 = b""
    if hashed and shard.md5sum is not None:
        md5 = md5_of(shard.path).encode()
    return {**table, "md5": np.array([md5], dtype="S32")}, damage


def _compare(shard: Shard, table: dict[str, np.ndarray]) -> None:
    """UserError where the shard differs from its index; takes the md5 sum out of the table."""
    md5 = table.pop("md5")[0].decode()
    for problem in index_problems(shard, len(table["key"]), md5):
        raise UserError(problem)


def index_problems(shard: Shard, held: int, md5: str) -> list[str]:
    """What to say of a shard of `held` samples that differs from its index; md5 "": not known."""
    problems = []
    if shard.nsamples is not None and held != shard.nsamples:
        problems.append(f"shard {shard.path} holds {held} samples, its index says {shard.nsamples}: build it again")
    if md5 and shard.md5sum is not None and md5 != shard.md5sum.lower():
        problems.append(
            f"shard {shard.path} has md5sum {md5} where its index says {shard.md5sum}: its bytes have changed, copy "
            "or build it again"
        )
    return problems


def _load(cached: Path) -> dict[str, np.ndarray] | None:
    if not cached.exists():
        return None
    try:
        with np.load(cached, allow_pickle=False) as stored:
            return dict(stored)
    except (ValueError, KeyError, zipfile.BadZipFile, EOFError):
        return None
