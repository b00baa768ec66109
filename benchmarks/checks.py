"""What the checks against silent mistakes cost: at a start on shards of COCO's size, in a step, and in a save.

    python benchmarks/checks.py [--images 118287] [--steps 20] [--threads 1]

Start: shards of so many samples (five captions each, tiny pictures) are opened as training opens them; what is checked
at each later start (sizes against the index, the stream's fingerprint) has a limit of 2 s. Step: the demo recipe under
ZeRO 0, whose update takes a look of its own at the gradient, every loss read in every step; the checks' share has a
limit of 1 %. Save: what finite values and checksums take of a checkpoint; no limit, a run saves once an epoch.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from convclip.config import load_recipe
from convclip.data.coco import CocoImage
from convclip.data.loader import TrainLoader
from convclip.data.shard_table import ShardTable
from convclip.data.shard_writer import image_members, write_shards
from convclip.data.tokenizers import build_tokenizer
from convclip.data.transforms import TrainTransform
from convclip.engine.meters import LossWatch
from convclip.engine.trainer import Trainer
from convclip.engine.zero import checkpoint, update
from convclip.engine.zero.launcher import start_processes
from convclip.engine.zero.staged_engine import StagedEngine
from convclip.models import checkpoint_files
from convclip.run import train_recipe
from convclip.schema import BatchConfig, Data, TextTowerConfig

REPOSITORY = Path(__file__).resolve().parent.parent
START_LIMIT, STEP_LIMIT = 2.0, 0.01
spent: dict[str, list[float]] = defaultdict(list)


def timed(name: str, function: Callable) -> Callable:
    """`function`, with the seconds of each call in `spent`."""

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            spent[name].append(time.perf_counter() - start)

    return call


def watch() -> None:
    """Time steps, saves, and the checks in both."""
    Trainer._train_step = timed("step", Trainer._train_step)
    Trainer._report_step = timed("step", Trainer._report_step)
    LossWatch.add, LossWatch.read = timed("step check", LossWatch.add), timed("step check", LossWatch.read)
    update._is_finite = timed("step check", update._is_finite)
    StagedEngine.save = timed("save", StagedEngine.save)
    checkpoint.refuse_not_finite = timed("save check", checkpoint.refuse_not_finite)
    checkpoint_files.checksum = timed("save check", checkpoint_files.checksum)


def make_shards(folder: Path, count: int) -> str:
    """Shards of `count` samples over one tiny picture, as tools/make_shards.py writes them; their address."""
    (folder / "pictures").mkdir()
    Image.new("RGB", (64, 64), (90, 120, 30)).save(folder / "pictures" / "0.jpg")
    captions = tuple(f"a picture of a man riding a wave on a board, version {number}" for number in range(5))
    images = [CocoImage(n, "0.jpg", captions, tuple(range(5 * n, 5 * n + 5))) for n in range(count)]
    members = partial(image_members, folder=folder / "pictures")
    write_shards(images, members, folder / "shards", "train", {}, samples_per_shard=1000)
    return str(folder / "shards" / "train-*.tar")


def measure_start(address: str, cache: Path) -> None:
    """Open the shards twice, and take the stream's fingerprint."""
    data = Data(train=address, workers=0, cache_folder=str(cache))
    seconds = {}
    for name in ("first", "later"):
        start = time.perf_counter()
        table = ShardTable(address, data)
        seconds[name] = time.perf_counter() - start
    print(table.describe())
    batch = BatchConfig.model_validate({"global": 256})
    transform, tokenizer = TrainTransform(224), build_tokenizer(TextTowerConfig())
    loader = TrainLoader(data, batch, transform, tokenizer, rank=0, world=1, seed=0)
    start = time.perf_counter()
    loader.fingerprint()
    fingerprint = time.perf_counter() - start
    total = seconds["later"] + fingerprint
    print(
        f"first start: {seconds['first']:.2f} s, once (headers and md5 sums); each later start: {seconds['later']:.2f} "
        f"s with the sizes, fingerprint {fingerprint:.2f} s: {total:.2f} s (limit {START_LIMIT:.0f} s)"
    )


def measure_run(address: str, folder: Path, steps: int) -> None:
    """Train the demo recipe and print the checks' share of a step and of a save."""
    watch()
    values = [f"data.train={address}", f"max_steps={steps}", "data.workers=0", "log_every=1", "max_bad_steps=1"]
    values += [f"checkpoint.every_steps={steps // 2}", "freezing.lock=[]", "freezing.unfreeze=[]"]
    recipe = load_recipe("demo", [*values, f"data.cache_folder={folder / 'cache'}"])
    train_recipe(recipe, REPOSITORY / "ds_configs" / "zero0_fp32.json", folder / "run")
    # A step is its training and its report; the first of all also builds what later ones have.
    step = sum(spent["step"][2:]) / (steps - 1)
    check = sum(spent["step check"]) / steps
    print(f"step {1000 * step:.1f} ms, checks {1000 * check:.2f} ms: {check / step:.2%} (limit {STEP_LIMIT:.0%})")
    save, checks = statistics.mean(spent["save"]), sum(spent["save check"]) / len(spent["save"])
    print(f"save {1000 * save:.0f} ms, checks {1000 * checks:.0f} ms: {checks / save:.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=118_287, help="samples of the shards; COCO has 118,287")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    start_processes()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        address = make_shards(folder, options.images)
        measure_start(address, folder / "cache")
        measure_run(address, folder, options.steps)


if __name__ == "__main__":
    main()
