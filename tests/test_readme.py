"""What README and CONTRIBUTING tell people to type or to look at exists."""

import functools
import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import braceexpand
import pytest
from PIL import Image

import convclip
from convclip.config import list_recipes, load_recipe
from convclip.sweep.points import load_points, make_points, split_settings
from tests.test_recipes import SEED_RECIPES

REPOSITORY = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md")
# Programs that come with the environment or the system, and what may follow them.
RUNNERS = ("python", "deepspeed", "torchrun")


def text_of(name):
    return (REPOSITORY / name).read_text(encoding="utf-8")


def commands_of(text):
    """The commands of the bash blocks of a document, continued lines joined, split as a shell would."""
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip():
                yield shlex.split(line, comments=True)


def demo_commands():
    """The commands that `make demo` runs once the environment is there."""
    text = re.search(r"^demo:.*?\n(.*?)\n\n", text_of("Makefile"), re.MULTILINE | re.DOTALL)[1]
    for line in text.replace("\\\n", " ").splitlines():
        yield shlex.split(line.strip().removeprefix("$(RUN)"))


COMMANDS = [command for name in DOCUMENTS for command in commands_of(text_of(name))] + list(demo_commands())
SCRIPT_COMMANDS = [command for command in COMMANDS if command[0] in RUNNERS]


def values_of(flag):
    """Every value given to `flag` in any command."""
    return [value for command in COMMANDS for name, value in itertools.pairwise(command) if name == flag]


def block_of(title, language=""):
    """The code block of a section of the README."""
    section = text_of("README.md").split(f"\n## {title}\n")[1].split("\n## ")[0]
    return re.search(rf"^```{language}\n(.*?)^```", section, re.MULTILINE | re.DOTALL)[1]


@functools.cache
def help_of(script):
    result = subprocess.run(
        [sys.executable, script, "--help"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_documents_hold_commands():
    programs = {command[0] for command in COMMANDS}
    assert {"make", "python", "deepspeed"} <= programs <= {"make", *RUNNERS, "rm", "@echo"}
    assert len(SCRIPT_COMMANDS) > 10


@pytest.mark.parametrize("command", SCRIPT_COMMANDS, ids=lambda command: " ".join(command)[:60])
def test_script_exists_and_knows_its_flags(command):
    place = next(number for number, word in enumerate(command) if word.endswith(".py"))
    script, arguments = command[place], command[place + 1 :]
    assert (REPOSITORY / script).is_file()
    known = set(re.findall(r"--[a-z][a-z_]*", help_of(script)))
    flags = {word.split("=")[0] for word in arguments if word.startswith("--")}
    assert flags <= known, f"{script} does not know {flags - known}"


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE))
    named = {command[1] for command in COMMANDS if command[0] == "make"}
    in_text = {
        name for document in DOCUMENTS for name in re.findall(r"`(?:\w+=\S+ )?make ([a-z-]+)", text_of(document))
    }
    assert {"demo", "test"} <= named and named | in_text <= targets


def test_recipes_exist_and_take_the_overrides_shown():
    for command in SCRIPT_COMMANDS:
        words = dict(itertools.pairwise(command))
        overrides = [value for flag, value in itertools.pairwise(command) if flag == "--set"]
        if "tools/sweep.py" in command:
            fixed, swept = split_settings(overrides)
            points = make_points(swept, None, 0)
            assert len(load_points(words["--recipe"], fixed, points, {})[1]) == len(points) > 1
        elif "--recipe" in words and words["--recipe"] != "NAME":
            load_recipe(words["--recipe"], overrides)


def recipe_rows():
    """{name: row} of the table of recipes."""
    recipes = text_of("README.md").split("## Recipes")[1].split("\n## ")[0]
    first_table = recipes.split("|---|", 1)[1].split("\n\n")[0]
    return {row[1]: row[0] for row in re.finditer(r"^\| `(\w+)` .*$", first_table, re.MULTILINE)}


def test_the_recipe_table_lists_the_seeds_recipes():
    """A recipe of one's own may have a row, and needs none."""
    assert SEED_RECIPES <= set(recipe_rows()) <= set(list_recipes())


