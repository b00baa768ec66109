"""Before anything trains: all ranks are one program, on one folder, with one recipe, over the same data."""

from __future__ import annotations

import hashlib
import json
import platform
import secrets
import socket
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import nn

import convclip
from convclip.config import UserError
from convclip.distributed import gather_objects, is_main, on_main, rank, world_size
from convclip.features.identity import flat
from convclip.files import write_text, writing
from convclip.models.checkpoint_files import checksum
from convclip.schema import Recipe

PACKAGES = ("torch", "deepspeed", "timm", "open_clip_torch", "transformers")
# Written by rank 0, read by all, and removed.
TOKEN = ".ranks"
# A network file system may show a new file to other machines a moment later.
TOKEN_SECONDS = 10.0
POLL_SECONDS = 0.1
# Differences that a message names.
NAMED = 3


def refuse_differing(values: Mapping[str, Any]) -> None:
    """UserError on all ranks where `values`, by what a user calls them, are not the same on every rank.

    The line names a rank that differs from rank 0, both hosts, and what differs. A collective; all is sent only where
    something differs.
    """
    if world_size() == 1:
        return
    own = {name: str(value) for name, value in values.items()}
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
    if len(set(gather_objects(digest))) == 1:
        return
    ranks = gather_objects((socket.gethostname(), own))
    main_host, expected = ranks[0]
    others = [(number, host, found) for number, (host, found) in enumerate(ranks) if found != expected]
    number, host, found = others[0]
    names = [name for name in expected | found if expected.get(name) != found.get(name)]
    named = "; ".join(f"{name} {found.get(name)}, not {expected.get(name)}" for name in names[:NAMED])
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    as_well = f" ({len(others)} ranks differ)" if len(others) > 1 else ""
    raise UserError(
        f"rank {number} (host {host}) has other things than rank 0 (host {main_host}){as_well}: {named}{more}; "
        "give all ranks the same"
    )


def refuse_other_recipe(recipe: Recipe, **more: Any) -> None:
    """As `refuse_differing`, of a recipe's fields and `more`."""
    refuse_differing(flat({"recipe": recipe.model_dump(mode="json", by_alias=True), **more}))


def versions() -> dict[str, str]:
    """What makes the program: this package's code and the packages that compute."""
    code = hashlib.sha256()
    package = Path(convclip.__file__).parent
    for path in sorted(package.rglob("*.py")):
        code.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    packages = {f"the version of {name}": metadata.version(name) for name in PACKAGES}
    return {"convclip's code (checksum)": code.hexdigest()[:16], "Python": platform.python_version(), **packages}


def weights_checksum(model: nn.Module) -> str:
    """What identifies the weights and buffers that a model starts with."""
    sums = [(name, checksum(value.cpu().contiguous())) for name, value in model.state_dict().items()]
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:16]


def refuse_unshared(folder: Path, flag: str) -> None:
    """UserError on all ranks where one does not see what rank 0 writes into `folder`, named by `flag`; a collective.

    Errors: CannotWrite on all of them where rank 0 cannot write there.
    """
    if world_size() == 1:
        return
    place = folder / TOKEN

    def write() -> tuple[str, str]:
        token = secrets.token_hex(8)
        with writing(folder, flag):
            folder.mkdir(parents=True, exist_ok=True)
        write_text(place, token, flag)
        return socket.gethostname(), token

    main_host, token = on_main(write)
    until = time.monotonic() + TOKEN_SECONDS
    while not (sees := _read(place) == token) and time.monotonic() < until:
        time.sleep(POLL_SECONDS)
    blind = [found for found in gather_objects(None if sees else (rank(), socket.gethostname())) if found]
    if is_main():
        with writing(place, flag):
            place.unlink(missing_ok=True)
    if blind:
        number, host = blind[0]
        raise UserError(
            f"{flag} {folder}: rank {number} (host {host}) does not see what rank 0 (host {main_host}) wrote there: "
            "name a folder that all hosts share"
        )


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
