"""A CSV file of image paths and captions, one caption per row, as open_clip_train reads it.

Rows of one path are one image with several captions, so that the order of an epoch is the same as for shards.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from convclip.data.local_files import read_regular, reason_of, refuse_irregular
from convclip.data.samples import BrokenSample, Captions
from convclip.schema import Data, UserError

# Images looked for at start: a wrong folder shows there, one lost image does not.
PROBED_IMAGES = 20
MAX_IMAGE_BYTES = 1 << 28
# Python's own bound on a cell, 131,072 characters, would cost the file for one long caption, which costs its row here.
MAX_CELL = 1 << 22
SHOWN = 200


class CsvTable:
    """The rows of a CSV file as a SampleSource; images are numbered by first appearance, captions by row.

    Relative image paths start at the present folder, as in open_clip, or at the CSV file's folder: at the one where
    more of the first images exist.

    Raises:
        UserError: the file or a column is missing, it holds no rows, or none of its first images exists.
    """

    def __init__(self, path: str, data: Data):
        self.path = path
        self.images: list[str] = []
        self.texts: list[list[str]] = []
        self.rows: list[list[int]] = []
        self._read(data)
        if not self.images:
            raise UserError(f"{path} holds no rows below its header")
        self.damage: list[str] = []
        self.lost = 0
        self.counts = np.array([len(texts) for texts in self.texts], dtype=np.int64)
        self.shard = np.zeros(len(self.images), dtype=np.int32)
        self.folder = self._find_folder()

    def describe(self) -> str:
        """One line for the log."""
        return f"{self.path}: {len(self.images):,} images, {int(self.counts.sum()):,} captions"

    def name(self, image: int) -> str:
        """`<csv>:<image path>`, the path as the file has it."""
        return f"{os.path.basename(self.path)}:{self.images[image]}"

    def read_captions(self, image: int) -> Captions:
        """All captions of an image; ids are row numbers from 0."""
        return Captions(image, self.texts[image], self.rows[image])

    def read_image(self, image: int) -> bytes:
        """The image file's bytes."""
        try:
            return read_regular(self._locate(image), MAX_IMAGE_BYTES)
        except (OSError, ValueError) as error:
            raise BrokenSample(f"{self.name(image)}: {reason_of(error)}") from None

    def _locate(self, image: int) -> Path:
        return self.folder / self.images[image]

    def _read(self, data: Data) -> None:
        # surrogateescape: a caption in another encoding breaks its own row when it is read, not the file.
        refuse_irregular(self.path, "data file")
        csv.field_size_limit(MAX_CELL)
        try:
            with open(self.path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
                # strict: a quote that is never closed would take the rest of the file into its cell.
                reader = csv.DictReader(file, delimiter=_separator(data.csv_separator), strict=True)
                self._check_columns(reader.fieldnames or [], data)
                self._group(reader, data)
        except OSError as error:
            raise UserError(f"data file {self.path} cannot be read: {error.strerror}") from None
        except csv.Error as error:
            raise UserError(
                f"{self.path} is no readable CSV file (line {reader.reader.line_num}: {error}): a cell that begins "
                "with a quote must end with one, and a quote inside it stands twice"
            ) from None

    def _check_columns(self, present: Sequence[str], data: Data) -> None:
        for key, field in ((data.csv_image_key, "csv_image_key"), (data.csv_caption_key, "csv_caption_key")):
            if key not in present:
                raise UserError(
                    f"{self.path} has no column {key!r}; with separator {data.csv_separator!r} its columns are "
                    f"{', '.join(map(repr, present)) or 'none'}: set data.{field} or data.csv_separator"
                )
            if present.count(key) > 1:
                raise UserError(f"{self.path} has {present.count(key)} columns {key!r}: rename or remove all but one")

    def _group(self, reader: csv.DictReader, data: Data) -> None:
        numbers: dict[str, int] = {}
        for row, fields in enumerate(reader):
            path = fields[data.csv_image_key] or ""
            image = numbers.setdefault(path, len(numbers))
            if image == len(self.images):
                self.images.append(path)
                self.texts.append([])
                self.rows.append([])
            # A short row has None where a column is missing: an empty caption, which breaks when it is read.
            self.texts[image].append(fields[data.csv_caption_key] or "")
            self.rows[image].append(row)

    def _find_folder(self) -> Path:
        """The folder that relative image paths are relative to."""
        first = self.images[:PROBED_IMAGES]
        here, beside = Path.cwd(), Path(self.path).resolve().parent
        found = {folder: sum(os.path.isfile(folder / image) for image in first) for folder in (here, beside)}
        if not any(found.values()):
            raise UserError(
                f"none of the first {len(first)} images of {self.path} exists, the first is {first[0][:SHOWN]}: "
                f"relative paths are relative to the present folder or to the CSV file's"
            )
        return max(found, key=lambda folder: found[folder])


def _separator(separator: str) -> str:
    """The separator itself; the two characters \\t, as shells hand them over, mean a tab."""
    separator = separator.replace("\\t", "\t")
    if len(separator) != 1:
        raise UserError(f"data.csv_separator {separator!r} must be one character")
    return separator
