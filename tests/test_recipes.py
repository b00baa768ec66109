"""Recipes against the table of the experiments, and every way a recipe or an override can be wrong."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from convclip.config import list_recipes, load_recipe
from convclip.schema import BatchConfig, UserError

# The seed's runs, typed from its documents: what each experiment is, whatever the schema's defaults are.
# name: (backbone, head, embed, text kind, text width, lr, epochs, warm-up, locked, events, new lr scale)
GROUPS, LAYERS, ALL = "groups", "layers", "all"
TABLE = {
    "tiny_gpt2_nofreeze": ("convnextv2_tiny", "attention_pool", 512, "gpt2", 768, 7e-4, 26, 2200, (), [], 0.1),
    "tiny_gpt2_unfreeze": (
        *("convnextv2_tiny", "attention_pool", 512, "gpt2", 768, 7e-4, 26, 2400, ("image", "text")),
        [(3, "text", LAYERS, 6), (5, "image", GROUPS, 4)],
        0.1,
    ),
    "tiny_cliptext_unfreeze": (
        *("convnextv2_tiny", "attention_pool", 512, "clip", 512, 7e-4, 26, 2400, ("image",)),
        [(5, "image", GROUPS, 4)],
        0.1,
    ),
    "base_absattn_3stage": (
        *("convnext_base", "attention_pool_linear", 640, "clip", 640, 2e-5, 10, 1000, ("image", "text")),
        [(3, "image", GROUPS, 2), (8, "text", ALL, True)],
        0.2,
    ),
    "base_absattn_distill_frozen": (
        *("convnext_base", "attention_pool", 640, "clip", 640, 5e-4, 20, 1200, ("image", "text"), [], 0.1),
    ),
    "base_absattn_distill_unfreeze": (
        *("convnext_base", "attention_pool", 640, "clip", 640, 5e-4, 20, 1200, ("image", "text")),
        [(8, "image", GROUPS, 2), (18, "text", ALL, True)],
        0.05,
    ),
    "base_absattn_headalign": (
        *("convnext_base", "attention_pool", 640, "clip", 640, 5e-4, 10, 1000, ("image", "text")),
        [(6, "image", GROUPS, 1), (10, "text", ALL, True)],
        0.05,
    ),
    "rn50_csv": ("RN50", "attention_pool", 1024, "clip", 512, 5e-4, 32, 10000, (), [], 0.1),
}

# name: (epochs, locked, training rows)
VIDEO_TABLE = {
    "teachclip_msrvtt9k": (10, (), 180_000),
    "teachclip_msrvtt7k": (10, (), 140_200),
    "teachclip_msrvtt7k_frozen": (16, ("image", "text"), 140_200),
}


# What README's table lists. A recipe of one's own beside them needs no entry here: the checks of every recipe find it.
SEED_RECIPES = {*TABLE, *VIDEO_TABLE, "demo"}


def test_the_experiments_and_the_demo_are_among_the_recipes():
    assert set(list_recipes()) >= SEED_RECIPES


@pytest.mark.parametrize("name", TABLE)
def test_recipe_equals_the_table(name):
    recipe = load_recipe(name)
    image, text, optim = recipe.model.image, recipe.model.text, recipe.optim
    events = []
    for event in recipe.freezing.unfreeze:
        amount = next(amount for amount in (GROUPS, LAYERS, ALL) if getattr(event, amount))
        events.append((event.epoch, event.tower, amount, getattr(event, amount)))
    found = (
        *(image.backbone, image.head, recipe.model.embed_dim, text.kind, text.width),
        *(optim.lr, recipe.epochs, optim.warmup_steps, recipe.freezing.lock, events, recipe.freezing.new_lr_scale),
    )
    assert found == TABLE[name]


@pytest.mark.parametrize("name", TABLE)
def test_recipe_has_what_the_experiments_share(name):
    recipe = load_recipe(name)
    plain = name == "rn50_csv"
    assert recipe.batch.global_ == (64 if plain else 384) and recipe.batch.accumulation == 1
    assert recipe.optim.betas == ((0.9, 0.999) if plain else (0.9, 0.98))
    assert recipe.optim.eps == (1e-8 if plain else 1e-6)
    assert recipe.optim.weight_decay == 0.2
    assert recipe.rows_per_epoch == 591_753 and recipe.data.captions == "all"
    assert recipe.model.image.image_size == 224
    assert recipe.data.train is None and recipe.data.val is None
    assert (recipe.teacher is not None) == ("distill" in name)
    assert (recipe.head_alignment is not None) == ("headalign" in name)
    if name.startswith("base_"):
        assert recipe.model.pretrained == "hf-hub:laion/CLIP-convnext_base_w-laion2B-s13B-b82K"
        assert (recipe.model.text.heads, recipe.model.text.layers, recipe.model.text.vocab_size) == (10, 12, 49408)
    if name.startswith("tiny_"):
        assert recipe.model.image.pretrained == "timm" and recipe.model.pretrained is None
    if "gpt2" in name:
        text = recipe.model.text
        assert (text.heads, text.layers, text.vocab_size, text.tokenizer) == (12, 12, 50257, "gpt2")
        assert text.pretrained == "hf-hub:openai-community/gpt2"


@pytest.mark.parametrize("name", VIDEO_TABLE)
def test_video_recipe_is_the_original_set_up(name):
    recipe = load_recipe(name)
    optim, video, image = recipe.optim, recipe.video, recipe.model.image
    assert (recipe.epochs, recipe.freezing.lock, recipe.rows_per_epoch) == VIDEO_TABLE[name]
    assert (image.backbone, image.head, recipe.model.embed_dim) == ("convnext_base", "average_linear", 640)
    assert recipe.model.pretrained == "hf-hub:laion/CLIP-convnext_base_w-laion2B-s13B-b82K"
    assert (optim.weight_decay, optim.betas, optim.eps, optim.clip_grad_norm) == (0.2, (0.9, 0.98), 1e-6, 1.0)
    assert (optim.warmup_share, recipe.batch.global_, recipe.seed) == (0.1, 120, 42)
    rates = {part: optim.lr * optim.part_lr_scale.get(part, 1) for part in ("temporal", "aggregation", "image", "text")}
    towers = [] if recipe.freezing.lock else ["image", "text"]
    assert rates["temporal"] == 1e-4 and rates["aggregation"] == pytest.approx(1e-3)
    assert all(rates[tower] == pytest.approx(1e-7) for tower in towers)
    assert (video.frames, video.words, video.temporal_layers, video.coarse) == (12, 32, 4, "pearson")
    assert video.weights == (0.2, 1, 2) and video.mask_padding and video.temporal_init == "text"


def test_teacher_is_the_released_base_model():
    teacher = load_recipe("base_absattn_distill_frozen").teacher
    assert (teacher.model, teacher.pretrained) == ("convnext_base_w", "laion2b_s13b_b82k")


def test_demo_is_small_and_shows_an_unfreeze_event():
    recipe = load_recipe("demo")
    assert recipe.model.image.backbone == "convnextv2_atto" and recipe.model.image.image_size == 64
    assert len(recipe.freezing.unfreeze) == 1 and recipe.freezing.unfreeze[0].epoch < recipe.epochs
    assert recipe.model.image.pretrained is recipe.model.pretrained is recipe.model.text.pretrained is None


@pytest.mark.parametrize("name", list_recipes())
def test_resolved_recipe_reads_back_unchanged(name, tmp_path):
    recipe = load_recipe(name)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    again = load_recipe(tmp_path / "recipe.yaml")
    assert again == recipe and again.name == name
    assert again.to_yaml() == recipe.to_yaml()


@given(lr=st.floats(1e-12, 1e3), eps=st.floats(1e-20, 1.0), seed=st.integers(0, 2**63 - 1))
def test_overrides_arrive_exactly_and_survive_a_round_trip(lr, eps, seed):
    recipe = load_recipe("demo", [f"optim.lr={lr!r}", f"optim.eps={eps!r}", f"seed={seed}"])
    assert (recipe.optim.lr, recipe.optim.eps, recipe.seed) == (lr, eps, seed)
    assert yaml.safe_load(recipe.to_yaml())["optim"]["lr"] == lr


def test_overrides_reach_every_kind_of_place():
    overrides = [
        *("optim.lr=5e-4", "freezing.unfreeze.1.groups=2", "model.text.pretrained=null", "teacher.weight=2"),
        *("data.train=s3://bucket/a=b-{000000..000004}.tar", "model.image.mean=[0, 0, 0]", "batch.global=32"),
        *("freezing.unfreeze.0={step: 7, tower: text, all: true}", "optim.part_lr_scale.image=0.5"),
    ]
    recipe = load_recipe("tiny_gpt2_unfreeze", overrides)
    assert recipe.optim.lr == 5e-4 and recipe.optim.part_lr_scale == {"image": 0.5}
    assert recipe.freezing.unfreeze[1].groups == 2 and recipe.freezing.unfreeze[0].step == 7
    assert recipe.model.text.pretrained is None and recipe.model.image.mean == (0, 0, 0)
    assert recipe.teacher.weight == 2 and recipe.teacher.model == "convnext_base_w"
    assert recipe.data.train == "s3://bucket/a=b-{000000..000004}.tar" and recipe.batch.global_ == 32


@pytest.mark.parametrize(
    "override, words",
    [
        ("optim.lrr=1", ["unknown key optim.lrr", "'lr'"]),
        ("modl.embed_dim=1", ["unknown key modl", "'model'"]),
        ("batch.globl=1", ["unknown key batch.globl", "'global'"]),
        ("freezing.unfreeze.0.grups=1", ["freezing.unfreeze.0.grups", "'groups'"]),
        ("teacher.temprature=1", ["teacher.temprature", "'temperature'"]),
        ("optim.part_lr_scale.picture=1", ["optim.part_lr_scale.picture", "'image'"]),
        ("freezing.unfreeze.7.epoch=1", ["7 is not an index", "list of 2"]),
        ("freezing.unfreeze.².epoch=1", ["not an index"]),
        ("optim.lr", ["--set optim.lr", "key=value"]),
        ("=1", ["key=value"]),
        ("optim.lr.x=1", ["lr is a single value"]),
        ("optim.lr=[", ["not valid YAML"]),
        ("data.train={000..004}.tar", ["not valid YAML", "in quotes: --set 'data.train=\"{000..004}.tar\"'"]),
        ("optim.lr=fast", ["optim.lr", "valid number"]),
        ("optim.lr=0", ["optim.lr", "greater than 0"]),
        ("optim.ema_decay=1", ["optim.ema_decay", "less than 1"]),
        ("optim.lr=.inf", ["optim.lr", "finite"]),
        ("optim.lr=.nan", ["optim.lr"]),
        ("optim.betas=[1, 0.9]", ["optim.betas.0", "less than 1"]),
        ("epochs=0", ["epochs", "greater than 0"]),
        ("epochs=null", ["epochs"]),
        ("data.crop_scale=[1.0, 0.5]", ["crop_scale"]),
        ("model.image.std=[0, 1, 1]", ["model.image.std.0"]),
        ("model.text.heads=7", ["768", "heads 7"]),
        ("batch={global: 8, micro: 2, accumulation: 2}", ["micro", "accumulation"]),
        ("freezing.unfreeze.0.step=5", ["exactly one of epoch and step"]),
        ("freezing.unfreeze.0.groups=5", ["exactly one of groups, layers and all"]),
        ("freezing.unfreeze.0.layers=null", ["exactly one of groups, layers and all"]),
        ("video={weights: [1, -1, 0]}", ["video.weights.1"]),
        ("freezing.lock=[image]", ["text tower", "lock does not name"]),
    ],
)
def test_a_wrong_override_is_one_line_that_names_the_key(override, words):
    with pytest.raises(UserError) as caught:
        load_recipe("tiny_gpt2_unfreeze", [override])
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_an_unknown_recipe_gets_the_nearest_name():
    with pytest.raises(UserError, match="did you mean 'tiny_gpt2_unfreeze'"):
        load_recipe("tiny_gpt2_unfreze")


@pytest.mark.parametrize(
    "content, words",
    [
        (b"epochs: [1\n", "not valid YAML"),
        (b"- 1\n", "mapping"),
        (b"", "mapping"),
        (b"just words\n", "mapping"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"epochs: 1\nname: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        (b"{}", "epochs"),
        (b"1: 2\nepochs: 3\n", "string"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(content, words, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        load_recipe(path)
    assert "mine.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.yaml"):
        load_recipe(tmp_path / "absent.yaml")


def test_a_file_takes_its_own_name_and_the_defaults(tmp_path):
    (tmp_path / "mine.yaml").write_text("epochs: 3\noptim: {lr: 1e-3}\n")
    recipe = load_recipe(tmp_path / "mine.yaml", ["epochs=4"])
    assert (recipe.name, recipe.epochs, recipe.optim.lr, recipe.batch.global_) == ("mine", 4, 1e-3, 384)


@given(st.integers(1, 600), st.integers(1, 9), st.one_of(st.none(), st.integers(1, 64)), st.integers(1, 9))
def test_batch_arithmetic_is_exact_or_refused(total, accumulation, micro, world):
    batch = BatchConfig(global_=total, micro=micro, accumulation=1 if micro else accumulation)
    fits = total % (world * (micro or accumulation)) == 0
    if fits:
        size, count = batch.per_rank(world)
        assert size * count * world == total
        assert size == micro if micro else count == accumulation
    else:
        with pytest.raises(UserError, match=f"batch.global {total} .*world {world}"):
            batch.per_rank(world)


def test_the_sigmoid_loss_wants_a_bias():
    for half in ("loss.kind=sigmoid", "model.init_logit_bias=-10"):
        with pytest.raises(UserError, match="set both or neither"):
            load_recipe("demo", [half])


def test_recipes_cannot_change_after_loading():
    with pytest.raises(ValueError, match="frozen"):
        load_recipe("demo").epochs = 3


def test_loading_recipes_imports_no_torch():
    code = "import sys; from convclip.config import list_recipes; list_recipes(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
