"""Data, stores and runs as convclip writes them now, damaged: they are as before or refused, and the checks find it."""

from __future__ import annotations

import functools
import hashlib
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import convclip
from convclip.config import load_recipe
from convclip.features.reader import FeatureStore
from convclip.models.checkpoint_files import LOCKED, TensorFile, write_tensors
from convclip.models.checkpoint_weights import RunState, rank_file, read_state, write_state
from convclip.models.export import export_open_clip
from convclip.schema import UserError
from tests.campaign.damage import broken_bytes
from tests.campaign.judge import COUNTED, RIGHT, Wrong
from tests.conftest import REPOSITORY
from tests.data.makers import noise_jpeg, picture, sample, write_index, write_tar
from tests.features.extraction import ARRAYS, IDENTITY, ITEMS, extract, features
from tools import check_data, check_run

FIXTURE = REPOSITORY / "tests" / "fixtures" / "0.1.0"
TOKENIZER = FIXTURE / "tokenizer"
TEXTS = ["a red square", "7 is blue"]
STEP = "step-00000009"
SAMPLES = 8
_HOLDERS: list[Any] = []


@functools.cache
def _kept() -> Path:
    """A folder for what is made once: removed when Python ends."""
    holder = tempfile.TemporaryDirectory(prefix="campaign-kept-")
    _HOLDERS.append(holder)
    return Path(holder.name)


def _finds(check: Callable[[list[str]], int], place: Path) -> bool:
    """Whether a check ends with findings, or refuses."""
    return check([str(place)]) != 0


def _damage(path: Path, rng: random.Random) -> bool:
    """Break a file's bytes; whether any differs."""
    data = path.read_bytes()
    broken, _ = broken_bytes(data, rng)
    path.write_bytes(broken)
    return broken != data


def checked_shards(folder: Path, rng: random.Random) -> str:
    """A shard with an index: check_data finds every change, and nothing where there is none."""
    samples = {f"{n:04d}": {**sample(n, 2), "jpg": noise_jpeg(n, (24, 20))} for n in range(SAMPLES)}
    path = write_tar(folder / "0.tar", samples)
    data = path.read_bytes()
    write_index(folder, [{"url": "0.tar", "nsamples": SAMPLES, "md5sum": hashlib.md5(data).hexdigest()}])
    damaged = rng.random() < 0.9 and _damage(path, rng)
    if _finds(check_data.main, path) != damaged:
        raise Wrong(f"damaged: {damaged}, and check_data says otherwise")
    return COUNTED if damaged else RIGHT


@functools.cache
def _store(parts: int) -> Path:
    folder = _kept() / f"store{parts}"
    folder.mkdir()
    for rank in range(parts):
        extract(folder / "f.h5", rank, parts)
    # The main rank joins the parts when all are there.
    extract(folder / "f.h5", 0, parts)
    return folder


def joined_stores(folder: Path, rng: random.Random) -> str:
    """A store of two parts, one file damaged: each row is as written, or one line; check_data finds that too."""
    shutil.copytree(_store(2), folder / "s")
    store = folder / "s" / "f.h5"
    _damage(rng.choice(sorted((folder / "s").iterdir())), rng)
    try:
        opened = FeatureStore(store, IDENTITY)
        for name, spec in ARRAYS.items():
            if not torch.equal(opened.read(name, ITEMS[spec.item_kind]), features(name, ITEMS[spec.item_kind])):
                raise Wrong(f"other rows of {name}")
    except UserError as refusal:
        # A store of another identity is sound.
        if not _finds(check_data.main, store) and not any(key in str(refusal) for key in IDENTITY):
            raise Wrong(f"check_data does not find: {refusal}") from None
        raise
    return RIGHT


@functools.cache
def _run() -> Path:
    """The run of 0.1.0 as it would be written now: with checksums, and its recipe in every state."""
    run = Path(shutil.copytree(FIXTURE / "run", _kept() / "run"))
    recipe = load_recipe(run / "recipe.yaml", [f"model.text.tokenizer={TOKENIZER}"])
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    folder = run / "checkpoints"
    file = TensorFile(folder / LOCKED)
    locked = write_tensors({key: file.get(key) for key in file.keys}, folder / LOCKED, {"run": "a"})
    for step in folder.glob("step-*"):
        old, file = read_state(step), TensorFile(step / rank_file(0))
        tensors = {key: file.get(key) for key in file.keys}
        write_tensors(tensors, step / rank_file(0), {"run": "a", "step": old.step, "rank": 0}, file.layout)
        state = RunState(old.step, old.stage, old.world_size, old.zero_stage, old.precision, {**old.best, "step": 9})
        state.run, state.locked, state.recipe = "a", locked, recipe.to_yaml()
        write_state(step, state)
    (run / "best").write_text(f"checkpoints/{STEP}\n")
    if check_run.main([str(run)]) != 0:
        raise Wrong("the sound run has findings")
    return run


def _outputs(place: Path) -> tuple[torch.Tensor, float]:
    clip = convclip.load(place, "cpu")
    pictures = clip.embed_images([picture(7)], progress=False)
    return torch.cat([pictures, clip.embed_texts(TEXTS, progress=False)]), clip.logit_scale


@functools.cache
def _expected() -> tuple[torch.Tensor, float]:
    return _outputs(_run())


def _same(place: Path) -> str:
    found, scale = _outputs(place)
    if not torch.equal(found, _expected()[0]) or scale != _expected()[1]:
        raise Wrong("other embeddings")
    return RIGHT


def checked_runs(folder: Path, rng: random.Random) -> str:
    """A run with one file damaged: it embeds as before, or one line says what is wrong; check_run finds that too."""
    run = Path(shutil.copytree(_run(), folder / "run"))
    step = f"checkpoints/{STEP}"
    names = (f"{step}/{rank_file(0)}", f"checkpoints/{LOCKED}", f"{step}/state.json", "recipe.yaml", "best")
    _damage(run / rng.choice(names), rng)
    try:
        return _same(run)
    except UserError as refusal:
        # Places of files are no part of what a checkpoint was trained with.
        if not _finds(check_run.main, run) and "tokenizer" not in str(refusal):
            raise Wrong(f"check_run does not find: {refusal}") from None
        raise


@functools.cache
def _export() -> Path:
    clip = convclip.load(_run(), "cpu")
    return export_open_clip(clip.model, clip.config, _kept() / "export").folder


def checked_exports(folder: Path, rng: random.Random) -> str:
    """An export with one file damaged: it embeds as before, or one line."""
    export = Path(shutil.copytree(_export(), folder / "export"))
    _damage(rng.choice(sorted(export.iterdir())), rng)
    return _same(export)
