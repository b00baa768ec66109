"""Zero-shot classification: a folder of images by class, class names and prompt templates.

    FOLDER/classnames.txt   one class per line: the sub-folder's name, or sub-folder, tab, name for the prompts
    FOLDER/templates.txt    one prompt per line with {} for the class name: "a photo of a {}."
    FOLDER/<sub-folder>/…   the images of one class

A class is the mean of its prompts' embeddings, as in open_clip. Shape legend: N images, K classes, P templates,
D embed, S image side.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from convclip.data.csv_table import MAX_IMAGE_BYTES
from convclip.data.evaluation_set import PADDING, FixedTransform
from convclip.data.local_files import read_regular
from convclip.data.samples import BrokenSample, decode_image
from convclip.data.tokenizers import Tokenizer
from convclip.distributed import gather, is_main, rank, world_size
from convclip.evaluation.embedding import Encoder
from convclip.schema import MAX_PIXELS, UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class ZeroShotSet:
    """K class names, P templates, and the images' paths [N] with their classes [N]."""

    names: list[str]
    templates: list[str]
    paths: list[Path]
    classes: list[int]

    def prompts(self) -> list[str]:
        """[K*P] every class name in every template, class by class."""
        return [template.replace("{}", name) for name in self.names for template in self.templates]


def load_zero_shot_set(folder: str | Path) -> ZeroShotSet:
    """The set in `folder` (see above). UserError names the file or sub-folder that is missing or does not fit."""
    folder = Path(folder)
    templates = _lines(folder / "templates.txt")
    for template in templates:
        if template.count("{}") != 1:
            raise UserError(f"{folder / 'templates.txt'}: {template!r} needs one {{}} where the class name goes")
    lines = [line.partition("\t") for line in _lines(folder / "classnames.txt")]
    places = [place for place, _, _ in lines]
    if len(set(places)) < len(places):
        raise UserError(f"{folder / 'classnames.txt'}: a sub-folder is named twice")
    present = {path.name for path in folder.iterdir() if path.is_dir()}
    for place in sorted(present.symmetric_difference(places)):
        problem = "has a sub-folder that classnames.txt does not name" if place in present else "has no sub-folder"
        raise UserError(f"zero-shot folder {folder} {problem}: {place}")
    paths, classes = [], []
    for number, place in enumerate(places):
        found = sorted(path for path in (folder / place).iterdir() if path.suffix.lower() in SUFFIXES)
        paths += found
        classes += [number] * len(found)
    if not paths:
        raise UserError(f"zero-shot folder {folder} has no pictures in its sub-folders ({', '.join(sorted(SUFFIXES))})")
    return ZeroShotSet([name.strip() or place for place, _, name in lines], templates, paths, classes)


@torch.no_grad()
def zero_shot_accuracy(
    encoder: Encoder,
    dataset: ZeroShotSet,
    transform: FixedTransform,
    tokenizer: Tokenizer,
    max_pixels: int = MAX_PIXELS,
) -> dict[str, float]:
    """{"top1", "top5": percent, "images", "classes", "broken"}, the same on every rank; all ranks take part.

    An image is right within k when fewer than k other classes score as high as its own: ties and nan count as wrong.
    Images that cannot be decoded are left out and counted as `broken`.
    """
    device = encoder.device
    classes = class_embeddings(encoder, dataset, tokenizer)
    right = torch.tensor(dataset.classes, device=device)
    pictures = _Pictures(dataset.paths, transform, encoder.image_tower.image_size, max_pixels)
    better = torch.full((len(right),), PADDING, device=device)
    batches = _dealt(pictures, len(right), encoder.batch, encoder.workers)
    for numbers, images in _progress(batches, "embedding pictures"):
        numbers = gather(numbers.to(device))
        features = encoder.encode(images=encoder.pixels(images)).image
        assert features is not None  # of a tower that had input
        scores = gather(features.float()) @ classes.T
        real = numbers != PADDING
        numbers, scores = numbers[real], scores[real]
        own = scores.gather(1, right[numbers, None])
        better[numbers] = (scores < own).logical_not_().sum(1) - 1
    whole = better[better != PADDING]
    if not len(whole):
        raise UserError(f"none of the {len(right)} pictures of the zero-shot folder can be decoded")
    accuracy = {f"top{k}": 100 * (whole < k).double().mean().item() for k in (1, 5)}
    return {**accuracy, "images": len(whole), "classes": len(dataset.names), "broken": len(right) - len(whole)}


def class_embeddings(encoder: Encoder, dataset: ZeroShotSet, tokenizer: Tokenizer) -> Tensor:
    """[K, D] float32, unit length: the mean of each class's prompt embeddings; the prompts are dealt to the ranks."""
    prompts = dataset.prompts()
    rows = []
    batches = _dealt(_Prompts(prompts, tokenizer), len(prompts), encoder.batch, 0)
    for numbers, tokens in _progress(batches, "embedding prompts"):
        features = encoder.encode(texts=tokens.to(encoder.device)).text
        assert features is not None  # of a tower that had input
        rows.append(gather(features.float())[gather(numbers.to(encoder.device)) != PADDING])
    of_class = torch.cat(rows).view(len(dataset.names), len(dataset.templates), -1)
    return F.normalize(of_class.mean(1), dim=1)


class _Pictures(Dataset):
    """Number of an image -> (number, uint8 [3, S, S]); a broken or padding one is -1 and black."""

    def __init__(self, paths: list[Path], transform: FixedTransform, size: int, max_pixels: int):
        self.paths, self.transform, self.size, self.max_pixels = paths, transform, size, max_pixels

    def __getitem__(self, number: int) -> tuple[int, Tensor]:
        if number != PADDING:
            path = self.paths[number]
            try:
                return number, self.transform(
                    decode_image(str(path), read_regular(path, MAX_IMAGE_BYTES), self.max_pixels), None
                )
            except (BrokenSample, OSError, ValueError) as error:
                tqdm.write(f"left out: {error}")
        return PADDING, torch.zeros(3, self.size, self.size, dtype=torch.uint8)


class _Prompts(Dataset):
    """Number of a prompt -> (number, int64 [T])."""

    def __init__(self, prompts: list[str], tokenizer: Tokenizer):
        self.prompts, self.tokenizer = prompts, tokenizer

    def __getitem__(self, number: int) -> tuple[int, Tensor]:
        return number, self.tokenizer([self.prompts[number]])[0]


def _dealt(dataset: Dataset, size: int, batch: int, workers: int) -> DataLoader:
    """Batches of items 0..size-1, dealt in turn: all ranks get as many, filled up with number -1.

    Batch j of all ranks together holds the items from j * world * batch on, in order of rank.
    """
    together = world_size() * batch
    plan = []
    for first in range(0, size, together):
        # The last batches may be smaller, but not of different sizes.
        share = min(batch, -(-(size - first) // world_size()))
        start = first + rank() * share
        plan.append([number if number < size else PADDING for number in range(start, start + share)])
    return DataLoader(dataset, batch_sampler=plan, num_workers=workers, generator=torch.Generator())


def _progress(batches: DataLoader, what: str) -> Iterable[Any]:
    return tqdm(batches, what, disable=not is_main(), leave=False, delay=2)


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{path} is empty: give one entry per line")
    return lines
