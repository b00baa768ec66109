"""Who may import whom, read from the imports: the house keeps its floors."""

import ast
import functools
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
GROUND = {"schema", "config", "distributed"}
PARTS = {"models", "losses", "data"}
# Part of convclip: the parts it may import, besides itself.
MAY_IMPORT = {
    # Of the package itself: `convclip.load` imports when it is called.
    "__init__": {"clip", "schema"},
    "clip": GROUND | PARTS | {"evaluation"},
    "schema": set(),
    "config": {"schema"},
    "distributed": set(),
    "models": GROUND,
    # Losses take tensors and a process group; of the schema they know the error that users see.
    "losses": {"distributed", "schema"},
    "data": GROUND,
    "evaluation": GROUND | PARTS,
    "engine": GROUND | PARTS | {"evaluation"},
}
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
    """`models` for convclip.models.image_tower.ImageTower; None outside convclip."""
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
    if layer_of(path) not in ("engine", "launch", "benchmarks"):
        assert "deepspeed" not in names


@pytest.mark.parametrize("name", ["schema", "config"])
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
