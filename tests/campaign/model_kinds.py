"""Feature and frame stores, runs, exports, weight files, tokenizers and captions."""

from __future__ import annotations

import functools
import json
import random
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import convclip
from convclip.data.tokenizers import build_tokenizer
from convclip.features.reader import FeatureStore
from convclip.models.checkpoint_files import LOCKED, TensorFile, write_tensors
from convclip.models.checkpoint_weights import FORMAT, rank_file, read_state, write_state
from convclip.models.checkpoint_weights import read_weights as checkpoint_weights
from convclip.models.weights import read_weights
from convclip.schema import TextTowerConfig
from tests.campaign.damage import broken_bytes, broken_file, broken_json, broken_text
from tests.campaign.judge import RIGHT, Wrong
from tests.conftest import REPOSITORY
from tests.data.broken_inputs import WEIGHTS
from tests.data.broken_inputs import weights as listed_weights
from tests.features.extraction import ARRAYS, IDENTITY, ITEMS, extract, features

FIXTURE = REPOSITORY / "tests" / "fixtures" / "0.1.0"
TEXTS = ["a red square", "7 is blue", "", "a caption that is far longer than the sixteen tokens of the context"]
STEPS, CHECKPOINT = (3, 9), "checkpoints/step-{:08d}"
TEXT = TextTowerConfig(width=16, heads=2, layers=2, context_length=16, vocab_size=259)


@functools.cache
def _kept() -> Path:
    """A folder for what is made once: removed when Python ends."""
    holder = tempfile.TemporaryDirectory(prefix="campaign-kept-")
    _HOLDERS.append(holder)
    return Path(holder.name)


_HOLDERS: list[Any] = []


@functools.cache
def _store() -> bytes:
    path = _kept() / "features.h5"
    extract(path)
    return path.read_bytes()


def feature_stores(folder: Path, rng: random.Random) -> str:
    """An .h5 with damaged bytes: every row comes out as it was written, or one line says what is damaged."""
    path = folder / "features.h5"
    path.write_bytes(broken_bytes(_store(), rng)[0])
    store = FeatureStore(path, IDENTITY)
    for name, spec in ARRAYS.items():
        ids = ITEMS[spec.item_kind]
        if not torch.equal(store.read(name, ids), _rows(name)):
            raise Wrong(f"other rows of {name}")
        if list(store.ids(name)) != list(ids):
            raise Wrong(f"other ids of {name}")
    return RIGHT


@functools.cache
def _rows(name: str) -> Tensor:
    return features(name, ITEMS[ARRAYS[name].item_kind])


@functools.cache
def _frames() -> tuple[Path, dict[str, tuple[Tensor, int]]]:
    """A frame store of three clips, written through the store's own shard writer; and what it holds."""
    import importlib.util

    from convclip.video.frame_store import FrameSettings, FrameStore, write_frame_store

    spec = importlib.util.spec_from_file_location("decode_tests", REPOSITORY / "tests" / "video" / "test_decode.py")
    assert spec is not None and spec.loader is not None
    videos = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(videos)
    folder = _kept() / "frames"
    clips = {f"video{n}": videos.write_video(_kept() / f"{n}.mp4", range(n)) for n in (1, 2, 4)}
    write_frame_store(clips, folder, FrameSettings(size=32, frames=4), videos_per_shard=2)
    store = FrameStore(folder)
    return folder, {name: store[name] for name in store}


def frame_stores(folder: Path, rng: random.Random) -> str:
    """A frame store with a damaged file: each video is as it was, or one line says why it is not."""
    from convclip.video.frame_store import FrameStore

    whole, videos = _frames()
    shutil.copytree(whole, folder / "store")
    broken_file(rng.choice([path for path in _files(folder / "store") if path.stat().st_size]), rng)
    store = FrameStore(folder / "store", size=32, frames=4, fps=1.0)
    for name, (frames, count) in videos.items():
        found, number = store[name]
        if number != count or not torch.equal(found, frames):
            raise Wrong(f"{name} has other frames")
    return RIGHT


@functools.cache
def _embedded(source: str) -> Tensor:
    """The captions by `source` of the fixture, undamaged."""
    return convclip.load(FIXTURE / source, tokenizer=FIXTURE / "tokenizer").embed_texts(TEXTS, progress=False)


