"""Ways to break bytes, texts and values, all drawn from one `random.Random`."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

# What stands in a file where something else belongs. JSON can write every one of them, and YAML too.
_TEXTS = ("", " ", "x", "0", "1e5", "true", "null", "auto", "é", "\u202e", "a\nb", "x" * 300, "../../etc/passwd")
BAD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3.5, -0.0, 1e-300, 1e300, 10**6, 10**12, 2**31, 2**63, 2**64, 10**30, -(2**63)),
    *(*_TEXTS, "/dev/zero"),
    *([], [[]], [1, 2, 3], ["x"], [None], {}, {"a": 1}, {"": ""}, {"enabled": True}, [[[[[[1]]]]]]),
)
JUNK = (
    *(b"\x00", b"\xff", b"\xff\xfe", b"\n", b"\r", b"\t", *b"\" ' { } [ ] : , #".split()),
    *(b"&a ", b"*a", b"!!int ", b"---\n", b"<<: ", *b"| > % @ 1e999 NaN -".split(), b"\xef\xbb\xbf", b"\\ud800"),
)


def broken_bytes(data: bytes, rng: random.Random) -> tuple[bytes, list[tuple[int, int]]]:
    """`data` with bits flipped, bytes zeroed or replaced, or cut; and the ranges [start, stop) that it touched."""
    way = rng.choice(("bit", "bit", "bits", "noise", "zeros", "cut", "cut", "more"))
    size, changed = len(data), bytearray(data)
    if not size or way == "more":
        return data + rng.randbytes(rng.randint(1, 2000)), [(size, size)]
    if way == "cut":
        kept = rng.randrange(size)
        return data[:kept], [(kept, size)]
    if way in ("bit", "bits"):
        places = [rng.randrange(size) for _ in range(1 if way == "bit" else rng.randint(2, 8))]
        for place in places:
            changed[place] ^= 1 << rng.randrange(8)
        return bytes(changed), [(place, place + 1) for place in places]
    start = rng.randrange(size)
    stop = min(size, start + rng.choice((1, 4, 16, 64, 512, 4096)))
    changed[start:stop] = rng.randbytes(stop - start) if way == "noise" else bytes(stop - start)
    return bytes(changed), [(start, stop)]


def broken_text(data: bytes, rng: random.Random) -> bytes:
    """A text file with lines doubled, dropped or moved, junk put in, deep nesting, or broken as any bytes are."""
    way = rng.choice(("double", "drop", "swap", "junk", "junk", "nest", "bytes", "bytes", "newlines"))
    lines = data.splitlines(keepends=True) or [b""]
    number = rng.randrange(len(lines))
    if way == "double":
        lines.insert(rng.randrange(len(lines) + 1), lines[number])
    elif way == "drop":
        del lines[number]
    elif way == "swap":
        other = rng.randrange(len(lines))
        lines[number], lines[other] = lines[other], lines[number]
    elif way == "junk":
        place = rng.randrange(len(data) + 1)
        return data[:place] + rng.choice(JUNK) + data[place:]
    elif way == "nest":
        place, depth = rng.randrange(len(data) + 1), rng.choice((3, 40, 200, 5000))
        opening, closing = rng.choice(((b"[", b"]"), (b"{a: ", b"}"), (b'{"a":', b"}")))
        return data[:place] + opening * depth + b"1" + closing * depth + data[place:]
    elif way == "newlines":
        return data.replace(b"\n", rng.choice((b"\r", b"\r\n", b"\n\n", b"\x85", b" ")))
    else:
        return broken_bytes(data, rng)[0]
    return b"".join(lines)


def broken_value(content: Any, rng: random.Random) -> tuple[Any, tuple[Any, ...]]:
    """JSON content with one value anywhere in it replaced, or one key gone; and the path to it."""
    content = copy.deepcopy(content)
    path: list[Any] = []
    node = content
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = rng.choice(keys)
        path.append(key)
        if not isinstance(node[key], dict | list) or not node[key] or rng.random() < 0.2:
            break
        node = node[key]
    way = rng.random()
    if way < 0.15:
        del node[key]
    elif way < 0.25 and isinstance(node, list):
        node.append(copy.deepcopy(node[key]))
    else:
        node[key] = copy.deepcopy(rng.choice(BAD_VALUES))
    return content, tuple(path)


def broken_json(content: Any, rng: random.Random) -> bytes:
    """A JSON file of which a value or the text is broken."""
    if rng.random() < 0.6:
        return json.dumps(broken_value(content, rng)[0]).encode()
    return broken_text(json.dumps(content, indent=rng.choice((None, 1))).encode(), rng)


def broken_file(path: Path, rng: random.Random) -> None:
    """Break a file in its place: its bytes, its text or JSON value, or the file as a whole."""
    way = rng.random()
    data = path.read_bytes()
    if way < 0.15:
        path.unlink()
        if way < 0.05:
            path.mkdir()
        elif way < 0.1:
            path.write_bytes(b"")
    elif path.suffix == ".json" and way < 0.7:
        path.write_bytes(broken_json(json.loads(data), rng))
    elif path.suffix in (".json", ".jsonl", ".txt", ".yaml", ""):
        path.write_bytes(broken_text(data, rng))
    else:
        path.write_bytes(broken_bytes(data, rng)[0])
