"""tools/export.py: the run that 0.1.0 left in every format; each mistake is one line and exit code 2."""

import importlib.util
import shutil

import open_clip
import pytest
import torch
import transformers
import yaml

import convclip
from convclip.config import load_recipe
from convclip.documents import dump_yaml
from convclip.models import export as open_clip_export
from convclip.models import onnx_export, transformers_export
from tests.conftest import REPOSITORY
from tests.models.hf_folders import text_section, write_encoder
from tests.processes import run_script
from tools import export, export_open_clip

RUN = REPOSITORY / "tests" / "fixtures" / "0.1.0" / "run"
PICTURES = torch.randint(0, 255, (2, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
CAPTIONS = ["a red square", "a blue one"]


@pytest.fixture
def clip(monkeypatch):
    """The run by the front door; its recipe names its tokenizer from the repository's root."""
    monkeypatch.chdir(REPOSITORY)
    return convclip.load(RUN)


def pixels(clip):
    """What the towers of every format take: [2, 3, S, S]."""
    image = clip.config.image
    found = torch.stack([clip.transform(open_image(picture)) for picture in PICTURES]).float() / 255
    return (found - torch.tensor(image.mean)[:, None, None]) / torch.tensor(image.std)[:, None, None]


def open_image(picture):
    from PIL import Image

    return Image.fromarray(picture.permute(1, 2, 0).numpy())


def same(found, expected):
    found = torch.as_tensor(found)
    torch.testing.assert_close(found / found.norm(dim=-1, keepdim=True), expected, atol=1e-5, rtol=0)


def head(folder):
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


@pytest.mark.parametrize("main", [export.main, export_open_clip.main], ids=["export", "export_open_clip"])
def test_open_clip_embeds_the_same_and_the_front_door_loads_it(clip, tmp_path, capsys, main):
    folder = tmp_path / "export"
    assert main(["--checkpoint", str(RUN), "--output_dir", str(folder)]) == 0
    said = capsys.readouterr().out
    assert f"wrote {folder}\n" in said and f'create_model_and_transforms("local-dir:{folder}")' in said
    theirs = open_clip.create_model(f"local-dir:{folder}").eval()
    with torch.no_grad():
        same(theirs.encode_image(pixels(clip)), clip.embed_images(PICTURES))
        same(theirs.encode_text(clip.tokenizer(CAPTIONS)), clip.embed_texts(CAPTIONS))
    torch.testing.assert_close(convclip.load(folder).embed_images(PICTURES), clip.embed_images(PICTURES))
    card = (folder / "README.md").read_text()
    assert head(folder)["library_name"] == "open_clip" and "At step 3" in card and "backbone: test_convnext" in card
    # Its code is what it says; and no place of this machine.
    assert 'open_clip.create_model_and_transforms("local-dir:export")' in card and str(tmp_path) not in card


def test_transformers_embeds_the_same(clip, tmp_path):
    folder = tmp_path / "export"
    done = run_script(
        *("tools/export.py", "--checkpoint", str(RUN / "checkpoints" / "step-00000009"), "--format", "transformers"),
        *("--output_dir", str(folder)),
    )
    assert done.returncode == 0 and "VisionTextDualEncoderModel.from_pretrained" in done.stdout, done.stderr
    clip = convclip.load(RUN / "checkpoints" / "step-00000009")
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        found = theirs(input_ids=clip.tokenizer(CAPTIONS), pixel_values=pixels(clip))
    same(found.image_embeds, clip.embed_images(PICTURES))
    same(found.text_embeds, clip.embed_texts(CAPTIONS))
    assert head(folder)["library_name"] == "transformers" and "At step 9" in (folder / "README.md").read_text()


def test_onnxruntime_embeds_the_same(clip, tmp_path, capsys):
    for name in onnx_export.PACKAGES:
        pytest.importorskip(name, reason="exports to ONNX need pip install -e .[export]")
    import onnxruntime

    folder = tmp_path / "export"
    assert export.main(["--checkpoint", str(RUN), "--output_dir", str(folder), "--format", "onnx"]) == 0
    said = capsys.readouterr()
    assert said.out.count("equals torch within") == 2 and "exporting to ONNX" in said.err
    # As the card says, but for where it stands.
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    given = {"pixels": pixels(clip).numpy(), "tokens": clip.tokenizer(CAPTIONS).numpy()}
    exec(code.replace('"export/', f'"{folder}/'), given)
    assert isinstance(given["image"], onnxruntime.InferenceSession)
    same(given["images"], clip.embed_images(PICTURES))
    same(given["texts"], clip.embed_texts(CAPTIONS))


@pytest.mark.parametrize("form", ["open_clip", "transformers", "onnx"])
def test_what_cannot_be_is_one_line(tmp_path, capsys, monkeypatch, form):
    monkeypatch.setattr("convclip.exports.refuse_without_packages", lambda: None)

    def refused(run, folder, form, *words):
        assert export.main(["--checkpoint", str(run), "--output_dir", str(folder), "--format", form]) == 2
        error = capsys.readouterr().err
        assert error.startswith("export: ") and error.count("\n") == 1, error
        assert all(word in error for word in words), error

    out = tmp_path / "out"
    refused(RUN, out, f"{form}x", "did you mean", "open_clip, transformers, onnx")
    used = tmp_path / "used"
    used.mkdir()
    (used / "mine.txt").write_text("precious")
    refused(RUN, used, form, "already holds files, name a new folder")
    refused(RUN, used / "mine.txt", form, "already holds files")
    refused(RUN, tmp_path / ("x" * 300), form, "cannot be written: File name too long")
    refused(tmp_path / "nowhere", out, form, "holds no checkpoint")
    video = shutil.copytree(RUN, tmp_path / "video")
    recipe = load_recipe("teachclip_msrvtt9k").model_dump(mode="json", by_alias=True)
    (video / "recipe.yaml").write_text(dump_yaml(recipe))
    refused(video, out, form, "is a model of videos", "cannot be exported", "launch/evaluate.py")
    assert [path.name for path in used.iterdir()] == ["mine.txt"] and not out.exists()


def test_a_text_tower_that_transformers_cannot_hold_is_refused_before_weights_are_read(tmp_path, capsys):
    write_encoder(tmp_path / "bert", "bert")
    text = text_section(tmp_path / "bert").model_dump(mode="json")
    image = {"backbone": "test_convnext", "head": "average_linear", "image_size": 32}
    recipe = {"epochs": 1, "model": {"embed_dim": 16, "image": image, "text": text}}
    (tmp_path / "bert.yaml").write_text(dump_yaml(recipe))
    command = ["--checkpoint", str(tmp_path / "none.safetensors"), "--recipe", str(tmp_path / "bert.yaml")]
    out = tmp_path / "out"
    capsys.readouterr()
    assert export.main([*command, "--output_dir", str(out), "--format", "transformers"]) == 2
    error = capsys.readouterr().err
    assert "cannot hold text of kind hf" in error and "use --format open_clip or --format onnx" in error
    assert error.count("\n") == 1 and not out.exists()


def test_the_missing_extra_is_one_line_that_says_pip_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert export.main(["--checkpoint", str(RUN), "--output_dir", str(tmp_path / "out"), "--format", "onnx"]) == 2
    error = capsys.readouterr().err
    assert "pip install onnx onnxscript onnxruntime" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("form", "module", "writer"),
    [
        ("open_clip", open_clip_export, "save_file"),
        ("transformers", transformers_export, "save_file"),
        ("onnx", onnx_export, "_difference"),
    ],
)
def test_one_that_is_stopped_midway_leaves_nothing(tmp_path, monkeypatch, capsys, form, module, writer):
    def stopped(*_, **__):
        assert not (tmp_path / "out").exists() and len(list(tmp_path.iterdir())) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr("convclip.exports.refuse_without_packages", lambda: None)
    monkeypatch.setattr(onnx_export, "refuse_without_packages", lambda: None)
    monkeypatch.setattr(onnx_export, "_write", lambda graph, path: path.write_bytes(b"whole"))
    monkeypatch.setattr(module, writer, stopped)
    assert export.main(["--checkpoint", str(RUN), "--output_dir", str(tmp_path / "out"), "--format", form]) == 130
    assert capsys.readouterr().err.endswith("export: interrupted\n") and not list(tmp_path.iterdir())
