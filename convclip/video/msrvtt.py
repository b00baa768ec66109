"""MSR-VTT as distributed: annotation JSON, split CSVs, video files; any data set in that layout works.

Shapes: V videos, C captions, W words.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.tokenizer import SimpleTokenizer

from convclip.data.coco import SURROGATE
from convclip.data.local_files import read_json, refuse_irregular
from convclip.data.samples import MAX_CAPTION
from convclip.schema import UserError

WORDS = 32
VIDEO_SUFFIXES = (".mp4", ".webm", ".avi", ".mkv", ".mov")


@dataclass(frozen=True)
class VideoSplit:
    """Videos in the CSV's order, and their captions.

    video_ids: V names; captions: C texts; caption_ids: C names; video_of_caption: int64 [C], places in video_ids.
    """

    video_ids: tuple[str, ...]
    captions: tuple[str, ...]
    caption_ids: tuple[str, ...]
    video_of_caption: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """int64 [V]: captions of each video."""
        return np.bincount(self.video_of_caption, minlength=len(self.video_ids))

    def checksum(self) -> str:
        """What identifies the split: its names and captions."""
        content = json.dumps([self.video_ids, self.captions, self.caption_ids])
        return hashlib.sha256(content.encode("ascii")).hexdigest()[:16]

    def without(self, video_ids: Sequence[str]) -> VideoSplit:
        """The split with these videos (such as those that cannot be decoded) and their captions left out."""
        gone = set(video_ids)
        kept = [i for i, name in enumerate(self.video_ids) if name not in gone]
        place = {old: new for new, old in enumerate(kept)}
        rows = [c for c, video in enumerate(self.video_of_caption.tolist()) if video in place]
        return VideoSplit(
            tuple(self.video_ids[i] for i in kept),
            tuple(self.captions[c] for c in rows),
            tuple(self.caption_ids[c] for c in rows),
            np.array([place[int(self.video_of_caption[c])] for c in rows], dtype=np.int64),
        )


def read_split(csv_path: str | Path, annotations: str | Path | None = None) -> VideoSplit:
    """The split a CSV names: with a `sentence` column (1k-A test) its own rows, else (9k, 7k) every caption that the
    annotation JSON (or .json.gz) has for its videos, in the JSON's order within a video.

    UserError: a file or column is missing, a video is listed twice, or has no caption.
    """
    rows = _read_csv(Path(csv_path))
    if "sentence" in rows[0]:
        return _split_of_rows(rows)
    if annotations is None:
        raise UserError(f"{csv_path} has no column sentence: name the annotation JSON too, whose captions it needs")
    video_ids = [row["video_id"] for row in rows]
    twice = [name for name, count in Counter(video_ids).items() if count > 1]
    if twice:
        raise UserError(f"{csv_path} lists {len(twice)} videos twice, the first is {twice[0]}")
    captions: dict[str, list[tuple[str, str]]] = {name: [] for name in video_ids}
    for sentence in _read_sentences(Path(annotations)):
        if sentence["video_id"] in captions:
            captions[sentence["video_id"]].append((str(sentence["sen_id"]), sentence["caption"]))
    silent = [name for name, own in captions.items() if not own]
    if silent:
        raise UserError(
            f"{annotations} has no caption for {len(silent)} videos of {csv_path}, the first is {silent[0]}"
        )
    flat = [(video, *own) for video, name in enumerate(video_ids) for own in captions[name]]
    videos, ids, texts = zip(*flat, strict=True)
    return VideoSplit(tuple(video_ids), texts, ids, np.array(videos, dtype=np.int64))


def read_video_ids(csv_path: str | Path) -> list[str]:
    """The videos a CSV names, each once, in its order. UserError as `read_split`."""
    return list(dict.fromkeys(row["video_id"] for row in _read_csv(Path(csv_path))))


def find_videos(folder: str | Path, video_ids: Sequence[str]) -> dict[str, Path]:
    """Path of each video, in the given order; `<folder>/<id>.mp4` where there is no file of any known suffix."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder of videos at {folder}")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir(), key=lambda p: (p.suffix != ".mp4", p.name)):
        if path.suffix.lower() in VIDEO_SUFFIXES:
            found.setdefault(path.stem, path)
    return {name: found.get(name, folder / f"{name}.mp4") for name in video_ids}


def tokenize_captions(captions: Sequence[str], words: int = WORDS) -> torch.Tensor:
    """int64 [C, W] of CLIP's byte-pair ids: padded with 0, longer captions cut so that the end-of-text token stays."""
    return SimpleTokenizer(context_length=words)(list(captions))


def _read_csv(path: Path) -> list[dict[str, str]]:
    refuse_irregular(path, "split")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"split {path} cannot be read: {error}") from None
    if not rows or "video_id" not in rows[0]:
        raise UserError(f"split {path} has no rows with a column video_id")
    twice = [name for name, count in Counter(reader.fieldnames or []).items() if count > 1]
    if {"video_id", "sentence", "key"} & set(twice):
        raise UserError(f"split {path} has several columns {twice[0]}: rename or remove all but one")
    long = [number for number, row in enumerate(rows, 2) if len(row.get("sentence") or "") > MAX_CAPTION]
    if long:
        raise UserError(f"split {path}: row {long[0]} has a sentence of more than {MAX_CAPTION} characters")
    bad = [number for number, row in enumerate(rows, 2) if not row["video_id"] or row.get("sentence", "") is None]
    if bad:
        raise UserError(f"split {path}: line {bad[0]} is incomplete")
    return rows


def _split_of_rows(rows: list[dict[str, str]]) -> VideoSplit:
    place = {name: number for number, name in enumerate(dict.fromkeys(row["video_id"] for row in rows))}
    ids = tuple(row.get("key") or str(number) for number, row in enumerate(rows))
    videos = np.array([place[row["video_id"]] for row in rows], dtype=np.int64)
    return VideoSplit(tuple(place), tuple(row["sentence"] for row in rows), ids, videos)


def _read_sentences(path: Path) -> list[dict[str, Any]]:
    what = "MSR-VTT's JSON (sentences of sen_id, video_id, caption)"
    try:
        content = read_json(path, "the file")
    except UserError as error:
        raise UserError(f"annotations {path} are not {what}: {error}") from None
    sentences = content.get("sentences") if isinstance(content, dict) else None
    if not isinstance(sentences, list):
        raise UserError(f"annotations {path} are not {what}: no list under the key 'sentences'")
    for number, sentence in enumerate(sentences):
        if not isinstance(sentence, dict) or not all(_is_name(sentence.get(key)) for key in ("sen_id", "video_id")):
            raise UserError(f"annotations {path} are not {what}: sentence {number} has no sen_id or video_id")
        caption = sentence.get("caption")
        if not isinstance(caption, str) or len(caption) > MAX_CAPTION or SURROGATE.search(caption):
            raise UserError(
                f"annotations {path} are not {what}: the caption of sentence {number} is no text of at most "
                f"{MAX_CAPTION} characters"
            )
    return sentences


def _is_name(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)
