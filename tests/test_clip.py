"""convclip.load: the same embeddings as evaluation and open_clip give, from every source and every kind of picture."""

from __future__ import annotations

import io
import itertools
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as vision
from PIL import Image
from safetensors.torch import save_file

import convclip
from convclip.config import load_recipe
from convclip.data.evaluation_set import load_evaluation_set
from convclip.data.pixels import plain_picture
from convclip.devices import pick_device
from convclip.evaluation.embedding import Encoder, embed
from convclip.features.reader import FeatureStore
from convclip.models import build_model
from convclip.models.checkpoint_weights import load_weights, read_weights
from convclip.models.export import export_open_clip, load_export
from convclip.schema import Model, UserError
from tests.conftest import REPOSITORY

FILES = REPOSITORY / "tests" / "fixtures" / "0.1.0"
RUN, EXPORT = FILES / "run", FILES / "export"
CAPTIONS = ["a red square", "7 is blue", "a caption that is far longer than the sixteen tokens of the context", ""]


@pytest.fixture(scope="module", autouse=True)
def at_the_root():
    """The run's recipe names its tokenizer from there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        yield


@pytest.fixture(scope="module")
def clip(at_the_root):
    return convclip.load(str(RUN))


@pytest.fixture(scope="module")
def exported(at_the_root):
    return convclip.load(EXPORT)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Files of every mode that people have: {name: path}."""
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0).integers(0, 256, (52, 70, 4), dtype=np.uint8)
    rgb = Image.fromarray(noise[..., :3])
    turned = Image.Exif()
    turned[0x0112] = 6
    made = {
        "plain.png": (rgb, {}),
        "alpha.png": (Image.fromarray(noise), {}),
        "grey.png": (rgb.convert("L"), {}),
        "palette.gif": (rgb.convert("P"), {}),
        "cmyk.jpg": (rgb.convert("CMYK"), {}),
        "turned.jpg": (rgb, {"exif": turned}),
        "exact.png": (rgb.crop((0, 0, 32, 32)), {}),
        "tall.webp": (rgb.resize((20, 90)), {"lossless": True}),
    }
    for name, (picture, options) in made.items():
        picture.save(folder / name, **options)
    return {name: folder / name for name in made}


def val_pictures() -> list[Image.Image]:
    """The six pictures of the fixture's evaluation shard."""
    with tarfile.open(FILES / "shards" / "val-000000.tar") as tar:
        names = sorted(name for name in tar.getnames() if name.endswith(".jpg"))
        return [Image.open(io.BytesIO(tar.extractfile(name).read())) for name in names]


def open_clip_embeddings(folder: Path, images: list[Image.Image]) -> torch.Tensor:
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    with torch.no_grad():
        return theirs.eval().encode_image(torch.stack([preprocess(image) for image in images]), normalize=True)


def test_pictures_embed_as_in_open_clip(exported, pictures):
    """After open_clip's own preprocessing of RGB. Pixels are equal to the bit; 1e-5 is for the order of sums."""
    found = exported.embed_images(pictures.values())
    assert found.shape == (len(pictures), 16) and found.dtype == torch.float32 and found.device.type == "cpu"
    expected = open_clip_embeddings(EXPORT, [plain_picture(Image.open(path)) for path in pictures.values()])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(len(found)))
    # They would not be equal anyway.
    assert (found @ found.T - torch.eye(len(found))).max() < 0.999


def test_pictures_embed_by_torchvisions_steps(clip, pictures):
    """Written out: resize the shorter side, crop the centre, RGB, 0..1, mean and std out; the picture as stored."""
    for name, found in zip(pictures, clip.embed_images(pictures.values()), strict=True):
        picture = vision.resize(
            plain_picture(Image.open(pictures[name])), [32], interpolation=vision.InterpolationMode.BICUBIC
        )
        pixels = vision.to_image(vision.center_crop(picture, [32, 32]).convert("RGB"))
        tower = clip.config.image
        values = vision.normalize(vision.to_dtype(pixels, torch.float32, scale=True), tower.mean, tower.std)
        expected = F.normalize(clip.model.visual(values[None]), dim=-1)[0]
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_embeddings_are_those_of_the_evaluation(clip):
    recipe = load_recipe(RUN / "recipe.yaml")
    dataset = load_evaluation_set(recipe.data.val, recipe.data, clip.transform, clip.tokenizer)
    model = build_model(recipe.model).eval()
    load_weights(model, RUN / "checkpoints" / "step-00000003")
    encoder = Encoder(model, recipe.model.image, torch.device("cpu"), torch.float32)
    images, texts, scale, *_ = embed(encoder, dataset)
    found = clip.embed_images(val_pictures()), clip.embed_texts(dataset.captions)
    torch.testing.assert_close(found, (images, texts), atol=1e-6, rtol=0)
    torch.testing.assert_close(clip.similarity(*found), scale * images @ texts.T, atol=1e-5, rtol=0)


