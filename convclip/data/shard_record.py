"""The record of a split's finished shards, so that a stopped run can go on: a journal, then the index.

`<split>.index.json`: the wids index of finished shards, with the run's parameters and, per shard, the skipped samples.
`<split>.index.json.part`: the same while shards are still missing, as JSON lines: parameters, then a line per shard.
`<split>.skipped.jsonl`: the samples that no shard holds, and why.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from convclip.files import append_line, write_text
from convclip.schema import UserError

# {url, md5sum, nsamples, filesize, ncaptions (of each sample), skipped} of a shard, or a line of <split>.skipped.jsonl.
Entry = dict[str, Any]


class ShardRecord:
    """The record of one split in `folder`. `parameters` are those of this run; an earlier run's must be the same.

    Attributes: entries (by shard file name). Errors: UserError for a record of other parameters, for one that cannot
    be read, and for shards without a record: they are not this tool's to overwrite.
    """

    def __init__(self, folder: Path, split: str, parameters: Entry) -> None:
        self.folder = folder
        self.index = folder / f"{split}.index.json"
        self.journal = folder / f"{split}.index.json.part"
        self.skipped = folder / f"{split}.skipped.jsonl"
        self.parameters = parameters
        self.entries: dict[str, Entry] = {}
        shard_names = f"{split}-{'[0-9]' * 6}.tar"
        shards = sorted(folder.glob(shard_names))
        if shards and not self.index.exists() and not self.journal.exists():
            raise UserError(f"{folder} holds {shards[0].name} but no record of it: name another folder or remove it")
        # The journal comes second: it is newer where a finished split is being repaired.
        for path, is_journal in ((self.index, False), (self.journal, True)):
            if path.exists():
                self._read(path, is_journal)
        for stale in folder.glob(f"{shard_names}.*.part"):
            stale.unlink(missing_ok=True)
        write_text(self.journal, _json_lines([{"parameters": parameters}, *self.entries.values()]))

    def add(self, entry: Entry) -> None:
        """Note a shard that stands under its final name."""
        self.entries[entry["url"]] = entry
        append_line(self.journal, json.dumps(entry))

    def in_order(self) -> list[Entry]:
        """Entries by shard number."""
        return [self.entries[name] for name in sorted(self.entries)]

    def finish(self, skipped: Iterable[Entry]) -> None:
        """All shards stand: write the index and the list of skipped samples."""
        write_text(self.skipped, _json_lines(skipped))
        head = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "parameters": self.parameters}
        write_text(self.index, json.dumps({**head, "shardlist": self.in_order()}))
        self.journal.unlink()

    def discard(self) -> None:
        """Remove the recorded shards and the journal."""
        for name in self.entries:
            (self.folder / name).unlink(missing_ok=True)
        self.journal.unlink()

    def _read(self, path: Path, is_journal: bool) -> None:
        try:
            text = path.read_text(encoding="utf-8-sig")
            if is_journal:
                # A killed run may have left half a last line: its shard is written again.
                head, *entries = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
            else:
                head = json.loads(text)
                entries = head["shardlist"]
            earlier = head["parameters"]
            found = {entry["url"]: entry for entry in entries if {"md5sum", "filesize", "skipped"} <= entry.keys()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path} is not a record of this tool's: name another folder or remove it") from None
        self._compare(path, earlier)
        self.entries.update(found)

    def _compare(self, path: Path, earlier: Entry) -> None:
        now = self.parameters
        differ = sorted(key for key in now.keys() | earlier.keys() if now.get(key) != earlier.get(key))
        if differ:
            told = ", ".join(f"{key} {earlier.get(key)} where this run has {now.get(key)}" for key in differ)
            raise UserError(f"{path} was written with {told}: use the same, or name another folder")


def matches(path: Path, entry: Entry) -> bool:
    """Whether the shard at `path` has the size and md5 sum of its entry."""
    try:
        if path.stat().st_size != entry["filesize"]:
            return False
        md5 = hashlib.md5(usedforsecurity=False)
        with path.open("rb") as file:
            while block := file.read(1024 * 1024):
                md5.update(block)
        return md5.hexdigest() == entry["md5sum"]
    except FileNotFoundError:
        return False


def _json_lines(entries: Iterable[Entry]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)
