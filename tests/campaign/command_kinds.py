"""Command lines: for every flag that takes a file, files of the wrong kind. Scripts run in this process."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from convclip.run import evaluate_checkpoint
from convclip.schema import UserError
from tests.broken_recipes import COMMANDS
from tests.campaign.judge import COUNTED, Wrong
from tests.conftest import REPOSITORY
from tests.data.makers import noise_jpeg, write_shards

FIXTURE = REPOSITORY / "tests" / "fixtures" / "0.1.0"
IMAGES = [{"id": n, "file_name": f"{n}.jpg"} for n in range(4)]
# Script, its arguments as they should be ({out} is a new place, other names are of `sound`), which of them goes wrong.
SCRIPTS: tuple[tuple[str, tuple[str, ...], tuple[int, ...]], ...] = (
    ("launch/train.py", ("--plan", "--recipe", "{recipe}", "--ds_config", "{ds_config}"), (2, 4)),
    (
        "tools/make_shards.py",
        (
            "--split",
            "train",
            "--output_dir",
            "{out}",
            "--annotations",
            "{json}",
            "--images",
            "{images}",
            "--workers",
            "1",
        ),
        (5, 7),
    ),
    ("tools/make_coco_csv.py", ("--output", "{out}", "--annotations", "{json}", "--images", "{images}"), (3, 5)),
    ("tools/plot_run.py", ("{run}", "--output", "{out}.png"), (0,)),
    ("tools/compare_losses.py", ("{run}", "{run}"), (0, 1)),
    ("tools/export_open_clip.py", ("--checkpoint", "{run}", "--output_dir", "{out}"), (1,)),
    ("tools/check_data.py", ("{shards}", "--workers", "1"), (0,)),
    ("tools/check_run.py", ("{run}",), (0,)),
)
CONTENTS: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "jpeg": noise_jpeg,
    "tar": lambda: next((FIXTURE / "shards").glob("*.tar")).read_bytes(),
    "store": lambda: (FIXTURE / "run" / "features.h5").read_bytes(),
    "weights": lambda: (FIXTURE / "export" / "open_clip_model.safetensors").read_bytes(),
    "list": lambda: b"[1, 2, 3]",
    "object": lambda: b'{"a": {"b": [1, null, "x"]}}',
    "null": lambda: b"null",
    "zeros": lambda: bytes(4096),
    "text": lambda: b"a line of text\nand one more\n",
    "noise": lambda: random.Random(0).randbytes(5000),
    "no UTF-8": lambda: b"\xff\xfe" * 50,
}
KINDS_OF_FILE = (*CONTENTS, "folder", "fifo", "device", "loop", "missing", "long", "nothing")


def wrong_file(kind: str, folder: Path) -> str:
    """The name of a file of another kind than any flag wants."""
    path = folder / "wrong"
    if kind in CONTENTS:
        path.write_bytes(CONTENTS[kind]())
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    return {"long": str(folder / ("x" * 5000)), "nothing": ""}.get(kind, str(path))


def sound(folder: Path) -> dict[str, str]:
    """What the arguments of SCRIPTS stand for."""
    (folder / "images").mkdir()
    for image in IMAGES:
        (folder / "images" / str(image["file_name"])).write_bytes(noise_jpeg(int(str(image["id"])), (24, 20)))
    rows = [{"id": n, "image_id": n, "caption": f"{n} 0"} for n in range(len(IMAGES))]
    (folder / "a.json").write_text(f'{{"images": {IMAGES}, "annotations": {rows}}}'.replace("'", '"'))
    return {
        "recipe": str(FIXTURE / "small.yaml"),
        "ds_config": str(REPOSITORY / "ds_configs" / "zero1_fp32.json"),
        "json": str(folder / "a.json"),
        "images": str(folder / "images"),
        "run": str(FIXTURE / "run"),
        "shards": write_shards(folder / "shards", [3]),
        "out": str(folder / "out"),
    }


@functools.cache
def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"campaign_{Path(name).stem}", REPOSITORY / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def call(name: str, arguments: list[str]) -> tuple[int, str]:
    """Exit code and stderr of a script, run as its last lines run it."""
    source = (REPOSITORY / name).read_text(encoding="utf-8")
    last = source.split('if __name__ == "__main__":\n')[1].strip()
    before, sys.argv = sys.argv, [name, *arguments]
    error = io.StringIO()
    try:
        with contextlib.redirect_stderr(error):
            exec(compile(last, name, "exec"), vars(_script(name)))
    except SystemExit as ended:
        return int(ended.code or 0), error.getvalue()
    finally:
        sys.argv = before
    return 0, error.getvalue()


def _judge(told: str, code: int, error: str) -> str:
    """A refusal is raised with the line that was printed; a check that finds something counts it."""
    if code == 1 and told.startswith("tools/check_"):
        return COUNTED
    if code != 2:
        raise Wrong(f"{told} ends with {code}: {error[-200:]!r}")
    # Progress bars stand in front of it, and argparse's usage.
    raise UserError(error.strip().split("\r")[-1].split("\n")[-1])


def wrong_files(folder: Path, rng: random.Random) -> str:
    """A flag of a script names a file of another kind: one line, exit code 2, and nothing is written."""
    name, words, places = rng.choice(SCRIPTS)
    files = sound(folder)
    arguments = [word.format(**files) for word in words]
    place, kind = rng.choice(places), rng.choice(KINDS_OF_FILE)
    arguments[place] = wrong_file(kind, folder)
    code, error = call(name, arguments)
    if code == 2 and list(folder.glob("out*")):
        raise Wrong(f"{name} was refused and wrote {[path.name for path in folder.glob('out*')]}")
    return _judge(f"{name} {words[place]} as {kind}", code, error)


def listed_commands(folder: Path, rng: random.Random) -> str:
    """The command lines of tests/broken_recipes.py."""
    name, (arguments, _) = rng.choice(list(COMMANDS.items()))
    given = [argument.replace("{folder}", str(folder)) for argument in arguments]
    return _judge(f"launch/train.py, {name}", *call("launch/train.py", given))


def evaluations(folder: Path, rng: random.Random) -> str:
    """What launch/evaluate.py hands on, one file of another kind."""
    given: dict[str, str] = {
        "place": str(FIXTURE / "run"),
        "data": str(FIXTURE / "shards" / "val-000000.tar"),
        "folder": str(folder / "out"),
    }
    flag, kind = rng.choice((*given, "zero_shot")), rng.choice(KINDS_OF_FILE)
    # As an output folder these are right.
    kind = "long" if flag == "folder" and kind in ("folder", "missing", "nothing") else kind
    given[flag] = wrong_file(kind, folder) or str(folder / "nothing")
    evaluate_checkpoint(**given)  # type: ignore[arg-type]
    raise Wrong(f"{flag} as {kind} was taken")
