"""One walk over the headers of a tar shard: which samples it holds, where their members lie, and what is damaged."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from typing import NamedTuple

import numpy as np

from convclip.data.shards import MAX_CAPTIONS, Shard
from convclip.schema import UserError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
NO_TEXT, JSON, TXT = 0, 1, 2
# Bounds on what one sample's captions and one tar header may make us read; far above any real one.
MAX_TEXT_BYTES = 1 << 22
MAX_HEADER_BYTES = 1 << 20
# Sizes are kept as int64; a member that claims more than this cannot be read anyhow.
MAX_MEMBER_BYTES = 1 << 62
# All keys are kept at the length of the longest.
MAX_KEY = 1024
BLOCK = 1 << 20

# {key: {suffix: (offset, size)}}
Members = dict[str, dict[str, tuple[int, int]]]


class Damage(NamedTuple):
    """What is wrong with a shard (words behind its name), the byte where it begins, samples lost (about)."""

    what: str
    offset: int
    lost: int


def parse_captions(kind: int, raw: bytes) -> tuple[int | None, list[str], list[int] | None]:
    """(image id or None, captions, caption ids or None) of a json or txt member; ValueError when malformed.

    json: `captions` (ours, Karpathy-style) or one `caption` (img2dataset). txt: one caption per line.
    """
    if kind == TXT:
        # Not splitlines(): it also splits at characters that captions from the web contain (U+2028, form feed).
        return None, [line.strip() for line in raw.decode("utf-8-sig").split("\n") if line.strip()], None
    try:
        content = json.loads(raw.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("the json member is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("the json member is no object")
    texts = content.get("captions")
    if texts is None:
        texts = [content["caption"]] if content.get("caption") is not None else []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("captions in the json member are no list of strings")
    if len(texts) > MAX_CAPTIONS:
        raise ValueError(f"{len(texts)} captions in the json member are more than {MAX_CAPTIONS}")
    ids = content.get("caption_ids")
    if not isinstance(ids, list) or len(ids) != len(texts) or not all(_is_id(number) for number in ids):
        ids = None
    image_id = content.get("image_id")
    return image_id if _is_id(image_id) else None, texts, ids


def _is_id(value: object) -> bool:
    """True for an integer that a tensor of int64 can hold (json knows larger ones, and true and false)."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def scan_shard(shard: Shard) -> tuple[dict[str, np.ndarray], tuple[str, int] | None]:
    """One walk over the headers of a tar file, reading only the caption members.

    Returns arrays over its samples: key (bytes), image and text (int64 [n, 2]: offset, size; size -1: absent),
    text_kind (NO_TEXT, JSON, TXT) and counts (int64, captions; 1 where they cannot be read, so that the sample
    appears in the stream once and is reported there). And where a part of the shard cannot be read, a line that says
    so and about how many samples were in it.

    Raises:
        UserError: nothing can be read of it.
    """
    samples, damage = _members(shard.path)
    if not samples and damage is None and shard.nsamples != 0:
        damage = Damage("holds no samples", 0, 0)
    absent = (0, -1)
    keys = list(samples)
    table: dict[str, list] = {"image": [], "text": [], "text_kind": [], "counts": []}
    known = shard.ncaptions if shard.ncaptions is not None and len(shard.ncaptions) == len(keys) else None
    with open(shard.path, "rb") as tar:
        for number, key in enumerate(keys):
            members = samples[key]
            kind, count = (JSON, known[number]) if known else _text_member(tar.fileno(), members)
            table["image"].append(next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), absent))
            table["text"].append(members.get({JSON: "json", TXT: "txt"}.get(kind, ""), absent))
            table["text_kind"].append(kind if table["text"][-1] != absent else NO_TEXT)
            table["counts"].append(max(1, count))
    spans = {name: np.array(table[name], dtype=np.int64).reshape(-1, 2) for name in ("image", "text")}
    arrays = {
        "key": np.array([key.encode(errors="surrogateescape") for key in keys], dtype=np.bytes_),
        "text_kind": np.array(table["text_kind"], dtype=np.int8),
        "counts": np.array(table["counts"], dtype=np.int64),
        **spans,
    }
    return arrays, None if damage is None else (_line(shard, damage), damage.lost)


