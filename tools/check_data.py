"""Read every byte of a data set once, by the rules of training, and say what is wrong with it.

    python tools/check_data.py ADDRESS [--workers N] [--recipe NAME] [--set data.csv_separator=';']

ADDRESS is what data.train takes (shards by pattern or index, joined by ::, or a CSV table), a feature store (.h5) or
the folder of a frame store. Looked for are

    shards         sizes, samples and md5 sums that differ from the index; damage of the tar, with its byte
    samples        pictures that are missing, cut, undecodable or too large; captions that are missing, empty, too long
                   or not UTF-8; ids of one source and pictures, byte for byte, that occur twice
    feature store  rows that differ from their checksums, values that are not finite
    frame store    videos that differ from their checksums or cannot be decoded, tars with another size or end

A shard is hashed from end to end and then decoded from the page cache. Exit code 0: nothing was found, 1: something
was, the table says what, 2: it cannot be read at all.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from convclip.command_line import Findings, add_overrides, run
from convclip.config import load_recipe
from convclip.data.csv_table import CsvTable
from convclip.data.local_files import refuse_irregular
from convclip.data.samples import BrokenSample, SampleSource, decode_image, open_image
from convclip.data.shard_scan import md5_of
from convclip.data.shard_table import ShardTable, index_problems, source_of
from convclip.data.shards import Shard, named_shards, size_problem
from convclip.data.sources import is_csv
from convclip.schema import Data, UserError

if TYPE_CHECKING:
    from convclip.features.reader import FeatureStore
    from convclip.video.frame_index import FrameShard
    from convclip.video.frame_store import FrameStore

# What one piece of work takes of a CSV table or of an array of a feature store.
IMAGES_AT_ONCE, BYTES_AT_ONCE = 256, 1 << 25
SHAPES_SHOWN = 5  # The most frequent sizes of pictures.
UNREADABLE = "shard cannot be read"
TWICE = "picture occurs twice, byte for byte"


@dataclass
class Part:
    """What one piece of work found, and how much there was of everything."""

    findings: Findings = field(default_factory=Findings)
    counts: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    shapes: Counter[tuple[int, int]] = field(default_factory=Counter)
    once: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    """By kind of finding: marks (bytes [n]) of what may occur once in the data set, and names of what had them."""

    def add(self, message: str, name: str, place: str = "") -> None:
        """A finding whose kind is the reader's message without the name in front and with N for every number."""
        reason = message.removeprefix(f"{name}: ")
        self.findings.add(re.sub(r"(?<!UTF-)\d+(,\d{3})*", "N", reason)[:100], f"{name}{place}: {reason}")

    def note(self, kind: str, found: list[tuple[bytes, bytes]]) -> None:
        """Keep (mark, name) of what may occur once, as arrays: there may be millions."""
        marks, names = zip(*found, strict=True) if found else ((), ())
        self.once[kind] = (np.array(marks, dtype="S16"), np.array(names, dtype=np.bytes_))


Work = tuple[Callable[[], Part], int]  # With its size, in bytes or samples.


