"""From an address to tar files on a local disk: patterns, wids indexes, and shards behind URLs.

Everything that is wrong with an address shows here, before training starts: patterns without a file, missing shards,
sizes that differ from the index, forbidden `pipe:` commands.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import braceexpand
from tqdm import tqdm
from webdataset.gopen import gopen

from convclip.data.local_files import read_json
from convclip.distributed import is_main
from convclip.files import whole_file
from convclip.locks import Lock
from convclip.schema import Data, UserError

WIDS_KIND = "wids-shard-index-v1"
FETCHES_AT_ONCE = 4
MAX_SHARDS = 100_000
# Far more than any image has; the order of an epoch has a row for each.
MAX_CAPTIONS = 10_000
# A range of numbers or letters ({000000..000117}), a single brace or comma, or one with a backslash, which is none.
BRACES = re.compile(
    r"\\.|\{(?P<first>-?\d{1,4000}(?=\.\.-?\d)|[A-Za-z](?=\.\.[A-Za-z]))\.\.(?P<last>-?\d{1,4000}|[A-Za-z])(?:\.\.-?\d+)?\}|[{},]"
)
SHOWN = 200
BLOCK = 1 << 20


@dataclass(frozen=True)
class Shard:
    """One tar file; what its index says of it is None where there is no index."""

    address: str
    path: str
    filesize: int | None = None
    md5sum: str | None = None
    nsamples: int | None = None
    ncaptions: tuple[int, ...] | None = None


def find_shards(address: str, data: Data) -> list[Shard]:
    """The shards of `address`, all present on a local disk, in the order of the address.

    Args:
        address: parts joined by `::`; each a tar file, a brace or glob pattern, a wids index (.json), or a URL.
            What a URL gives is fetched once: to fetch it again, delete it from the cache folder.
        data: `allow_pipe` and `cache_folder` are read.

    Raises:
        UserError: a pattern matches nothing, a shard is missing, cut or listed twice, or `pipe:` is not allowed.
    """
    shards = named_shards(address, data)
    for shard in shards:
        if problem := size_problem(shard):
            raise UserError(problem)
    return shards


def size_problem(shard: Shard) -> str | None:
    """What to say of a shard whose size is not the one that its index has."""
    size = os.path.getsize(shard.path)
    if shard.filesize in (None, size):
        return None
    return f"shard {shard.path} has {size} bytes where its index says {shard.filesize}: copy or build it again"


def named_shards(address: str, data: Data) -> list[Shard]:
    """As `find_shards`, with sizes not yet compared with the index."""
    shards = [shard for part in address.split("::") for shard in _expand(part)]
    for shard in shards:
        if shard.address.startswith("pipe:") and not data.allow_pipe:
            raise UserError(f"{shard.address!r} runs a shell command: set data.allow_pipe=true if you trust it")
    seen = set()
    for shard in shards:
        if shard.address in seen:
            raise UserError(f"shard {shard.address} is listed twice in {address!r}: name every shard once")
        seen.add(shard.address)
    missing = [s.path for s in shards if not is_url(s.address) and not os.path.isfile(s.path)]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(shards)} shards of {address!r} are missing, the first is {missing[0][:SHOWN]}"
        )
    return _fetch_all(_with_indexes(shards), data)


def cache_folder(data: Data) -> Path:
    """Where fetched shards and member tables are kept: data.cache_folder, or ~/.cache/convclip."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(data.cache_folder or os.path.join(base, "convclip"))