@functools.cache
def _run() -> Path:
    """The fixture's run as the present convclip would have written it: each file says whose it is, with checksums."""
    run = _kept() / "run"
    shutil.copytree(FIXTURE / "run", run)
    locked = run / "checkpoints" / LOCKED
    identity = write_tensors(load_file(locked), locked, {"run": "campaign"})
    for step in STEPS:
        checkpoint = run / CHECKPOINT.format(step)
        state = read_state(checkpoint)
        origin = {"run": "campaign", "step": step, "rank": 0}
        path = checkpoint / rank_file(0)
        write_tensors(load_file(path), path, origin, TensorFile(path).layout)
        recipe = (run / "recipe.yaml").read_text()
        write_state(checkpoint, replace(state, format=FORMAT, run="campaign", locked=identity, recipe=recipe))
    return run


def runs(folder: Path, rng: random.Random) -> str:
    """A run's folder with one file of it damaged, weights apart (`run_tensors`): loaded and read, or refused."""
    return _broken_run(folder, rng, [path for path in _files(_run()) if path.suffix != ".safetensors"])


def run_tensors(folder: Path, rng: random.Random) -> str:
    """A run's folder with a damaged weight file. (Those of 0.1.0 have no checksums: nobody sees a changed bit.)"""
    return _broken_run(folder, rng, [path for path in _files(_run()) if path.suffix == ".safetensors"])


def _broken_run(folder: Path, rng: random.Random, files: list[Path]) -> str:
    run = folder / "run"
    shutil.copytree(_run(), run)
    broken_file(run / rng.choice(files).relative_to(_run()), rng)
    clip = convclip.load(run, tokenizer=FIXTURE / "tokenizer")
    # Without `best` the `latest` is taken, as convclip.load says.
    expected = _embedded("run" if (run / "best").is_file() else f"run/{CHECKPOINT.format(STEPS[-1])}")
    if not torch.equal(clip.embed_texts(TEXTS, progress=False), expected):
        raise Wrong("other embeddings")
    for step in STEPS:
        found = checkpoint_weights(run / CHECKPOINT.format(step))
        if not _equal(found, checkpoint_weights(FIXTURE / "run" / CHECKPOINT.format(step))):
            raise Wrong(f"other weights of step {step}")
    return RIGHT


def exports(folder: Path, rng: random.Random) -> str:
    """An export's folder with a damaged file. Its weights have no checksum: they must be what safetensors reads."""
    export = folder / "export"
    shutil.copytree(FIXTURE / "export", export)
    broken_file(rng.choice(_files(export)), rng)
    clip = convclip.load(export, tokenizer=FIXTURE / "tokenizer")
    weights = load_file(export / "open_clip_model.safetensors")
    if not _equal(weights, load_file(FIXTURE / "export" / "open_clip_model.safetensors")):
        held = sorted(float(value.double().sum()) for value in clip.model.state_dict().values())
        if held != sorted(float(value.double().sum()) for value in weights.values()):
            raise Wrong("other weights than the file's")
        return RIGHT
    if not torch.equal(clip.embed_texts(TEXTS, progress=False), _embedded("export")):
        raise Wrong("other embeddings")
    return RIGHT


def weight_files(folder: Path, rng: random.Random) -> str:
    """A .safetensors, or a torch file (a zip with checksums), with damaged bytes."""
    if rng.random() < 0.1:
        read_weights(listed_weights(folder, rng.randrange(WEIGHTS)).address)
        raise Wrong("a listed broken file was read")
    tensors = {f"a.{n}": torch.randn(8, n + 1, generator=torch.Generator().manual_seed(n)) for n in range(6)}
    path = folder / rng.choice(("model.safetensors", "model.pt"))
    if path.suffix == ".pt":
        torch.save({"state_dict": {f"module.{name}": value for name, value in tensors.items()}}, path)
    else:
        save_file(tensors, path)
    path.write_bytes(broken_bytes(path.read_bytes(), rng)[0])
    found = read_weights(str(path))
    if _equal(found, tensors):
        return RIGHT
    # safetensors has no checksums; what it says is what it holds.
    if path.suffix == ".pt" or not _equal(found, load_file(path)):
        raise Wrong(f"other tensors of {path.name}")
    return RIGHT