def test_texts_embed_as_in_open_clip(exported):
    theirs = open_clip.create_model(f"local-dir:{EXPORT}").eval()
    tokens = exported.tokenizer(CAPTIONS)
    assert tokens.shape == (4, 16)
    found = exported.embed_texts(iter(CAPTIONS))
    torch.testing.assert_close(found, theirs.encode_text(tokens, normalize=True), atol=1e-5, rtol=0)
    # Cut to its longest caption a batch has another length, and gives the same.
    torch.testing.assert_close(exported.embed_texts(CAPTIONS, batch=1), found, atol=1e-6, rtol=0)


def test_every_kind_of_picture_is_the_same_picture(clip, pictures):
    path = pictures["plain.png"]
    opened = Image.open(path)
    pixels = torch.from_numpy(np.array(opened)).permute(2, 0, 1)
    expected = clip.embed_images([path])
    for given in (
        path,
        str(path),
        Image.open(path),
        pixels,
        pixels[None],
        (opened, str(path)),
        pixels.repeat(3, 1, 1, 1),
    ):
        found = clip.embed_images(given)
        # Another number of rows may add up in another order.
        torch.testing.assert_close(found, expected.expand(len(found), -1), atol=1e-6, rtol=0)
    # One lazily opened picture, read by several threads at once.
    found = clip.embed_images([Image.open(path)] * 30, batch=7, progress=False)
    torch.testing.assert_close(found, expected.expand(30, -1), atol=1e-6, rtol=0)
    assert torch.equal(clip.embed_texts("a red square"), clip.embed_texts(["a red square"]))


def test_none_is_no_row(clip):
    assert clip.embed_images([]).shape == clip.embed_texts([]).shape == (0, 16)
    assert clip.embed_images(torch.empty(0, 3, 40, 40, dtype=torch.uint8)).shape == (0, 16)
    assert clip.similarity(clip.embed_images([]), clip.embed_texts(CAPTIONS)).shape == (0, 4)


def test_sources_of_one_model_embed_alike(clip, pictures, tmp_path):
    """A run is its best checkpoint; the same weights as a checkpoint, an export, and a file with a recipe."""
    checkpoint = RUN / "checkpoints" / "step-00000003"
    save_file(read_weights(str(checkpoint)), tmp_path / "weights.safetensors")
    export_open_clip(clip.model, clip.config, str(tmp_path / "export"))
    recipe = RUN / "recipe.yaml"
    sources = [(checkpoint, None), (str(checkpoint), None), (str(tmp_path / "export"), None)]
    sources += [(tmp_path / "weights.safetensors", how) for how in (recipe, str(recipe), load_recipe(str(recipe)))]
    expected = clip.embed_images(pictures.values()), clip.embed_texts(CAPTIONS)
    for source, how in sources:
        other = convclip.load(source, recipe=how)
        assert torch.equal(other.embed_images(pictures.values()), expected[0]), source
        assert torch.equal(other.embed_texts(CAPTIONS), expected[1]), source
        assert other.logit_scale == pytest.approx(clip.logit_scale)
        assert (other.recipe is None) == (Path(source).name == "export") and other.config.embed_dim == 16
    # Without `best`, the latest.
    shutil.copytree(RUN, tmp_path / "run", ignore=shutil.ignore_patterns("best", "features.h5"))
    latest = convclip.load(tmp_path / "run")
    torch.testing.assert_close(latest.model.state_dict(), read_weights(RUN / "checkpoints" / "step-00000009"))
    assert latest.recipe.name == "small"


def test_text_and_path_name_the_same_everywhere():
    """Of the public calls without a test above; train_recipe and evaluate_checkpoint are in test_reads_0_1_0.py."""
    for kind in (str, Path):
        assert load_recipe(kind(RUN / "recipe.yaml")).epochs == 4
        assert load_export(kind(EXPORT))[1].embed_dim == 16
        assert len(FeatureStore(kind(RUN / "features.h5")).ids("image_map")) == 12
        assert convclip.load(kind(EXPORT), tokenizer=kind(FILES / "tokenizer")).tokenizer(["red"]).shape == (1, 16)


def test_the_model_is_for_use_only_and_random_numbers_are_left_alone(clip):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    again = convclip.load(EXPORT)
    assert torch.equal(torch.rand(1), expected)
    for loaded in (clip, again):
        assert not any(module.training for module in loaded.model.modules())
        assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    # A head of the user's own may be trained on embeddings, as on any tensor.
    head = torch.nn.Linear(16, 1)
    head(clip.embed_texts(CAPTIONS)).sum().backward()
    assert head.weight.grad is not None


@pytest.mark.parametrize("dtype", ["bf16", torch.bfloat16, "bfloat16"])
def test_half_precision_comes_close(exported, pictures, dtype):
    half = convclip.load(EXPORT, dtype=dtype)
    assert half.dtype == torch.bfloat16 and half.model.visual.head.proj.weight.dtype == torch.bfloat16
    found, expected = half.embed_images(pictures.values()), exported.embed_images(pictures.values())
    assert found.dtype == torch.float32 and (found * expected).sum(1).min() > 0.99
    assert half.logit_scale == exported.logit_scale


def test_a_logit_bias_is_added(tmp_path):
    text = {"width": 16, "heads": 2, "layers": 1, "context_length": 16, "vocab_size": 259}
    text["tokenizer"] = str(FILES / "tokenizer")
    config = Model(
        embed_dim=8,
        image={"backbone": "test_convnext", "image_size": 32, "head": "average_linear"},
        text=text,
        init_logit_scale=2.0,
        init_logit_bias=-3.0,
    )
    export_open_clip(build_model(config), config, tmp_path / "export")
    loaded = convclip.load(tmp_path / "export")
    images, texts = loaded.embed_images(val_pictures()), loaded.embed_texts(CAPTIONS)
    expected = [[np.exp(2.0) * float(i @ t) - 3.0 for t in texts] for i in images]
    torch.testing.assert_close(
        loaded.similarity(images, texts), torch.tensor(expected, dtype=torch.float32), atol=1e-5, rtol=0
    )


def test_a_gpt2_export_that_was_moved_takes_its_tokenizer_along(tmp_path):
    text = {"kind": "gpt2", "width": 16, "heads": 2, "layers": 1, "context_length": 16, "vocab_size": 259}
    image = {"backbone": "test_convnext", "image_size": 32, "head": "average_linear"}
    config = Model(embed_dim=8, image=image, text={**text, "tokenizer": str(tmp_path / "gone")})
    export_open_clip(build_model(config), config, tmp_path / "export")
    with pytest.raises(UserError, match="gone"):
        convclip.load(tmp_path / "export")
    expected = convclip.load(tmp_path / "export", tokenizer=FILES / "tokenizer").embed_texts(CAPTIONS)
    for file in (FILES / "tokenizer").iterdir():
        shutil.copy(file, tmp_path / "export")
    assert torch.equal(convclip.load(tmp_path / "export").embed_texts(CAPTIONS), expected)


def test_long_work_shows_progress_and_short_work_does_not(clip, monkeypatch, capsys):
    images = torch.zeros(6, 3, 32, 32, dtype=torch.uint8)
    clip.embed_images(images, batch=1)
    assert capsys.readouterr().err == ""
    # tqdm's clock: ten seconds at each look.
    monkeypatch.setattr("tqdm.std.time", itertools.count(0, 10).__next__)
    clip.embed_images(images, batch=1)
    assert "embedding images" in capsys.readouterr().err
    clip.embed_images(images, batch=1, progress=False)
    clip.embed_texts(CAPTIONS, batch=1, progress=False)
    assert capsys.readouterr().err == ""


