"""tools/make_demo_data.py: layout, distinct val scenes, captions that tell pictures apart, failures in one line."""

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[2]


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPOSITORY / "tools" / "make_demo_data.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "data"
    done = run("--output_dir", folder, "--train", 60, "--val", 240, "--size", 48)
    assert done.returncode == 0, done.stderr
    return folder


def captions_of(folder: Path, split: str) -> dict[str, list[str]]:
    table = json.loads((folder / "annotations" / f"captions_{split}.json").read_text())
    names = {image["id"]: image["file_name"] for image in table["images"]}
    captions = defaultdict(list)
    for annotation in table["annotations"]:
        captions[names[annotation["image_id"]]].append(annotation["caption"])
    assert len({annotation["id"] for annotation in table["annotations"]}) == len(table["annotations"])
    return captions


def test_layout_is_coco_with_five_captions(demo):
    for split, count in (("train", 60), ("val", 240)):
        captions = captions_of(demo, split)
        assert len(captions) == count and {len(five) for five in captions.values()} == {5}
        assert sorted(captions) == sorted(path.name for path in (demo / split).iterdir())
        for name in captions:
            with Image.open(demo / split / name) as image:
                assert image.size == (48, 48) and image.format == "JPEG"
    assert not set(captions_of(demo, "train")) & set(captions_of(demo, "val"))


def test_no_caption_of_a_val_picture_fits_another(demo):
    """Each wording by itself tells the 240 pictures apart, and no val picture's wording occurs in train."""
    val = [caption for five in captions_of(demo, "val").values() for caption in five]
    assert len(set(val)) == len(val) == 1200
    train = {caption for five in captions_of(demo, "train").values() for caption in five}
    assert not train & set(val)


def test_pictures_show_what_the_captions_say(demo):
    """The named colours are really in the picture, and colours that no caption names are not."""
    from tools.make_demo_data import COLOURS

    for name, five in list(captions_of(demo, "val").items())[:40]:
        with Image.open(demo / "val" / name) as image:
            pixels = np.asarray(image.convert("RGB"), dtype=int)
        for colour, rgb in COLOURS.items():
            near = int((np.abs(pixels - rgb).sum(axis=-1) < 40).sum())
            named = any(f" {colour} " in caption for caption in five)
            assert (near >= 12) == named, (name, colour, near, five)


def test_same_seed_same_bytes_and_other_seed_other_pictures(demo, tmp_path):
    assert run("--output_dir", tmp_path / "same", "--train", 60, "--val", 240, "--size", 48).returncode == 0
    files = sorted(path.relative_to(demo) for path in demo.rglob("*") if path.is_file())
    assert all((demo / path).read_bytes() == (tmp_path / "same" / path).read_bytes() for path in files)
    assert run("--output_dir", tmp_path / "other", "--train", 2, "--val", 5, "--seed", 1).returncode == 0
    assert captions_of(tmp_path / "other", "val") != dict(list(captions_of(demo, "val").items())[:5])


def test_second_run_keeps_the_folder_and_refuses_another_set(demo):
    before = (demo / "annotations" / "captions_val.json").stat().st_mtime_ns
    again = run("--output_dir", demo, "--train", 60, "--val", 240, "--size", 48)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    assert (demo / "annotations" / "captions_val.json").stat().st_mtime_ns == before
    other = run("--output_dir", demo, "--train", 61, "--val", 240, "--size", 48)
    assert_one_line(other, str(demo))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(("--train", 0), "--train"), (("--size", 3), "--size"), (("--val", 5000), "--val"), (("--train", "x"), "--train")],
)
def test_bad_arguments_are_one_line(tmp_path, arguments, word):
    done = run("--output_dir", tmp_path / "d", *arguments)
    assert done.returncode == 2 and word in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert not (tmp_path / "d").exists()


def test_unwritable_output_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    assert_one_line(run("--output_dir", tmp_path / "file" / "d", "--train", 2, "--val", 2), "cannot be written")


def assert_one_line(done: subprocess.CompletedProcess, word: str) -> None:
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and word in done.stderr, done.stderr
