"""What the JSON of a frame store may say: the index and each shard's entry, judged before anything in it is used."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from convclip.data.local_files import read_json
from convclip.schema import UserError
from convclip.video.decode import FRAMES

VERSION = 1
INDEX = "index.json"
# Far beyond any store; a reader makes room for a whole video.
MAX_FRAMES, MAX_SIDE, MAX_FPS = 1000, 4096, 240
TAR_BLOCK = 512

Offset = Annotated[int, Field(ge=0, lt=2**62)]
Length = Annotated[int, Field(gt=0, lt=2**31)]
Checksum = Annotated[int, Field(ge=0, lt=2**32)]
# A file beside the index, never one elsewhere.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,200}$")]


@pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(allow_inf_nan=False, extra="forbid"))
class FrameSettings:
    """How frames were made: S, F, frames per second sampled, JPEG quality."""

    size: int = Field(default=224, gt=0, le=MAX_SIDE)
    frames: int = Field(default=FRAMES, gt=0, le=MAX_FRAMES)
    fps: float = Field(default=1.0, gt=0, le=MAX_FPS)
    quality: int = Field(default=95, gt=0, le=100)


class FrameShard(BaseModel):
    """One tar: by video id, where the first member's header begins, and the JPEG lengths of its frames.

    `filesize` is the tar's, `crc32` by video id that of all bytes from its first header to its last frame's end. Stores
    of version 0.1.0 have neither.
    """

    file: FileName
    videos: dict[str, tuple[Offset, list[Length]]]
    skipped: dict[str, str]
    notes: dict[str, str] = {}
    filesize: Offset | None = None
    crc32: dict[str, Checksum] = {}


class FrameShardEntry(FrameShard):
    """The entry beside a tar, with the sizes of the video files it was made from (None: was not there)."""

    sources: dict[str, int | None]


class FrameIndex(BaseModel):
    """The whole store."""

    version: int
    settings: FrameSettings
    shards: list[FrameShard]


def read_index(folder: Path) -> FrameIndex:
    """The index of a store. UserError: there is none, or it is malformed or of another version."""
    path = folder / INDEX
    if not path.exists():
        raise UserError(f"no frame store at {folder}: {INDEX} is not there; was writing finished?")
    content = read_json(path, "frame store index")
    version = content.get("version") if isinstance(content, dict) else None
    if isinstance(version, int) and version != VERSION:
        raise UserError(f"{path} has version {version}, this is version {VERSION}: write the store again")
    try:
        index = FrameIndex.model_validate(content)
    except pydantic.ValidationError as error:
        raise UserError(f"{path} is no frame store index ({first_problem(error)}): write the store again") from None
    for shard in index.shards:
        for name, (_, lengths) in shard.videos.items():
            if not 0 < len(lengths) <= index.settings.frames:
                raise UserError(f"{path}: video {name} has {len(lengths)} frames, not 1 to {index.settings.frames}")
    return index


def read_entry(path: Path) -> FrameShardEntry | None:
    """The entry of a shard; None where it is missing or malformed, so that the shard is written again."""
    try:
        return FrameShardEntry.model_validate(read_json(path, "frame store entry"))
    except (UserError, pydantic.ValidationError):
        return None


def read_plan(path: Path) -> dict[str, Any]:
    """What a store's plan.json says. UserError: it is no JSON object."""
    plan = read_json(path, "frame store plan")
    if not isinstance(plan, dict):
        raise UserError(f"{path} is no plan of a frame store: name another folder")
    return plan


def first_problem(error: pydantic.ValidationError) -> str:
    """The first thing that is wrong, in one line: where, and what."""
    problem = error.errors()[0]
    place = ".".join(str(part)[:80] for part in problem["loc"])
    return f"{place}: {problem['msg']}" if place else str(problem["msg"])


def is_whole(tar: Path, shard: FrameShard) -> bool:
    """Whether the tar holds what its entry says: size and checksums; of older stores, the end and nothing missing."""
    try:
        size = tar.stat().st_size
        with tar.open("rb") as file:
            for name, (start, lengths) in shard.videos.items():
                file.seek(start)
                block = file.read(block_ends(lengths)[-1]) if lengths else b""
                if not lengths or len(block) < block_ends(lengths)[-1]:
                    return False
                if name in shard.crc32 and zlib.crc32(block) != shard.crc32[name]:
                    return False
            file.seek(max(0, size - 2 * TAR_BLOCK))
            has_end = size >= 2 * TAR_BLOCK and not any(file.read())
    except OSError:
        return False
    return has_end and shard.filesize in (None, size)


def block_ends(lengths: list[int]) -> list[int]:
    """Where each frame's data ends, counted from the first frame's header."""
    at, ends = 0, []
    for length in lengths:
        ends.append(at + TAR_BLOCK + length)
        at += TAR_BLOCK + -(-length // TAR_BLOCK) * TAR_BLOCK
    return ends
