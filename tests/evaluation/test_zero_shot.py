"""Zero-shot classification against open_clip's classifier, on one rank and two."""

import pytest
import torch

from convclip.data.transforms import EvalTransform, normalize
from convclip.evaluation.embedding import Encoder
from convclip.evaluation.zero_shot import load_zero_shot_set, zero_shot_accuracy
from convclip.schema import ImageTowerConfig, UserError
from tests.evaluation.small_model import SIZE, SmallModel, numbers_of, read_pictures, write_noise
from tests.processes import run_in_world

CPU = torch.device("cpu")


def write_set(folder, counts=(5, 4, 6, 5, 4, 3, 6)):
    """Class c is called `11+c` (a word of the small model) and has counts[c] pictures in sub-folder `class c`."""
    (folder / "classnames.txt").write_text("".join(f"class {c}\t{11 + c}\n" for c in range(len(counts))))
    (folder / "templates.txt").write_text("1 2 {}\n\n{} 3\n4 {} 5\n")
    for c, count in enumerate(counts):
        for i in range(count):
            write_noise(folder / f"class {c}" / f"{i}.png", 100 * c + i)
    return folder


def accuracy_of(folder, batch, encode=None, **settings):
    tower = ImageTowerConfig().model_copy(update={"image_size": SIZE})
    loaded, transform = load_zero_shot_set(folder), EvalTransform(SIZE)
    encoder = Encoder(encode or SmallModel(), tower, CPU, torch.float32, batch)
    return zero_shot_accuracy(encoder, loaded, transform, numbers_of, **settings)


@pytest.mark.parametrize("batch", [4, 100])
def test_equals_open_clips_classifier(tmp_path, batch):
    build_zero_shot_classifier = pytest.importorskip("open_clip").build_zero_shot_classifier
    loaded, model, tower = load_zero_shot_set(write_set(tmp_path)), SmallModel(), ImageTowerConfig()
    assert loaded.names == [str(11 + c) for c in range(7)]
    assert loaded.prompts()[:4] == ["1 2 11", "11 3", "4 11 5", "1 2 12"]
    classifier = build_zero_shot_classifier(model, numbers_of, loaded.names, loaded.templates)
    logits = model(images=normalize(read_pictures(loaded.paths), tower.mean, tower.std)).image @ classifier
    found = logits.topk(5).indices == torch.tensor(loaded.classes)[:, None]
    top1, top5 = (100 * found[:, :k].any(1).double().mean().item() for k in (1, 5))
    assert 0 < top1 < top5 < 100
    one, two = [accuracy_of(tmp_path, batch)], run_in_world(2, accuracy_of, tmp_path, batch)
    for result in one + two:
        assert result == pytest.approx({"top1": top1, "top5": top5, "images": 33, "classes": 7, "broken": 0})


def test_broken_pictures_are_left_out(tmp_path, capsys):
    folder = write_set(tmp_path, (2, 1))
    (folder / "class 0" / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    result = accuracy_of(folder, 2)
    assert (result["images"], result["broken"]) == (3, 1)
    assert "cut.jpg" in "".join(capsys.readouterr())
    for picture in folder.glob("*/*.png"):
        picture.write_bytes(b"")
    with pytest.raises(UserError, match="none of the 4 pictures"):
        accuracy_of(folder, 2)


class CollapsedModel(SmallModel):
    def __call__(self, images=None, texts=None):
        found = super().__call__(images, texts)
        image, text = (None if x is None else torch.ones_like(x) for x in (found.image, found.text))
        return found._replace(image=image, text=text)


def test_a_model_that_tells_nothing_apart_is_never_right(tmp_path):
    assert accuracy_of(write_set(tmp_path), 4, CollapsedModel())["top5"] == 0


def spoil(folder, name, text):
    (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "templates.txt").unlink(), r"templates.txt cannot be read"),
        (lambda f: spoil(f, "templates.txt", "a photo"), r"templates.txt: 'a photo' needs one \{\}"),
        (lambda f: spoil(f, "templates.txt", "\n \n"), r"templates.txt is empty"),
        (lambda f: spoil(f, "classnames.txt", "class 0\nclass 0\n"), r"a sub-folder is named twice"),
        (lambda f: spoil(f, "classnames.txt", "class 0\n"), r"that classnames.txt does not name: class 1"),
        (lambda f: spoil(f, "classnames.txt", "class 0\nclass 1\nclass 2"), r"has no sub-folder: class 2"),
        (lambda f: [p.unlink() for p in f.glob("*/*.png")], r"has no pictures in its sub-folders \(.bmp"),
    ],
)
def test_a_folder_that_does_not_fit_is_one_clear_line(tmp_path, change, message):
    write_set(tmp_path, (1, 1))
    change(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load_zero_shot_set(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_plain_list_of_names(tmp_path):
    write_set(tmp_path, (1, 1))
    spoil(tmp_path, "classnames.txt", "class 1\nclass 0\n")
    loaded = load_zero_shot_set(tmp_path)
    assert loaded.names == ["class 1", "class 0"] and [path.parent.name for path in loaded.paths] == loaded.names


def test_text_files_may_begin_with_a_byte_order_mark(tmp_path):
    plain = load_zero_shot_set(write_set(tmp_path, (1, 1)))
    for name in ("classnames.txt", "templates.txt"):
        (tmp_path / name).write_text((tmp_path / name).read_text(), encoding="utf-8-sig")
    assert load_zero_shot_set(tmp_path) == plain


def test_pictures_beyond_the_recipes_limit_are_left_out(tmp_path):
    folder = write_set(tmp_path, (2, 1))
    assert accuracy_of(folder, 2, max_pixels=10**6)["broken"] == 0
    with pytest.raises(UserError, match="none of the 3 pictures"):
        accuracy_of(folder, 2, max_pixels=4)
