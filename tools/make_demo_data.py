"""Draw a small retrieval data set: pictures of coloured shapes, five captions each, in COCO's layout.

    python tools/make_demo_data.py --output_dir demo/data [--train 2000] [--val 240] [--size 64] [--seed 0]

Writes train/, val/ and annotations/captions_{train,val}.json; needs no download. The folder appears whole or not at
all. The pair of objects in a val picture is its own: no other val picture and no train picture has it.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw
from tqdm import tqdm

from convclip.command_line import run
from convclip.files import whole_folder
from convclip.schema import UserError

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "moon")
COLOURS = {
    "red": (210, 35, 35),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (250, 225, 40),
    "orange": (245, 130, 20),
    "purple": (130, 45, 175),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
}
BACKGROUNDS = {"grey": (150, 150, 150), "brown": (120, 85, 60), "pink": (245, 175, 195), "teal": (90, 170, 170)}
# Radius as a share of the picture's side.
SIZES = {"small": 0.13, "large": 0.21}
# Drawn this many times larger, then averaged down: Pillow draws without anti-aliasing.
SUPERSAMPLE = 4
PAIRS = math.comb(len(SHAPES), 2) * math.comb(len(COLOURS), 2) * 2


@dataclass(frozen=True)
class Item:
    """One object of a scene; (x, y) is its centre as a share of the side."""

    shape: str
    colour: str
    size: str
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """Two objects, the first left of or above the second, on a plain background."""

    first: Item
    second: Item
    relation: str
    background: str

    def pair(self) -> frozenset[tuple[str, str]]:
        """What even the shortest caption tells: which two shapes in which colours."""
        return frozenset((item.shape, item.colour) for item in (self.first, self.second))


def random_scene(rng: random.Random) -> Scene:
    """Two objects that differ in shape and in colour, each near its place in the picture."""
    shapes, colours = rng.sample(SHAPES, 2), rng.sample(sorted(COLOURS), 2)
    relation = rng.choice(("left", "above"))
    places = ((0.26, 0.5), (0.74, 0.5)) if relation == "left" else ((0.5, 0.26), (0.5, 0.74))
    first, second = (
        Item(shape, colour, rng.choice(sorted(SIZES)), x + rng.uniform(-0.03, 0.03), y + rng.uniform(-0.03, 0.03))
        for shape, colour, (x, y) in zip(shapes, colours, places, strict=True)
    )
    return Scene(first, second, relation, rng.choice(sorted(BACKGROUNDS)))


def make_scenes(train: int, val: int, seed: int) -> tuple[list[Scene], list[Scene]]:
    """(train, val) scenes. No val pair of objects stands twice in val, or in train at all."""
    if val > PAIRS // 2:
        raise UserError(f"--val {val} is more than {PAIRS // 2}: there are only {PAIRS} pairs of objects, half for val")
    rng = random.Random(seed)
    by_pair: dict[frozenset[tuple[str, str]], Scene] = {}
    while len(by_pair) < val:
        scene = random_scene(rng)
        by_pair.setdefault(scene.pair(), scene)
    train_scenes: list[Scene] = []
    while len(train_scenes) < train:
        scene = random_scene(rng)
        if scene.pair() not in by_pair:
            train_scenes.append(scene)
    return train_scenes, list(by_pair.values())


def captions(scene: Scene) -> list[str]:
    """Five wordings of a scene. Each names both objects with their colours; size, place and background vary."""
    first, second = scene.first, scene.second
    before, after = ("left of", "right of") if scene.relation == "left" else ("above", "below")
    short_1, short_2 = (f"{item.colour} {item.shape}" for item in (first, second))
    long_1, long_2 = (f"{item.size} {item.colour} {item.shape}" for item in (first, second))
    background = f"on a {scene.background} background"
    return [
        f"a {long_1} {before} a {long_2}",
        f"a {long_2} {after} a {long_1} {background}",
        f"a picture of a {short_1} and a {short_2} {background}",
        f"there is a {short_2} {after} a {short_1}",
        f"two shapes, a {long_1} and a {long_2}, {background}",
    ]


def polygon(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Corners of `shape` about (x, y), in pixels."""
    if shape == "square":
        side = 0.82 * radius
        corners = [(-side, -side), (side, -side), (side, side), (-side, side)]
    elif shape == "triangle":
        corners = [(0, -radius), (0.95 * radius, 0.8 * radius), (-0.95 * radius, 0.8 * radius)]
    elif shape == "cross":
        long, arm = radius, 0.33 * radius
        quarter = [(arm, -long), (arm, -arm), (long, -arm)]
        corners = [point for turn in range(4) for point in _turned(quarter, turn)]
    elif shape == "star":
        radii = (radius, 0.42 * radius)
        angles = [math.pi * step / 5 for step in range(10)]
        corners = [(radii[i % 2] * math.sin(a), -radii[i % 2] * math.cos(a)) for i, a in enumerate(angles)]
    else:
        raise ValueError(f"{shape} has no corners")
    return [(x + dx, y + dy) for dx, dy in corners]