def tokenizers(folder: Path, rng: random.Random) -> str:
    """A tokenizer's folder with a damaged file: the same tokens, or those of the `tokenizers` package on its files."""
    from tokenizers import ByteLevelBPETokenizer

    own = folder / "tokenizer"
    shutil.copytree(FIXTURE / "tokenizer", own)
    broken_file(rng.choice(_files(own)), rng)
    texts = [text for text in TEXTS if text]
    found = build_tokenizer(TEXT.model_copy(update={"tokenizer": str(own)}))(texts)
    if found.shape != (len(texts), 16) or not bool(((found >= 0) & (found < 259)).all()):
        raise Wrong(f"tokens {found.tolist()}")
    expected = build_tokenizer(TEXT.model_copy(update={"tokenizer": str(FIXTURE / "tokenizer")}))(texts)
    if not torch.equal(found, expected):
        theirs = ByteLevelBPETokenizer.from_file(str(own / "vocab.json"), str(own / "merges.txt"))
        for row, text in zip(found.tolist(), texts, strict=True):
            ids = theirs.encode(text).ids[:15]
            if row[: len(ids)] != ids:
                raise Wrong(f"{text!r} has tokens {row}, by the package {ids}")
    return RIGHT


CAPTIONS: tuple[Any, ...] = (
    *("", " ", "\n\n", "\0", "a\0b", "x" * 100_000, "é" * 9999, "\u202e\u200f\u200b", "\ud800", "a\udfffb"),
    "👩‍👩‍👧‍👦" * 50,
    *("<|endoftext|>", "<start_of_text> x", "&amp;amp;", "%s %d {0}", "a " * 5000, "\ufeffx", "\u0000\uffff", "א" * 40),
    *(None, 3, 3.5, float("nan"), True, b"bytes", ["a list"], {"a": 1}, ("x",), object, Path("x")),
)


@functools.cache
def _clip() -> Any:
    return convclip.load(FIXTURE / "export", tokenizer=FIXTURE / "tokenizer")


def captions(folder: Path, rng: random.Random) -> str:
    """Strange captions among sound ones: unit vectors of all, the sound ones' unchanged; or one line."""
    del folder
    texts: list[Any] = list(TEXTS)
    for _ in range(rng.choice((1, 1, 3))):
        strange = rng.choice(CAPTIONS)
        if isinstance(strange, str) and rng.random() < 0.5:
            strange = broken_text(strange.encode(errors="surrogatepass"), rng).decode(errors="replace")
        texts.insert(rng.randrange(len(texts) + 1), strange)
    given: Any = rng.choice((texts, tuple(texts), iter(texts)))
    found = _clip().embed_texts(given, batch=rng.choice((1, 3, 256)), progress=False)
    if found.shape != (len(texts), 16) or not torch.allclose(found.norm(dim=1), torch.ones(len(texts)), atol=1e-4):
        raise Wrong(f"embeddings {tuple(found.shape)} of {len(texts)} captions")
    sound = _embedded("export")
    for text, row in zip(texts, found, strict=True):
        if text in TEXTS and not torch.allclose(row, sound[TEXTS.index(text)], atol=1e-5):
            raise Wrong(f"{text!r} has another embedding among others")
    return RIGHT


def videos(folder: Path, rng: random.Random) -> str:
    """MSR-VTT's CSV and annotations, one of them broken: every caption of the listed videos, or one line."""
    from convclip.video.msrvtt import read_split

    names = [f"video{n}" for n in range(8)]
    sentences = [
        {"video_id": name, "caption": f"{name} {k}", "sen_id": 10 * n + k}
        for n, name in enumerate(names)
        for k in (0, 1)
    ]
    (folder / "videos.csv").write_text("video_id\n" + "".join(f"{name}\n" for name in names))
    (folder / "data.json").write_text(json.dumps({"sentences": sentences, "info": {}}))
    path = folder / rng.choice(("videos.csv", "data.json"))
    content = path.read_bytes()
    path.write_bytes(broken_text(content, rng) if path.suffix == ".csv" else broken_json(json.loads(content), rng))
    found = read_split(folder / "videos.csv", folder / "data.json")
    present = json.loads((folder / "data.json").read_text(encoding="utf-8-sig"))["sentences"]
    expected = [row["caption"] for row in present if row["video_id"] in found.video_ids]
    if sorted(found.captions) != sorted(expected):
        raise Wrong(f"{len(found.captions)} captions of {len(expected)}")
    return RIGHT


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )
