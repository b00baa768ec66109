"""Writing WebDataset shards: `<split>-000000.tar`, … and the index `<split>.index.json` in the wids layout.

Samples lie in the order of a seeded shuffle of their ids, so that every shard is a random sample of the whole. Shards
are written in parallel, each by one process; their bytes do not depend on how many. A stopped run is continued: shards
whose size and checksum match their record (shard_record.py) are kept.

The members of a sample come from `members_of` (`image_members` for images); nothing else here knows what they hold.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from convclip.data.coco import CocoImage
from convclip.data.jpeg import SkippedImage, read_jpeg
from convclip.data.shard_record import Entry, ShardRecord, matches
from convclip.files import whole_file, writing
from convclip.locks import Lock
from convclip.schema import UserError

MembersOf = Callable[[CocoImage], dict[str, bytes]]
# Bytes written and hashed at a time.
BLOCK = 1024 * 1024


@dataclass(frozen=True)
class Written:
    """What a run of `write_shards` left in the folder; `reused` shards were there before, `skipped` are samples."""

    shards: int
    reused: int
    samples: int
    captions: int
    size: int
    skipped: list[Entry]


@dataclass(frozen=True)
class ShardJob:
    """One shard to write, and its entry in the record when an earlier run has written it."""

    path: Path
    samples: tuple[CocoImage, ...]
    members_of: MembersOf
    entry: Entry | None


def image_members(image: CocoImage, folder: Path, shorter_side: int | None = None) -> dict[str, bytes]:
    """Members of an image's sample: `jpg`, and `json` {image_id, captions, caption_ids, width, height as stored}."""
    jpeg = read_jpeg(folder / image.file_name, shorter_side)
    about = {
        "image_id": image.image_id,
        "captions": image.captions,
        "caption_ids": image.caption_ids,
        "width": jpeg.width,
        "height": jpeg.height,
    }
    return {"jpg": jpeg.data, "json": json.dumps(about).encode()}


def reasons(skipped: Sequence[Entry]) -> str:
    """Skipped samples in words: `12 skipped (9 empty file, 3 not an image)`, most frequent first; "" for none."""
    counted = Counter(line["reason"] for line in skipped).most_common()
    return f"{len(skipped)} skipped ({', '.join(f'{count} {reason}' for reason, count in counted)})" if counted else ""


def skipped_entry(sample: CocoImage, reason: str) -> Entry:
    """A line of `<split>.skipped.jsonl`."""
    return {"image_id": sample.image_id, "file_name": sample.file_name, "reason": reason}