def main(arguments: list[str] | None = None) -> int:
    """Check what the command line names; the exit code is the module's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", metavar="ADDRESS", help="shards, a CSV table, a feature store or a frame store")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="threads; default: one per core")
    parser.add_argument("--recipe", default="demo", help="whose data.* say how it is read; default: demo, all defaults")
    add_overrides(parser)
    return run("check_data", check, parser.parse_args(arguments), "; nothing was changed")


def check(options: argparse.Namespace) -> int:
    """Print what was read and the table; 0 when nothing was found, else 1."""
    if not 1 <= options.workers <= 1024:
        raise UserError(f"--workers {options.workers}: must be from 1 to 1024")
    data = load_recipe(options.recipe, options.overrides).data
    unit, work = pieces_of(options.address, data)
    whole = Part()
    parts = list(run_all(work, options.workers, unit))
    for part in parts:
        whole.findings.take(part.findings)
        whole.counts.update(part.counts)
        whole.modes.update(part.modes)
        whole.shapes.update(part.shapes)
    if whole.findings.counts.get(UNREADABLE) == len(parts):
        raise UserError(whole.findings.examples[UNREADABLE][0])
    for kind in dict.fromkeys(kind for part in parts for kind in part.once):
        marks, names = zip(*(part.once[kind] for part in parts if kind in part.once), strict=True)
        find_twice(kind, np.concatenate(marks), np.concatenate(names), whole.findings)
    print(f"{options.address}: {', '.join(f'{count:,} {what}' for what, count in whole.counts.items()) or 'empty'}")
    if whole.shapes:
        modes = ", ".join(f"{mode} {count:,}" for mode, count in whole.modes.most_common())
        shapes = [f"{w} x {h} {count:,}" for (w, h), count in whole.shapes.most_common(SHAPES_SHOWN)]
        more = len(whole.shapes) - len(shapes)
        print(f"modes: {modes}; sizes: {', '.join(shapes)}{f', and {more:,} other sizes' if more else ''}")
    return whole.findings.report()


def pieces_of(address: str, data: Data) -> tuple[str, list[Work]]:
    """The work that an address makes, and the unit of its sizes. UserError: it cannot be read at all."""
    if address.endswith(".h5"):
        # These readers import torch, which takes seconds.
        from convclip.features.reader import FeatureStore

        refuse_irregular(address, "feature store")
        return "B", list(pieces_of_features(FeatureStore(address)))
    if any(os.path.exists(os.path.join(address, name)) for name in ("index.json", "plan.json")):
        from convclip.video.frame_index import read_index
        from convclip.video.frame_store import FrameStore

        frames = FrameStore(address)
        tars = read_index(frames.folder).shards
        return "video", [(partial(check_frames, frames, tar), len(tar.videos)) for tar in tars]
    if is_csv(address, data):
        table = CsvTable(address, data)
        starts = range(0, len(table.images), IMAGES_AT_ONCE)
        pieces = [range(start, min(start + IMAGES_AT_ONCE, len(table.images))) for start in starts]
        return "image", [(partial(check_samples, table, images, data), len(images)) for images in pieces]
    shards = named_shards(address, data)
    return "B", [(partial(check_shard, shard, data), os.path.getsize(shard.path)) for shard in shards]


def run_all(work: Sequence[Work], workers: int, unit: str) -> Iterator[Part]:
    """What each piece found, in their order. Threads: reading, hashing and decoding let others run."""
    pool = ThreadPoolExecutor(workers)
    try:
        with tqdm(total=sum(size for _, size in work), desc="checking", unit=unit, unit_scale=True, delay=1) as bar:
            for part, (_, size) in zip(pool.map(lambda piece: piece[0](), work), work, strict=True):
                bar.update(size)
                yield part
    finally:
        pool.shutdown(cancel_futures=True)


def check_shard(shard: Shard, data: Data) -> Part:
    """A shard against its index, its tar, and every sample of it."""
    part, table, md5 = Part(counts=Counter(shards=1)), None, ""
    with part.findings.catching(UNREADABLE):
        try:
            md5, table = md5_of(shard.path), ShardTable.of_one(shard)
        except OSError as error:
            raise UserError(f"shard {shard.path} cannot be read: {error.strerror}") from None
    if table is None:
        return part
    for problem in filter(None, [size_problem(shard), *index_problems(shard, len(table.key), md5)]):
        part.findings.add("shard differs from its index", problem)
    for line in table.damage:
        part.findings.add("shard is damaged", line)
    check_samples(table, range(len(table.key)), data, part)
    check_ids(table, source_of(shard.address), part)
    table.close()
    return part


def check_samples(source: SampleSource, images: range, data: Data, part: Part | None = None) -> Part:
    """Captions and pictures of some images, as training reads them."""
    part = part or Part()
    part.counts.update(images=len(images), captions=0)
    pictures = []
    for image in images:
        name, limit, counted = source.name(image), data.max_image_pixels, int(source.counts[image])
        where = place(source, image, "text")
        try:
            captions = source.read_captions(image)
            part.counts["captions"] += len(captions.texts)
            if len(captions.texts) > counted:
                part.add(f"has {len(captions.texts)} captions, its table says {counted}", name, where)
            for number in range(counted):
                try:
                    captions.usable(name, number)
                except BrokenSample as error:
                    part.add(str(error), name, where)
        except BrokenSample as error:
            part.add(str(error), name, where)
        try:
            encoded = source.read_image(image)
            pictures.append((mark(encoded), as_bytes(name)))
            header = open_image(name, encoded, limit)
            decode_image(name, encoded, limit)
            part.modes[header.mode] += 1
            part.shapes[header.size] += 1
        except BrokenSample as error:
            part.add(str(error), name, place(source, image, "image"))
    part.note(TWICE, pictures)
    return part


def place(source: SampleSource, image: int, member: str) -> str:
    """Where in its shard a member begins, behind its name; nothing where there is no shard, or no member."""
    if not isinstance(source, ShardTable):
        return ""
    offset, size = (source.text if member == "text" else source.image)[image].tolist()
    return f" ({member} at byte {offset:,})" if size >= 0 else ""


def check_ids(table: ShardTable, source: str, part: Part) -> None:
    """Take down the ids of a shard's samples (of a sample without one, its key) and captions, one source's apart."""
    images, captions = [], []
    for image in range(len(table.key)):
        try:
            number, _, ids = table.read_stored(image)
        except BrokenSample:
            continue
        name = as_bytes(table.name(image))
        own = f"{table.key[image]!r}" if number is None else f"{number}"
        images.append((mark(as_bytes(f"{source} {own}")), name))
        captions += [(mark(as_bytes(f"{source} {caption}")), name) for caption in ids or []]
    part.note("id of an image occurs twice", images)
    part.note("id of a caption occurs twice", captions)


def find_twice(kind: str, marks: np.ndarray, names: np.ndarray, findings: Findings) -> None:
    """Each of bytes [n] that has an earlier equal one, by the names of both."""
    order = np.argsort(marks, kind="stable")
    same = np.flatnonzero(marks[order[1:]] == marks[order[:-1]])
    # In the order of the data set.
    for number in same[np.argsort(order[same + 1])]:
        later, first = (names[order[place]].decode(errors="replace") for place in (number + 1, number))
        findings.add(kind, f"{later}: as in {first}")


def mark(data: bytes) -> bytes:
    """16 bytes that two different things do not share."""
    return hashlib.blake2b(data, digest_size=16).digest()


def as_bytes(text: str) -> bytes:
    """A name as it was on the disk."""
    return text.encode(errors="surrogateescape")


def pieces_of_features(store: FeatureStore) -> Iterator[Work]:
    """Every array of a feature store, some rows at a time."""
    for name, spec in store.arrays.items():
        ids = store.ids(name)
        rows = max(1, BYTES_AT_ONCE // max(1, spec.row_bytes))
        for start in range(0, len(ids), rows):
            some = ids[start : start + rows]
            yield partial(check_rows, store, name, some, start), len(some) * spec.row_bytes


def check_rows(store: FeatureStore, name: str, ids: np.ndarray | list[str], start: int) -> Part:
    """Rows of an array, `start` and those behind it: checksums, and whether their values are finite."""
    part, failed, rows = Part(counts=Counter(rows=len(ids))), Findings(), None
    with failed.catching("row of a feature store is damaged"):
        rows = store.read(name, ids)
    if rows is None:
        # The reader names the first of them: each by itself names them all.
        alone = range(len(ids) if len(ids) > 1 else 0)
        each = [check_rows(store, name, ids[row : row + 1], start + row).findings for row in alone]
        for found in each or [failed]:
            part.findings.take(found)
        return part
    if rows.is_floating_point():
        for row in (~rows.reshape(len(ids), -1).isfinite().all(dim=1)).nonzero().flatten().tolist():
            kind = store.arrays[name].item_kind
            what = f"{store.path}: array {name}, row {start + row} ({kind} {ids[row]})"
            part.findings.add("row of a feature store has values that are not finite", what)
    return part


def check_frames(store: FrameStore, shard: FrameShard) -> Part:
    """Every video of one tar of a frame store, and the size and end of the tar."""
    from convclip.video.frame_index import is_whole

    part = Part(counts=Counter(shards=1, videos=len(shard.videos)))
    names = [(mark(as_bytes(video)), as_bytes(f"{shard.file}:{video}")) for video in shard.videos]
    part.note("id of a video occurs twice", names)
    for video in shard.videos:
        with part.findings.catching("video of a frame store is damaged"):
            store[video]
    if not part.findings.counts and not is_whole(store.folder / shard.file, shard):
        what = f"{store.folder / shard.file}: its size, its end or a checksum is not what {store.folder} says of it"
        part.findings.add("tar of a frame store is damaged", what)
    return part


if __name__ == "__main__":
    sys.exit(main())