def md5_of(path: str) -> str:
    """The md5 sum of a file, in hex."""
    md5 = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            md5.update(block)
    return md5.hexdigest()


class _Headers(io.BufferedReader):
    """A tar file whose headers are bounded: tarfile reads long names and PAX records in one piece, however large."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def _members(path: str) -> tuple[Members, Damage | None]:
    """The members of a tar file in its order, and what part of it cannot be read.

    The key is the path up to the first dot of its last part (webdataset's rule). A member cut by the end of the file
    is listed: reading it reports it.
    """
    samples: Members = {}
    size = os.path.getsize(path)
    if not size:
        raise UserError(f"shard {path} is no readable tar file (it is empty): copy or build it again")
    with _Headers(io.FileIO(path)) as stream:
        archive, offset = None, 0
        try:
            archive = tarfile.open(fileobj=stream, mode="r:", errorlevel=0)  # noqa: SIM115 (its file is closed here)
            for member in archive:
                offset = archive.offset
                _add(samples, member)
                archive.members.clear()  # type: ignore[attr-defined]  # tarfile has it, typeshed does not
        except (tarfile.TarError, ValueError, OverflowError, OSError, RecursionError) as error:
            if not samples:
                raise UserError(f"shard {path} is no readable tar file ({error})") from None
            # tarfile says this of a file that ends inside a member, too.
            if offset >= size:
                return samples, Damage("ends without its end-of-archive mark", size, 1)
            return samples, Damage("holds a damaged header", offset, _estimate(samples, offset, size))
        stream.seek(archive.offset)
        return samples, _end(samples, stream, archive.offset, size, path)


def _add(samples: Members, member: tarfile.TarInfo) -> None:
    folder, _, base = member.name.rpartition("/")
    stem, _, suffix = base.partition(".")
    wanted = suffix.lower() in (*IMAGE_SUFFIXES, "json", "txt")
    if wanted and stem and member.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
        key = f"{folder}/{stem}" if folder else stem
        if len(key) > MAX_KEY:
            raise ValueError(f"a name of {len(key)} characters")
        samples.setdefault(key, {})[suffix.lower()] = (member.offset_data, min(member.size, MAX_MEMBER_BYTES))


def _end(samples: Members, stream: _Headers, offset: int, size: int, path: str) -> Damage | None:
    """What is wrong with the end of a tar file, where tarfile stopped at `offset`: zeros should follow, nothing else.

    It stops silently at a header that is damaged or short, and at zeros in place of one.
    """
    first = stream.read(tarfile.BLOCKSIZE)
    if len(first) < tarfile.BLOCKSIZE:
        return Damage("ends without its end-of-archive mark", size, 1)
    if any(first):
        return Damage("holds a damaged header", offset, _estimate(samples, offset, size))
    while block := stream.read(BLOCK):
        if any(block):
            return Damage("goes on behind its end-of-archive mark", offset, _estimate(samples, offset, size))
    if not samples and size > tarfile.RECORDSIZE and not offset:
        raise UserError(f"shard {path} is no readable tar file ({size} bytes of zeros): copy or build it again")
    return None


def _estimate(samples: Members, offset: int, size: int) -> int:
    """Samples that the bytes from `offset` on held, if they were as large as those before."""
    return max(1, round((size - offset) * len(samples) / max(offset, 1)))


def _line(shard: Shard, damage: Damage) -> str:
    lost = f": about {damage.lost:,} samples are lost" if damage.lost else ""
    size = os.path.getsize(shard.path)
    return f"shard {shard.path} {damage.what} (at byte {damage.offset:,} of {size:,}){lost}"


def _text_member(descriptor: int, members: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """(kind, number of captions) of the member that holds a sample's captions; json wins where it has any."""
    found = NO_TEXT
    for kind, suffix in ((JSON, "json"), (TXT, "txt")):
        offset, size = members.get(suffix, (0, -1))
        if not 0 <= size <= MAX_TEXT_BYTES:
            continue
        found = found or kind
        try:
            count = len(parse_captions(kind, os.pread(descriptor, size, offset))[1])
        except ValueError:
            continue
        if count:
            return kind, count
    return found, 0