def write_shards(
    samples: Sequence[CocoImage],
    members_of: MembersOf,
    output_dir: Path,
    split: str,
    parameters: Entry,
    skipped: Sequence[Entry] = (),
    samples_per_shard: int = 1000,
    seed: int = 0,
    workers: int = 1,
) -> Written:
    """Write `samples` to shards of `output_dir`, or finish what an earlier run of the same parameters began.

    Args:
        members_of: gives a sample's members by extension, or raises SkippedImage; must be picklable.
        parameters: what else decides the shards' bytes (resize, …), for comparison with an earlier run.
        skipped: samples left out before (`skipped_entry`), for `<split>.skipped.jsonl` and the result.

    Errors: UserError for an output that cannot be written or is full, is being written by another process, holds
    shards of other parameters or of no record, a worker that died, or no sample left.
    """
    if not samples:
        raise UserError(f"no sample to write: {reasons(skipped) or 'there are none'}")
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", split):
        raise UserError(f"split {split!r}: use ASCII letters, digits, '.', '_' and '-' only")
    shuffled = sorted(samples, key=lambda sample: sample.image_id)
    random.Random(seed).shuffle(shuffled)
    everything = {"samples_per_shard": samples_per_shard, "seed": seed, **parameters, "samples": _digest(shuffled)}
    with writing(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        # The file's name begins with a dot: no reader takes it for a shard or an index.
        with Lock(output_dir / f".{split}.lock", f"split {split} of {output_dir}"):
            record = ShardRecord(output_dir, split, everything)
            jobs = []
            for number, start in enumerate(range(0, len(shuffled), samples_per_shard)):
                name = f"{split}-{number:06d}.tar"
                chosen = tuple(shuffled[start : start + samples_per_shard])
                jobs.append(ShardJob(output_dir / name, chosen, members_of, record.entries.get(name)))
            reused = _run(jobs, workers, record, split)
            skipped = [*skipped, *(line for entry in record.in_order() for line in entry["skipped"])]
            return _finish(record, skipped, reused)


def _run(jobs: list[ShardJob], workers: int, record: ShardRecord, split: str) -> int:
    """Do the jobs and record each; returns how many shards were there already."""
    reused = 0
    with tqdm(total=sum(len(job.samples) for job in jobs), desc=split, unit="sample") as bar:
        for job, (entry, was_there) in _done(jobs, workers):
            record.add(entry)
            reused += was_there
            bar.update(len(job.samples))
    return reused


def _finish(record: ShardRecord, skipped: list[Entry], reused: int) -> Written:
    entries = record.in_order()
    samples = sum(entry["nsamples"] for entry in entries)
    if not samples:
        record.discard()
        raise UserError(f"no sample to write: {reasons(skipped)}")
    record.finish(skipped)
    captions = sum(sum(entry["ncaptions"]) for entry in entries)
    return Written(len(entries), reused, samples, captions, sum(entry["filesize"] for entry in entries), skipped)


def _done(jobs: list[ShardJob], workers: int) -> Iterator[tuple[ShardJob, tuple[Entry, bool]]]:
    """(job, result of `ensure_shard`) as they are done."""
    if min(workers, len(jobs)) == 1:
        for job in jobs:
            yield job, ensure_shard(job)
        return
    # spawn: a forked child would hold its siblings' pipes open and could not notice the parent's death.
    executor = ProcessPoolExecutor(min(workers, len(jobs)), get_context("spawn"), _start_worker)
    try:
        futures = {executor.submit(ensure_shard, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool:
        raise UserError("a worker process died (out of memory?): run the same command again to go on") from None
    finally:
        executor.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Ctrl-C ends a worker without a traceback, and so does the death of the process that started it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = parent_process()
    assert parent is not None  # this runs in a worker process

    def follow_parent() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def ensure_shard(job: ShardJob) -> tuple[Entry, bool]:
    """(the shard's entry, whether it was there): the shard is written unless one that matches job.entry is there."""
    if job.entry is not None and matches(job.path, job.entry):
        return job.entry, True
    counts, skipped = [], []
    with whole_file(job.path, "shard") as part, part.open("wb", buffering=0) as file:
        tar = _TarStream(file)
        for sample in job.samples:
            try:
                members = job.members_of(sample)
            except SkippedImage as error:
                skipped.append(skipped_entry(sample, str(error)))
                continue
            for extension, data in members.items():
                tar.add(f"{sample.image_id:012d}.{extension}", data)
            counts.append(len(sample.captions))
        size, md5sum = tar.finish()
    entry = {"url": job.path.name, "md5sum": md5sum, "nsamples": len(counts), "filesize": size}
    return {**entry, "ncaptions": counts, "skipped": skipped}, False


class _TarStream:
    """USTAR members with fixed times and owners, written in blocks that are hashed in a thread beside."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._pieces: list[bytes] = []
        self._waiting = 0
        self._size = 0
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._hasher = ThreadPoolExecutor(1)
        self._hashed: Future[None] | None = None

    def add(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self._append(member.tobuf(tarfile.USTAR_FORMAT), data, bytes(-len(data) % tarfile.BLOCKSIZE))
        if self._waiting >= BLOCK:
            self._flush()

    def finish(self) -> tuple[int, str]:
        """(size in bytes, md5 in hex) of the whole tar, which ends here."""
        end = 2 * tarfile.BLOCKSIZE
        self._append(bytes(end + -(self._size + end) % tarfile.RECORDSIZE))
        self._flush()
        self._hasher.shutdown()
        return self._size, self._md5.hexdigest()

    def _append(self, *pieces: bytes) -> None:
        self._pieces += pieces
        self._waiting += sum(map(len, pieces))
        self._size += sum(map(len, pieces))

    def _flush(self) -> None:
        block = b"".join(self._pieces)
        self._pieces, self._waiting = [], 0
        # One block may wait for its hash, no more: memory stays bounded.
        if self._hashed is not None:
            self._hashed.result()
        self._hashed = self._hasher.submit(self._md5.update, block)
        view = memoryview(block)
        while view:
            view = view[self._file.write(view) :]


def _digest(samples: Sequence[CocoImage]) -> str:
    """A checksum of what goes into the shards and in which order, file contents aside."""
    sha = hashlib.sha256()
    for sample in samples:
        sha.update(json.dumps([sample.image_id, sample.file_name, sample.captions, sample.caption_ids]).encode())
    return sha.hexdigest()[:16]