def line_of(action, *arguments, **options) -> str:
    """The one line of the UserError that a call ends in."""
    with pytest.raises(UserError) as caught:
        action(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_source_that_is_no_model_is_named(tmp_path, monkeypatch):
    cases = [
        ("nowhere/run", {}, "nowhere/run: no such file or folder"),
        (tmp_path, {}, f"{tmp_path} holds no run, checkpoint or export"),
        (RUN / "checkpoints" / "locked.safetensors", {}, "name their model with recipe="),
        (RUN, {"recipe": "demo"}, "leave recipe= out"),
        (EXPORT, {"recipe": "demo"}, "leave recipe= out"),
        (RUN / "checkpoints" / "locked.safetensors", {"recipe": RUN / "recipe.yaml"}, "lacks"),
        (RUN / "checkpoints" / "locked.safetensors", {"recipe": "demmo"}, "did you mean 'demo'"),
        (RUN, {"device": "cuda:7"}, "device cuda:7 is not there: this machine has cpu"),
        (RUN, {"device": "abacus"}, "device abacus is not there"),
        (RUN, {"dtype": "int8"}, "give fp32, bf16, fp16"),
        (RUN, {"tokenizer": tmp_path}, f"folder {tmp_path} holds no readable tokenizer"),
    ]
    for source, options, words in cases:
        assert words in line_of(convclip.load, source, **options)
    (tmp_path / "recipe.yaml").write_text((RUN / "recipe.yaml").read_text())
    assert "holds no checkpoint" in line_of(convclip.load, tmp_path)
    (tmp_path / "latest").write_text("checkpoints/step-00000001\n")
    assert "step-00000001 is not a convclip checkpoint" in line_of(convclip.load, tmp_path)
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    assert "DS_ACCELERATOR cuda is not there: this machine has cpu" in line_of(convclip.load, RUN)
    assert convclip.load(EXPORT, device="cpu").device.type == "cpu"


def test_a_video_run_says_what_to_do(tmp_path):
    checkpoint = tmp_path / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    (tmp_path / "recipe.yaml").write_text(load_recipe("teachclip_msrvtt9k").to_yaml())
    (tmp_path / "latest").write_text("checkpoints/step-00000001\n")
    line = line_of(convclip.load, tmp_path)
    assert "is a video model" in line and f"launch/evaluate.py --checkpoint {checkpoint}" in line


def test_a_broken_picture_is_named(clip, pictures, tmp_path, monkeypatch):
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(pictures["cmyk.jpg"].read_bytes()[:2000])
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "notes.jpg").write_text("no picture")
    good = pictures["plain.png"]
    for bad in ("cut.jpg", "empty.jpg", "notes.jpg", "missing.jpg", "."):
        line = line_of(clip.embed_images, [good, str(tmp_path / bad)])
        assert line.startswith(str(tmp_path / bad).rstrip("/.")) and "leave it out" in line
    assert str(cut) in line_of(clip.embed_images, Image.open(cut))
    closed = Image.new("RGB", (9, 9))
    closed.close()
    assert "picture 1" in line_of(clip.embed_images, [good, closed])
    assert "picture 1: a tensor (3, 32, 32) of torch.float32" in line_of(
        clip.embed_images, [good, torch.rand(3, 32, 32)]
    )
    assert "(4, 9, 9)" in line_of(clip.embed_images, torch.zeros(4, 9, 9, dtype=torch.uint8))
    assert "picture 0 is a int" in line_of(clip.embed_images, [7])
    assert "caption 1 is a int" in line_of(clip.embed_texts, ["a", 7])
    assert "caption 0 is no Unicode text" in line_of(clip.embed_texts, ["caf\udce9"])
    assert "batch 0" in line_of(clip.embed_images, good, batch=0)
    small = clip.recipe.model_copy(update={"data": clip.recipe.data.model_copy(update={"max_image_pixels": 99})})
    limited = convclip.clip.Clip(**{**vars(clip), "recipe": small})
    assert "70 x 52 pixels exceed data.max_image_pixels 99" in line_of(limited.embed_images, good)


def test_the_device_is_what_is_there(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert pick_device(None) == torch.device("cpu")
    assert pick_device("cuda:1") == pick_device(torch.device("cuda", 1)) == torch.device("cuda:1")
    assert "this machine has cpu and 2 x cuda" in line_of(pick_device, "cuda:2")
    assert "device mps is not there" in line_of(pick_device, "mps")
    monkeypatch.delenv("DS_ACCELERATOR")
    assert pick_device(None) == torch.device("cuda")


def test_neither_torch_at_import_nor_deepspeed_nor_a_process_group(at_the_root):
    script = """
import sys
import convclip
assert not {"torch", "numpy", "pydantic", "deepspeed"} & set(sys.modules), "import convclip is heavy"
clip = convclip.load(sys.argv[1])
import torch
clip.embed_images(torch.zeros(2, 3, 40, 40, dtype=torch.uint8)), clip.embed_texts(["a red square"])
assert not torch.distributed.is_initialized()
assert "deepspeed" not in sys.modules and not [name for name in sys.modules if name.startswith("convclip.engine")]
"""
    done = subprocess.run([sys.executable, "-c", script, str(RUN)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
