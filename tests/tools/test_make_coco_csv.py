"""tools/make_coco_csv.py: the table as the csv module and open_clip read it; failures in one line."""

import csv
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
CAPTIONS = {
    "plain.jpg": ["a dog", "two dogs"],
    "with, comma.jpg": ['he said "hi", and left', "line one\nline two", "größe, été, 犬", " spaces "],
    "none.jpg": [],
}


@pytest.fixture
def source(tmp_path) -> Path:
    (tmp_path / "images").mkdir()
    table = {"images": [], "annotations": []}
    for number, (name, captions) in enumerate(CAPTIONS.items()):
        (tmp_path / "images" / name).touch()
        table["images"].append({"id": number, "file_name": name})
        for caption in captions:
            row = {"id": len(table["annotations"]), "image_id": number, "caption": caption}
            table["annotations"].append(row)
    (tmp_path / "captions.json").write_text(json.dumps(table))
    return tmp_path


def run(source: Path, *more: object, **options) -> subprocess.CompletedProcess:
    fixed = ["--annotations", source / "captions.json", "--images", source / "images", "--output", source / "train.csv"]
    command = [sys.executable, REPOSITORY / "tools" / "make_coco_csv.py", *fixed, *more]
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=REPOSITORY, check=False, **options
    )


def assert_one_line(done: subprocess.CompletedProcess, *words: str) -> None:
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("make_coco_csv: ") and all(word in last for word in words), done.stderr


def test_one_row_per_caption_with_open_clips_columns(source):
    done = run(source)
    assert done.returncode == 0 and "6 rows of 2 images" in done.stdout, done.stderr
    with (source / "train.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter=","))
    expected = [(str(source / "images" / name), caption) for name, five in CAPTIONS.items() for caption in five]
    assert [(row["filepath"], row["title"]) for row in rows] == expected
    assert all(Path(row["filepath"]).is_file() and set(row) == {"filepath", "title"} for row in rows)
    assert not (source / "train.csv.part").exists()


def test_pandas_as_open_clip_uses_it_reads_the_same(source):
    pandas = pytest.importorskip("pandas", reason="pandas, which open_clip's csv reader uses, is not installed")
    assert run(source).returncode == 0
    table = pandas.read_csv(source / "train.csv", sep=",")
    assert table["title"].tolist() == [caption for five in CAPTIONS.values() for caption in five]


def test_missing_images_are_counted_and_named(source):
    (source / "images" / "plain.jpg").unlink()
    assert_one_line(run(source), "lacks 1 of 3", "'plain.jpg'")
    assert not (source / "train.csv").exists()


def test_mistakes_are_one_line(source):
    assert_one_line(run(source, "--annotations", source / "no.json"), "no.json cannot be read")
    assert_one_line(run(source, "--annotations", source / "images" / "plain.jpg"), "not JSON")
    assert_one_line(run(source, "--images", source / "no"), "images folder")
    assert_one_line(run(source, "--output", source / "no" / "train.csv"), "cannot be written: No such file")
    assert_one_line(run(source, "--output", source / "images"), "cannot be written")
    assert not list(source.rglob("*.part"))


def test_a_full_output_keeps_the_earlier_table(source):
    (source / "train.csv").write_text("earlier")
    limit = (200, resource.RLIM_INFINITY)
    done = run(source, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    assert_one_line(done, "cannot be written: File too large")
    assert (source / "train.csv").read_text() == "earlier" and not (source / "train.csv.part").exists()


def test_no_captions_at_all(source):
    (source / "captions.json").write_text(json.dumps({"images": [], "annotations": []}))
    assert_one_line(run(source), "holds no captions")


@pytest.mark.realdata
@pytest.mark.parametrize(("name", "split", "rows"), [("coco", "train2017", 150), ("flickr8k", "train", 10000)])
def test_real_annotations(realdata, source, name, split, rows):
    annotations = realdata / name / "annotations" / f"captions_{split}.json"
    done = run(source, "--annotations", annotations, "--images", realdata / name / split)
    assert done.returncode == 0, done.stderr
    with (source / "train.csv").open(encoding="utf-8", newline="") as file:
        written = {(Path(row["filepath"]).name, row["title"]) for row in csv.DictReader(file)}
    table = json.loads(annotations.read_text())
    names = {image["id"]: image["file_name"] for image in table["images"]}
    assert written == {(names[row["image_id"]], row["caption"]) for row in table["annotations"]}
    assert f"{rows} rows" in done.stdout
