"""`model.open_clip: NAME` in recipes: what it fills in, what counts beside it, what is stored, and what is refused."""

import importlib.util
import json
import subprocess
import sys

import pytest

import convclip
from convclip import schema
from convclip.command_line import run
from convclip.config import load_recipe
from convclip.sections import released
from tests.conftest import REPOSITORY

RECIPE = "epochs: 1\nrows_per_epoch: 1000\nbatch: {global: 32}\nmodel: {open_clip: MobileCLIP2-S0}\n"


def recipe_file(folder, text=RECIPE):
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def test_a_name_gives_every_field_of_the_towers():
    model = schema.Model.model_validate({"open_clip": "MobileCLIP2-S0"})
    assert model.model_dump(exclude={"pretrained", "init_logit_scale", "init_logit_bias"}) == {
        "embed_dim": 512,
        "image": {
            **{"backbone": "fastvit_mci0", "head": "none", "image_size": 256, "drop_path": 0.0, "pretrained": None},
            **{"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "interpolation": "bilinear"},
        },
        "text": {
            **{"kind": "clip", "width": 512, "heads": 8, "layers": 12, "context_length": 77, "vocab_size": 49408},
            **{"pretrained": None, "tokenizer": "open_clip", "activation": "gelu", "causal": False},
        },
    }
    quick = schema.Model.model_validate({"open_clip": "RN50x4-quickgelu"})
    assert (quick.embed_dim, quick.image.backbone, quick.image.image_size) == (640, "RN50x4", 288)
    assert (quick.text.width, quick.text.heads, quick.text.activation) == (640, 10, "quick_gelu")
    large = schema.Model.model_validate({"open_clip": "convnext_large_d"})
    assert (large.image.head, large.image.drop_path, large.text.layers) == ("mlp", 0.1, 16)


def test_what_is_said_beside_the_name_counts():
    said = {"image": {"head": "attention_pool", "image_size": 320}, "text": {"context_length": 32}, "embed_dim": 640}
    model = schema.Model.model_validate({"open_clip": "convnext_base_w", **said})
    assert (model.image.backbone, model.image.head, model.image.image_size) == ("convnext_base", "attention_pool", 320)
    assert (model.text.width, model.text.context_length, model.embed_dim) == (640, 32, 640)
    # Another kind of text tower has its own sizes.
    gpt2 = schema.Model.model_validate({"open_clip": "convnext_base_w", "text": {"kind": "gpt2"}})
    assert gpt2.text == schema.TextTowerConfig(kind="gpt2") and gpt2.image.image_size == 256


@pytest.mark.parametrize("tag", ["openai", "yfcc15m", "cc12m", "OpenAI"])
def test_a_tag_says_where_the_weights_are_and_their_activation(tag):
    for name in ("RN50", "RN50-quickgelu"):
        model = schema.Model.model_validate({"open_clip": name, "pretrained": tag})
        assert model.pretrained == f"hf-hub:timm/resnet50_clip.{tag.lower()}"
        assert model.text.activation == "quick_gelu"


def test_files_folders_and_hub_addresses_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    for place in ("w.safetensors", "weights", "some/folder", "hf-hub:owner/name"):
        model = schema.Model.model_validate({"open_clip": "RN50", "pretrained": place})
        assert model.pretrained == place and model.text.activation == "gelu"


class Seen(Exception):
    """Ends what would go on with the transform that a test has seen."""


def test_every_resize_of_a_run_is_the_models(tmp_path, monkeypatch):
    """MobileCLIP's is bilinear: in training, from fixed views, in retrieval and in zero-shot."""
    from convclip.engine import task
    from convclip.engine.stored.frozen import recipe_views

    seen = []

    def see(*values, **named):
        seen.extend(value for value in values if isinstance(value, task.TrainTransform | task.EvalTransform))
        raise Seen

    for reader in ("load_evaluation_set", "zero_shot_accuracy", "TrainLoader"):
        monkeypatch.setattr(task, reader, see)
    monkeypatch.setattr(task, "load_zero_shot_set", lambda folder: None)
    recipe = load_recipe(recipe_file(tmp_path), ["features.views=2"])
    work = task.ImageTextTask(recipe)
    for use in (
        lambda: work.evaluation("x"),
        lambda: work.zero_shot(tmp_path).figures(None, None, None),
        lambda: work.open(None, None, None, None),
    ):
        with pytest.raises(Seen):
            use()
    views = recipe_views(recipe)
    assert [(t.size, t.interpolation) for t in (*seen, views.train, views.evaluation)] == [(256, "bilinear")] * 5


@pytest.mark.parametrize(("name", "tag", "quick"), [("RN50", "openai", True), ("convnext_base", None, False)])
def test_a_teacher_takes_the_activation_of_its_tag(name, tag, quick, monkeypatch):
    """open_clip itself only warns."""
    import open_clip

    from convclip.models.teacher import Teacher

    def create(model, pretrained, force_quick_gelu):
        assert (model, pretrained, force_quick_gelu) == (name, tag or "w.pt", quick)
        raise RuntimeError("seen")

    monkeypatch.setattr(open_clip, "create_model", create)
    with pytest.raises(schema.UserError, match="seen"):
        Teacher(schema.TeacherConfig(model=name, pretrained=tag or "w.pt"))


def test_a_stored_recipe_needs_neither_the_name_nor_open_clip(tmp_path, monkeypatch):
    recipe = load_recipe(recipe_file(tmp_path), ["model.pretrained=dfndr2b"])
    stored = recipe.to_yaml()
    assert "MobileCLIP2-S0-OpenCLIP" in stored and "open_clip: " not in stored.replace("tokenizer: open_clip", "")
    monkeypatch.setattr(released, "_configs", dict)
    assert load_recipe(recipe_file(tmp_path, stored)) == recipe


def test_overrides_count_beside_the_name_in_both_orders(tmp_path):
    path = recipe_file(tmp_path)
    name, head, section = "model.open_clip=convnext_base_w", "model.image.head=mlp", "model.image={image_size: 96}"
    for overrides in ([name, head], [head, name]):
        model = load_recipe(path, overrides).model
        assert (model.image.backbone, model.image.head, model.embed_dim) == ("convnext_base", "mlp", 640)
    for overrides in ([name, section, head], [head, section, name]):
        image = load_recipe(path, overrides).model.image
        assert (image.backbone, image.head, image.image_size, image.drop_path) == ("convnext_base", "mlp", 96, 0.1)
    model = load_recipe(path, ["model.text.context_length=20", "model={open_clip: RN50, embed_dim: 64}"]).model
    assert (model.image.backbone, model.embed_dim, model.text.context_length) == ("RN50", 64, 20)


def test_a_name_on_the_command_line_replaces_the_files_model():
    """Of base_absattn_3stage the towers, their sizes and its head; not the weights, which then do not fit."""
    model = load_recipe("base_absattn_3stage", ["model.open_clip=RN50-quickgelu"]).model
    named = schema.Model.model_validate({"open_clip": "RN50-quickgelu"})
    assert model == named.model_copy(update={"pretrained": "hf-hub:laion/CLIP-convnext_base_w-laion2B-s13B-b82K"})
    text = load_recipe("tiny_gpt2_unfreeze", ["model.open_clip=convnext_base"]).model.text
    assert (text.kind, text.width, text.tokenizer) == ("clip", 512, "open_clip")
    back = load_recipe("base_absattn_3stage", ["model.open_clip=null"])
    assert back == load_recipe("base_absattn_3stage")


BAD = [
    (["model.open_clip=RN5O"], "open_clip has no model 'RN5O', did you mean 'RN50'?"),
    (["model.open_clip=convnext_base_w320"], "did you mean 'convnext_base_w_320'?"),
    (["model.open_clip=7"], "give the name of one of open_clip's models"),
    (["model.open_clip=ViT-B-32"], "ViT-B-32 is no convolutional model"),
    (["model.open_clip=MobileCLIP2-B"], "MobileCLIP2-B is no convolutional model"),
    (["model.open_clip=roberta-ViT-B-32"], "roberta-ViT-B-32 is no convolutional model"),
    (["model.open_clip=RN101", "model.pretrained=cc12m"], "'cc12m' is no tag of RN101 (its tags are openai, yfcc15m)"),
    (["model.open_clip=convnext_tiny", "model.pretrained=laion"], "'laion' is no tag of convnext_tiny (it has none)"),
    (
        ["model.open_clip=RN50", "model.pretrained=openai", "model.text.activation=gelu"],
        "RN50 openai was trained with text.activation quick_gelu, the recipe says gelu: leave it out",
    ),
    (
        ["model.open_clip=convnext_base", "model.pretrained=laion400m_s13b_b51k", "model.text.activation=quick_gelu"],
        "was trained with text.activation gelu, the recipe says quick_gelu",
    ),
    (["model.open_clip=RN50", "model.image.head=none"], "model.image.head: RN50 has a pool of its own"),
    (["model.image.backbone=dpn48b", "model.image.head=none"], "none needs a backbone whose classifier is one linear"),
    (["model.image.head=linear"], "model.image.head"),
    (["model.text.kind=gpt2", "model.text.causal=false"], "`causal` goes with kind clip, this is kind gpt2: remove it"),
    (["model.opn_clip=RN50"], "unknown key model.opn_clip, did you mean 'open_clip'?"),
]


def launch():
    spec = importlib.util.spec_from_file_location("train", REPOSITORY / "launch" / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("overrides", "message"), BAD, ids=lambda value: str(value)[:60])
def test_a_wrong_name_tag_or_head_is_one_line_and_2(overrides, message, capsys, monkeypatch):
    sets = [part for override in overrides for part in ("--set", override)]
    monkeypatch.setattr(sys, "argv", ["train.py", "--recipe", "demo", "--plan", *sets])
    train = launch()
    assert run("convclip", train.main, train.parse_arguments()) == 2
    out, error = capsys.readouterr()
    assert not out and error.startswith("convclip: ") and message in error
    assert error.count("\n") == 1 and len(error) < 450


def test_the_front_door_refuses_in_one_line(tmp_path):
    for source, options, message in (
        ("open_clip:RN50", {}, r"needs its weights: give pretrained=a tag \(openai, yfcc15m, cc12m\), a file"),
        ("open_clip:RN5O", {}, "open_clip:RN5O: open_clip: open_clip has no model 'RN5O', did you mean 'RN50'"),
        ("open_clip:RN50", {"pretrained": "laion"}, "open_clip:RN50: pretrained: 'laion' is no tag of RN50"),
        ("open_clip:ViT-B-32", {"pretrained": "openai"}, "ViT-B-32 is no convolutional model"),
        ("open_clip:RN50", {"pretrained": "openai", "recipe": "demo"}, "leave recipe= out"),
        ("open_clip:RN50", {"pretrained": tmp_path}, "the folder holds none of open_clip_model.safetensors"),
        (tmp_path, {"pretrained": "openai"}, "pretrained= goes with a source open_clip:NAME"),
    ):
        with pytest.raises(schema.UserError, match=message) as caught:
            convclip.load(source, **options)
        assert "\n" not in str(caught.value)


def test_the_table_of_models_is_printed_without_torch():
    code = (
        "import runpy, sys; sys.argv = ['train.py', '--list_models']\n"
        "try:\n    runpy.run_path('launch/train.py', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'open_clip'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    first, *rows = done.stdout.splitlines()
    assert first.split() == ["name", "tags", "parameters", "image", "head", "text"]
    assert [row.split()[0] for row in rows] == list(schema.RELEASED)
    assert "RN50-quickgelu" in rows[1] and "openai yfcc15m cc12m" in rows[1] and "102.0 M     224 px" in rows[1]
    assert rows[-1].split("  ")[-1].strip() == "12 x 768, no causal mask"


def test_later_fields_do_not_change_what_stores_and_exports_of_0_1_0_say():
    before = json.loads(schema.Model().model_dump_json(context=schema.AS_BEFORE))
    assert not {"open_clip", "interpolation", "activation", "causal"} & {*before, *before["image"], *before["text"]}
    other = schema.Model.model_validate({"open_clip": "MobileCLIP-S1"})
    after = json.loads(other.model_dump_json(context=schema.AS_BEFORE, exclude={"image": {"mean"}}))
    assert after["image"]["interpolation"] == "bilinear" and after["text"]["causal"] is False
    assert "mean" not in after["image"] and "activation" not in after["text"]