@pytest.mark.parametrize("name", recipe_rows())
def test_the_recipe_table_holds_the_recipes_numbers(name):
    row = recipe_rows()[name]
    *_, opens, lr, epochs, warmup = (cell.strip() for cell in row.strip("|").split("|"))
    recipe = load_recipe(name)
    assert (float(lr), int(epochs)) == (recipe.optim.lr, recipe.epochs)
    if recipe.optim.warmup_share:
        assert warmup == f"{100 * recipe.optim.warmup_share:g} %"
    else:
        assert int(warmup) == recipe.optim.warmup_steps
    for event in recipe.freezing.unfreeze:
        amount = event.groups or event.layers
        assert (str(amount) if amount else event.tower) in opens and f"at {event.epoch}" in opens


def test_ds_configs_named_exist_and_all_are_named():
    named = set(re.findall(r"ds_configs/\w+\.json", text_of("README.md")))
    assert named == {str(path.relative_to(REPOSITORY)) for path in REPOSITORY.glob("ds_configs/*.json")}
    assert set(values_of("--ds_config")) <= named


def test_brace_patterns_expand_to_numbered_shards():
    patterns = values_of("--train_data") + values_of("--val_data") + values_of("--data")
    assert sum("{" in pattern for pattern in patterns) >= 4
    for pattern in patterns:
        shards = list(braceexpand.braceexpand(pattern))
        assert not any(set(shard) & set("{},") for shard in shards)
        if "{" in pattern:
            assert len(shards) > 1 and len({len(shard) for shard in shards}) == 1


def test_coco_patterns_cover_the_data_set():
    # 118,287 and 5,000 images, 1,000 in a shard by default.
    assert {len(list(braceexpand.braceexpand(p))) for p in values_of("--train_data") if p.startswith("shards/")} == {
        119
    }
    assert {len(list(braceexpand.braceexpand(p))) for p in values_of("--val_data") if p.startswith("shards/")} == {5}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_in_the_text_exist(document):
    text = text_of(document)
    folders = "convclip|ds_configs|launch|tools|tests|benchmarks|examples|.ci"
    named = set(re.findall(rf"`((?:{folders})/[\w./]*)`", text)) | set(re.findall(r"\]\((\w+(?:\.md)?)\)", text))
    named |= set(re.findall(r"`(\w+\.(?:md|txt|toml)|setup\.py|Makefile)`", text))
    assert named
    assert not [path for path in sorted(named) if not (REPOSITORY / path).exists()]


def test_the_python_block_runs(tmp_path, monkeypatch, capsys):
    """On the run that 0.1.0 left, under the name that the block gives it. The answers are found again pair by pair."""
    run = tmp_path / "runs" / "tiny_gpt2_unfreeze"
    run.parent.mkdir()
    run.symlink_to(REPOSITORY / "tests" / "fixtures" / "0.1.0" / "run")
    # The run's recipe names its tokenizer from the repository's root.
    (tmp_path / "tests").symlink_to(REPOSITORY / "tests")
    for name, colour in (("dog.jpg", (200, 150, 60)), ("boat.jpg", (40, 60, 210))):
        Image.new("RGB", (48, 40), colour).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(compile(block_of("Use the model in Python", "python"), "README.md", "exec"), found)
    assert found["images"].shape == (2, 16) and found["texts"].shape == (3, 16) and found["logits"].shape == (2, 3)
    clip, paths, captions = convclip.load(run), found["paths"], found["captions"]
    score = {
        (path, caption): float(clip.embed_images(path)[0] @ clip.embed_texts(caption)[0])
        for path, caption in itertools.product(paths, captions)
    }
    expected = [f"{path} -> {max(captions, key=lambda caption, path=path: score[path, caption])}" for path in paths]
    expected += [f"{caption} -> {max(paths, key=lambda path, of=caption: score[path, of])}" for caption in captions]
    assert capsys.readouterr().out.splitlines() == expected


def test_the_tree_is_the_repositorys():
    """Every name in it is there; every folder of the repository, and every room and module of convclip/, is in it."""
    named, above = set(), []
    for line in block_of("What is where").splitlines():
        name = line.split()[0]
        above[(len(line) - len(line.lstrip())) // 2 :] = [name]
        named.add("".join(above))
    assert not [name for name in sorted(named) if not (REPOSITORY / name).exists()]
    package = REPOSITORY / "convclip"
    modules = {f"convclip/{path.name}" for path in package.glob("*.py")}
    rooms = {f"{path.parent.relative_to(REPOSITORY)}/" for path in [*package.rglob("*.py"), *package.rglob("*.yaml")]}
    # At the top a user's own shards and runs may lie, so these are written out.
    tops = {f"{name}/" for name in ("docs", "ds_configs", "launch", "tools", "examples", "benchmarks", "tests")}
    assert named == modules | rooms | tops