def is_url(address: str) -> bool:
    """True for `scheme:...`, which webdataset opens; False for a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", address) is not None


def _expand(part: str) -> list[Shard]:
    """One part of an address as shards; nothing is opened but a wids index."""
    names = _expand_braces(part)
    shards = []
    for name in map(os.path.expanduser, names):
        if is_url(name):
            shards.append(Shard(name, ""))
        elif name.endswith(".json"):
            shards.extend(_shards_of_index(Path(name)))
        else:
            shards.extend(Shard(path, path) for path in _match(name))
    return shards


def _expand_braces(part: str) -> list[str]:
    # Counted first: the library would write out 1e11 names.
    if _brace_count(part) > MAX_SHARDS:
        raise UserError(f"data address {part[:SHOWN]!r} stands for more than {MAX_SHARDS:,} shards: check its braces")
    try:
        return list(braceexpand.braceexpand(part))
    except (ValueError, RecursionError):  # unbalanced braces, nesting without end
        raise UserError(
            f"data address {part[:SHOWN]!r} has unbalanced braces: write it like train-{{000000..000117}}.tar"
        ) from None


def _brace_count(part: str) -> int:
    """How many names a brace pattern stands for: alternatives add up, groups behind one another multiply."""
    groups = [[0, 1]]  # [alternatives before the present one, names of the present one], innermost last
    for token in BRACES.finditer(part):
        first, last = token.group("first"), token.group("last")
        if first is not None:
            numbers = int(last) - int(first) if first.lstrip("-").isdigit() else ord(last) - ord(first)
            groups[-1][1] *= abs(numbers) + 1
        elif token.group() == "{":
            groups.append([0, 1])
        elif len(groups) > 1 and token.group() == ",":
            groups[-1] = [sum(groups[-1]), 1]
        elif len(groups) > 1 and token.group() == "}":
            names = sum(groups.pop())
            groups[-1][1] *= names
        if groups[-1][1] > MAX_SHARDS:
            break
    return sum(groups[-1])


def _match(name: str) -> list[str]:
    """Local tar files for one path or glob pattern; a path without wildcards need not exist."""
    if os.path.isdir(name):
        raise UserError(f"{name} is a folder: name its shards, as in {os.path.join(name, '*.tar')}")
    paths = [name]
    if glob.has_magic(name) and not os.path.exists(name):
        # img2dataset writes <shard>_stats.json and .parquet files beside its shards; only the tars are samples.
        paths = sorted(path for path in glob.glob(name, recursive=True) if path.endswith(".tar"))
        if not paths:
            raise UserError(f"no .tar file matches {name!r}")
    for path in paths:
        if not path.endswith(".tar"):
            raise UserError(f"{path} is no .tar shard: shards are read in random order and must not be compressed")
    return paths


def _shards_of_index(path: Path) -> list[Shard]:
    """The shards a wids index lists; relative addresses are relative to the index."""
    if not os.path.lexists(path):
        raise UserError(f"shard index {str(path)[:SHOWN]} does not exist")
    index = read_json(path, "shard index")
    if not isinstance(index, dict) or index.get("__kind__") != WIDS_KIND:
        raise UserError(f"{path} is no shard index: its __kind__ is not {WIDS_KIND}")
    entries = index.get("shardlist")
    if not isinstance(entries, list):
        raise UserError(f"shard index {path} is malformed (no list under the key 'shardlist'): build it again")
    try:
        return [_shard_of_entry(entry, path.parent) for entry in entries]
    except ValueError as error:
        raise UserError(f"shard index {path} is malformed ({error}): build it again") from None


def _shard_of_entry(entry: Any, folder: Path) -> Shard:
    if not isinstance(entry, dict) or not isinstance(entry.get("url"), str) or "\0" in entry["url"]:
        raise ValueError(f"an entry without a url: {json.dumps(entry)[:SHOWN]}")
    address, md5sum, counts = entry["url"], entry.get("md5sum"), entry.get("ncaptions")
    if md5sum is not None and not isinstance(md5sum, str):
        raise ValueError(f"md5sum of {address} is no text")
    if counts is not None and not (isinstance(counts, list) and all(_is_count(n, MAX_CAPTIONS) for n in counts)):
        raise ValueError(f"ncaptions of {address} is no list of numbers from 0 to {MAX_CAPTIONS:,}")
    path = "" if is_url(address) else str(folder / address)
    return Shard(
        address=address if is_url(address) else path,
        path=path,
        filesize=_count(entry, "filesize"),
        md5sum=md5sum,
        nsamples=_count(entry, "nsamples"),
        ncaptions=None if counts is None else tuple(counts),
    )


def _count(entry: dict[str, Any], key: str) -> int | None:
    value = entry.get(key)
    if value is not None and not _is_count(value, 2**62):
        raise ValueError(f"{key} of {entry['url']} is {json.dumps(value)[:SHOWN]}, no count")
    return value


def _is_count(value: Any, largest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= largest


def _with_indexes(shards: list[Shard]) -> list[Shard]:
    """Local shards joined with what a `*.index.json` beside them says."""
    folders = {os.path.dirname(shard.path) for shard in shards if shard.path}
    known: dict[str, Shard] = {}
    for folder in sorted(folders):
        for index in sorted(Path(folder or ".").glob("*.index.json")):
            known.update((os.path.abspath(entry.path), entry) for entry in _shards_of_index(index) if entry.path)
    joined = []
    for shard in shards:
        entry = known.get(os.path.abspath(shard.path)) if shard.path else None
        joined.append(shard if entry is None else replace(entry, address=shard.address, path=shard.path))
    return joined


def _fetch_all(shards: list[Shard], data: Data) -> list[Shard]:
    """Shards behind URLs copied into the cache folder; local ones as they are."""
    # By address: one that is listed twice is fetched once.
    remote = list({shard.address: shard for shard in shards if is_url(shard.address)}.values())
    if not remote:
        return shards
    folder = cache_folder(data) / "shards"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to the shard cache {folder} ({error}): set data.cache_folder") from None
    with ThreadPoolExecutor(FETCHES_AT_ONCE) as pool:
        fetches = pool.map(lambda shard: _fetch(shard, folder), remote)
        silent = not is_main()
        paths = dict(tqdm(fetches, f"shards to {folder}", len(remote), unit="shard", delay=2, disable=silent))
    return [replace(shard, path=paths[shard.address]) if is_url(shard.address) else shard for shard in shards]


def _fetch(shard: Shard, folder: Path) -> tuple[str, str]:
    """(address, local path). The first process to come copies, the others of this machine wait for it."""
    digest = hashlib.sha256(shard.address.encode()).hexdigest()[:16]
    base = "" if shard.address.startswith("pipe:") else os.path.basename(urlparse(shard.address).path)
    target = folder / (f"{digest}-{base}" if base.endswith(".tar") else f"{digest}.tar")
    with Lock(f"{target}.lock", target, wait=True):
        # What a killed fetch of convclip 0.1.0 left.
        target.with_name(target.name + ".part").unlink(missing_ok=True)
        if not target.exists():
            with whole_file(target) as part:
                try:
                    _copy(shard, part)
                except (OSError, ValueError) as error:
                    raise UserError(f"shard {shard.address} cannot be fetched: {error}") from None
    return shard.address, str(target)


def _copy(shard: Shard, part: Path) -> None:
    md5 = hashlib.md5(usedforsecurity=False)
    with gopen(shard.address, "rb") as stream, open(part, "wb") as output:
        while block := stream.read(BLOCK):
            md5.update(block)
            output.write(block)
    if part.stat().st_size == 0:
        raise ValueError("it is empty")
    if shard.md5sum is not None and md5.hexdigest() != shard.md5sum:
        raise ValueError(f"its md5sum {md5.hexdigest()} differs from the index ({shard.md5sum})")
