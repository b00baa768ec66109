"""Write a CSV table of (filepath, title), one row per caption, from captions in COCO's layout.

    python tools/make_coco_csv.py --annotations captions_train2017.json --images train2017 --output train.csv
        [--split train]

open_clip reads it with --csv-img-key filepath --csv-caption-key title --csv-separator ",". `filepath` is the image
folder as given joined with the file name, so a relative folder makes a table that is read from the same directory.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

from tqdm import tqdm

from convclip.command_line import run
from convclip.data.coco import missing_files, read_coco
from convclip.files import whole_file
from convclip.schema import UserError


def make_coco_csv(annotations: Path, folder: Path, output: Path, split: str | None = None) -> tuple[int, int]:
    """Write the table and return how many (rows, images) it holds; the file appears whole or not at all."""
    images = read_coco(annotations, split)
    missing_files(images, folder, "check --images")
    rows = [(str(folder / image.file_name), caption) for image in images for caption in image.captions]
    if not rows:
        raise UserError(f"{annotations} holds no captions")
    with whole_file(output, "--output") as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("filepath", "title"))
        writer.writerows(tqdm(rows, desc=output.name, unit="row", mininterval=1))
    return len(rows), sum(bool(image.captions) for image in images)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--annotations", type=Path, required=True, help="COCO's or Karpathy's captions (.json or .json.gz)"
    )
    parser.add_argument("--images", type=Path, required=True, help="folder of the image files")
    parser.add_argument("--output", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--split", help="of Karpathy's splits, the one to take; train takes restval too")
    return run("make_coco_csv", make, parser.parse_args(), ", nothing was written")


def make(args: argparse.Namespace) -> None:
    rows, images = make_coco_csv(args.annotations, args.images, args.output, args.split)
    print(f"{args.output}: {rows} rows of {images} images")


if __name__ == "__main__":
    sys.exit(main())
