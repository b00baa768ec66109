"""Reading COCO-layout captions: what is read, and one line that names the file for each way they can be wrong."""

import gzip
import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from convclip.data.coco import CocoImage, missing_files, read_coco
from convclip.schema import UserError


def write(folder: Path, images: list, annotations: list) -> Path:
    path = folder / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


IMAGES = [{"id": 7, "file_name": "b.jpg"}, {"id": 3, "file_name": "sub/a.jpg"}, {"id": 9, "file_name": "c.png"}]
ANNOTATIONS = [
    {"id": 20, "image_id": 3, "caption": "Two dogs. "},
    {"id": 10, "image_id": 7, "caption": "Ein Café\nam Meer"},
    {"id": 11, "image_id": 3, "caption": "dogs, two"},
    {"id": 12, "image_id": 3, "caption": " \n"},
]


def test_captions_are_grouped_in_the_files_order_and_stay_verbatim(tmp_path):
    assert read_coco(write(tmp_path, IMAGES, ANNOTATIONS)) == [
        CocoImage(7, "b.jpg", ("Ein Café\nam Meer",), (10,)),
        CocoImage(3, "sub/a.jpg", ("Two dogs. ", "dogs, two"), (20, 11)),
        CocoImage(9, "c.png", (), ()),
    ]


def test_missing_files_looks_into_sub_folders(tmp_path):
    images = read_coco(write(tmp_path, IMAGES, ANNOTATIONS))
    assert missing_files(images, tmp_path) == ["b.jpg", "sub/a.jpg", "c.png"]
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.jpg").touch()
    (tmp_path / "c.png").touch()
    assert missing_files(images, tmp_path) == ["b.jpg"]
    with pytest.raises(UserError, match=r"lacks 1 of 3 image files \('b.jpg'\): look again"):
        missing_files(images, tmp_path, "look again")
    with pytest.raises(UserError, match=r"images folder .* cannot be read"):
        missing_files(images, tmp_path / "nowhere")


def test_missing_files_names_the_first_three(tmp_path):
    images = [CocoImage(i, f"{i}.jpg", ("x",), (i,)) for i in range(50)]
    with pytest.raises(UserError, match=r"lacks 50 of 50 image files \('0.jpg', '1.jpg', '2.jpg', …\)"):
        missing_files(images, tmp_path, "look again")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": None}, "no list under the key 'images'"),
        ({"annotations": {}}, "no list under the key 'annotations'"),
        ({"images": [{"id": 1}, *IMAGES]}, r'1 images entries without .*file_name \({"id": 1}\)'),
        ({"images": [{"id": "1", "file_name": "x"}, *IMAGES]}, "without an integer id"),
        ({"images": [{"id": -1, "file_name": "x"}, *IMAGES]}, "without an integer id"),
        ({"images": [{"id": 2**63, "file_name": "x"}, *IMAGES]}, "without an integer id"),
        ({"images": [*IMAGES, IMAGES[0]]}, "1 of 4 image ids stand more than once"),
        ({"images": [{"id": 1, "file_name": "../secret.jpg"}, *IMAGES]}, "1 .* outside the images' folder"),
        ({"images": [{"id": 1, "file_name": "/etc/passwd"}, *IMAGES]}, "1 .* outside the images' folder"),
        ({"images": [{"id": 1, "file_name": ""}, *IMAGES]}, "1 .* outside the images' folder"),
        ({"images": IMAGES[:1]}, r'3 annotations of images that it does not list \({"id": 20'),
        ({"annotations": [{"id": 1, "image_id": 3}] * 5}, r"5 annotations without .* caption \(.*, …\)"),
        ({"annotations": [{"id": 1, "image_id": 3, "caption": 5}]}, "1 annotations without"),
        ({"annotations": ["text"]}, "1 annotations without"),
        ({"annotations": [ANNOTATIONS[0], ANNOTATIONS[0]]}, "annotation ids stand more than once"),
    ],
)
def test_each_mistake_is_one_line_that_names_the_file(tmp_path, change, message):
    table = {"images": IMAGES, "annotations": ANNOTATIONS, **change}
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({key: value for key, value in table.items() if value is not None}))
    with pytest.raises(UserError, match=message) as caught:
        read_coco(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe{}", b"id,caption\n1,x\n", b"[" * 100_000])
def test_a_file_that_is_not_such_json(tmp_path, content):
    path = tmp_path / "captions.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"captions\.json"):
        read_coco(path)


def test_unreadable_files(tmp_path):
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_coco(tmp_path / "none.json")
    for content in (b"no gzip", gzip.compress(b'{"images": []}')[:-9]):
        (tmp_path / "a.json.gz").write_bytes(content)
        with pytest.raises(UserError, match="cannot be read"):
            read_coco(tmp_path / "a.json.gz")


@pytest.mark.realdata
def test_full_coco_val(realdata):
    """Against a plain reading of the same file: 5,000 images, 25,014 captions."""
    path = realdata / "full_annotations" / "captions_val2017.json.gz"
    table = json.loads(gzip.decompress(path.read_bytes()))
    expected = defaultdict(list)
    for row in table["annotations"]:
        expected[row["image_id"]].append(row["caption"])
    images = read_coco(path)
    assert {image.image_id: list(image.captions) for image in images} == expected
    assert Counter(len(image.captions) for image in images) == {5: 4987, 6: 12, 7: 1}


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("folder", "split", "count"),
    [("coco", "train2017", 30), ("coco", "val2017", 20), ("flickr8k", "train", 2000), ("flickr8k", "val", 500)],
)
def test_real_folders_are_complete(realdata, folder, split, count):
    images = read_coco(realdata / folder / "annotations" / f"captions_{split}.json")
    assert len(images) == count and {len(image.captions) for image in images} == {5}
    assert missing_files(images, realdata / folder / split) == []
