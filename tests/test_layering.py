"""Who may import whom, read from the imports: the house keeps its floors."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
GROUND = {"schema", "config", "documents", "distributed", "files", "locks", "devices"}
PARTS = {"models", "losses", "data", "features"}
BELOW_ENGINE = GROUND | PARTS | {"evaluation"}
# Part of convclip: the parts it may import, besides itself.
MAY_IMPORT = {
    # Of the package itself: `convclip.load` imports when it is called.
    "__init__": {"clip", "schema"},
    "clip": GROUND | PARTS | {"evaluation"},
    "exports": GROUND | PARTS | {"evaluation"},
    "sections": set(),
    "documents": {"sections"},
    "schema": {"sections", "documents"},
    "config": {"schema", "documents"},
    "distributed": set(),
    "devices": {"schema"},
    "command_line": {"schema"},
    "files": {"schema"},
    "locks": {"files", "schema"},
    "models": GROUND,
    # Losses take tensors and a process group; of the schema they know the error that users see.
    "losses": {"distributed", "schema"},
    "data": GROUND,
    "features": GROUND,
    "evaluation": GROUND | PARTS,
    "engine": BELOW_ENGINE,
    "video": BELOW_ENGINE | {"engine"},
    "run": BELOW_ENGINE | {"engine", "video"},
    "sweep": BELOW_ENGINE | {"engine", "run"},
}
# Rooms of the engine that know no DeepSpeed; in the others the engine's steps are taken.
WITHOUT_DEEPSPEED = ("stages", "stored", "plan")
SCRIPTS = ("launch", "tools", "benchmarks")
MODULES = sorted((REPOSITORY / "convclip").rglob("*.py"))
FILES = MODULES + [path for folder in SCRIPTS for path in sorted((REPOSITORY / folder).rglob("*.py"))]
IDS = [str(path.relative_to(REPOSITORY)) for path in FILES]


@functools.cache
def imports_of(path, root=REPOSITORY):
    """Absolute names of every module and member that a file imports, wherever in it the import stands."""
    package = path.relative_to(root).with_suffix("").parts[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, *(node.module or "").split("."))).strip(".")
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


def part_of(name):
    """`models` for convclip.models.tower.Tower; None outside convclip."""
    first, *rest = name.split(".")
    return rest[0] if first == "convclip" and rest else None


def layer_of(path):
    folder, *rest = path.relative_to(REPOSITORY).with_suffix("").parts
    return rest[0] if folder == "convclip" else folder


def test_imports_are_read_in_every_form(tmp_path):
    path = tmp_path / "convclip" / "models" / "tower.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import a.b as c\nfrom ..losses import x\nfrom .head import y\ndef f():\n    from convclip import data\n"
    )
    found = imports_of(path, tmp_path)
    assert found == {"a.b", "convclip.losses.x", "convclip.models.head.y", "convclip.data"}
    assert {part_of(name) for name in found} == {None, "losses", "models", "data"}


def test_every_part_of_the_package_has_its_rule():
    assert {layer_of(path) for path in MODULES} == set(MAY_IMPORT)


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_only_lower_floors_are_imported(path):
    layer = layer_of(path)
    parts = {part_of(name) for name in imports_of(path)} - {None}
    allowed = set(MAY_IMPORT) if layer in SCRIPTS else MAY_IMPORT.get(layer, set()) | {layer}
    assert parts <= allowed, f"{path.name} imports {parts - allowed}"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_only_engine_and_launch_import_deepspeed(path):
    names = {name.split(".")[0] for name in imports_of(path)}
    above = layer_of(path) in ("engine", "launch", "benchmarks") and path.parent.name not in WITHOUT_DEEPSPEED
    if not above or path.stem in ("task", "inputs", "objective", "meters"):
        assert "deepspeed" not in names


def test_no_two_modules_or_classes_share_a_name():
    stems = [path.stem for path in MODULES if path.stem != "__init__"]
    classes = [
        node.name
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    for names in (stems, classes):
        assert not {name for name in names if names.count(name) > 1}


def test_only_the_recipe_is_asked_for_video_and_once():
    """`Recipe.task` asks, and `run.open_task` parts the ways by its answer."""
    asking = [
        path.relative_to(REPOSITORY).as_posix()
        for path in FILES
        if re.search(r"\.video is (not )?None|if \w+\.video\b", path.read_text(encoding="utf-8"))
    ]
    assert asking == ["convclip/schema.py"]


def test_the_trainer_stands_on_few_modules():
    path = REPOSITORY / "convclip" / "engine" / "trainer.py"
    modules = {name.rpartition(".")[0] for name in imports_of(path) if part_of(name)}
    assert len(modules) <= 10, sorted(modules)


def test_import_convclip_takes_no_torch():
    code = "import sys, convclip; sys.exit(bool({'torch', 'deepspeed', 'numpy'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


@pytest.mark.parametrize(
    "name", ["schema", "config", "documents", "command_line", "sections/base", "sections/training"]
)
def test_recipes_load_without_torch(name):
    found = {found.split(".")[0] for found in imports_of(REPOSITORY / "convclip" / f"{name}.py")}
    assert not found & {"torch", "deepspeed", "numpy", "timm", "transformers"}


def test_distributed_needs_torch_alone():
    outside = {name.split(".")[0] for name in imports_of(REPOSITORY / "convclip" / "distributed.py")}
    assert outside <= {"torch", "typing", "collections", "__future__"}


@pytest.mark.parametrize("path", [path for path in MODULES if layer_of(path) == "losses"], ids=lambda path: path.stem)
def test_losses_know_no_recipe(path):
    assert {name for name in imports_of(path) if part_of(name) == "schema"} <= {"convclip.schema.UserError"}


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_no_drawer_for_everything(path):
    assert path.stem not in ("utils", "util", "common", "helpers", "misc", "registry")
    assert not path.stem.startswith("legacy")


@pytest.mark.parametrize(
    "path", [path for path in MODULES if path.name != "__init__.py"], ids=lambda path: str(path.relative_to(REPOSITORY))
)
def test_every_module_has_a_reader(path):
    module = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
    others = [other for other in FILES if other != path and layer_of(other) != "benchmarks"]
    readers = [other for other in others for name in imports_of(other) if f"{name}.".startswith(f"{module}.")]
    assert readers, f"nothing in convclip, launch or tools imports {module}: use it or remove it"