def _turned(points: list[tuple[float, float]], quarters: int) -> list[tuple[float, float]]:
    for _ in range(quarters):
        points = [(-y, x) for x, y in points]
    return points


def draw_item(canvas: ImageDraw.ImageDraw, item: Item, side: int, background: tuple[int, int, int]) -> None:
    """Draw one object on a canvas of `side` pixels; `background` fills the holes of rings and moons."""
    x, y, radius, colour = item.x * side, item.y * side, SIZES[item.size] * side, COLOURS[item.colour]

    def disc(dx: float, dy: float, share: float, fill: tuple[int, int, int]) -> None:
        r = share * radius
        canvas.ellipse((x + dx * radius - r, y + dy * radius - r, x + dx * radius + r, y + dy * radius + r), fill=fill)

    if item.shape in ("circle", "ring", "moon"):
        disc(0, 0, 1.0, colour)
        if item.shape == "ring":
            disc(0, 0, 0.5, background)
        elif item.shape == "moon":
            disc(0.5, 0, 0.8, background)
    elif item.shape == "heart":
        disc(-0.45, -0.3, 0.5, colour)
        disc(0.45, -0.3, 0.5, colour)
        points = [(-0.9, -0.1), (0, -0.45), (0.9, -0.1), (0, 0.95)]
        canvas.polygon([(x + dx * radius, y + dy * radius) for dx, dy in points], fill=colour)
    else:
        canvas.polygon(polygon(item.shape, x, y, radius), fill=colour)


def picture(scene: Scene, size: int) -> bytes:
    """The scene as JPEG bytes, `size` x `size` pixels."""
    side = size * SUPERSAMPLE
    background = BACKGROUNDS[scene.background]
    image = Image.new("RGB", (side, side), background)
    canvas = ImageDraw.Draw(image)
    for item in (scene.first, scene.second):
        draw_item(canvas, item, side, background)
    stream = io.BytesIO()
    image.reduce(SUPERSAMPLE).save(stream, "JPEG", quality=92, subsampling=0)
    return stream.getvalue()


def write_split(folder: Path, split: str, scenes: list[Scene], first_id: int, size: int, info: dict) -> None:
    """Write one split's pictures and its annotations into `folder`."""
    (folder / split).mkdir()
    images, annotations = [], []
    for image_id, scene in enumerate(tqdm(scenes, desc=split, unit="picture", mininterval=1), start=first_id):
        name = f"{image_id:012d}.jpg"
        (folder / split / name).write_bytes(picture(scene, size))
        images.append({"id": image_id, "file_name": name, "width": size, "height": size})
        wordings = captions(scene)
        # Readers take the k-th captions of all pictures together: no wording should stand at one place only.
        random.Random(image_id).shuffle(wordings)
        for index, caption in enumerate(wordings):
            annotations.append({"id": image_id * 5 + index, "image_id": image_id, "caption": caption})
    text = json.dumps({"info": info, "images": images, "annotations": annotations})
    (folder / "annotations" / f"captions_{split}.json").write_text(text, encoding="utf-8")


def make_demo_data(output_dir: Path, train: int, val: int, size: int, seed: int) -> None:
    """Write the whole data set to `output_dir`, which must be absent, empty or hold the same data set already."""
    info = {"description": "convclip demo pictures", "train": train, "val": val, "size": size, "seed": seed}
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        if _info_of(output_dir) == info:
            print(f"{output_dir} already holds this data set: nothing to do")
            return
        raise UserError(f"{output_dir} exists and holds something else: remove it or name another --output_dir")
    train_scenes, val_scenes = make_scenes(train, val, seed)
    with whole_folder(output_dir, "--output_dir") as part:
        (part / "annotations").mkdir()
        write_split(part, "train", train_scenes, 1, size, info)
        write_split(part, "val", val_scenes, 1 + train, size, info)
    print(f"{output_dir}: {train} train and {val} val pictures of {size}x{size}, five captions each")


def _info_of(folder: Path) -> dict | None:
    try:
        return json.loads((folder / "annotations" / "captions_val.json").read_text(encoding="utf-8"))["info"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--train", type=int, default=2000, help="train pictures")
    parser.add_argument("--val", type=int, default=240, help="val pictures")
    parser.add_argument("--size", type=int, default=64, help="side in pixels")
    parser.add_argument("--seed", type=int, default=0)
    return run("make_demo_data", make, parser.parse_args(), ", nothing was written")


def make(args: argparse.Namespace) -> None:
    if min(args.train, args.val) < 1 or not 16 <= args.size <= 1024:
        raise UserError("--train and --val are at least 1 and --size is 16 to 1024")
    try:
        make_demo_data(args.output_dir, args.train, args.val, args.size, args.seed)
    except OSError as error:
        raise UserError(f"{args.output_dir} cannot be written: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
