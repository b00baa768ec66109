"""What a large contrastive batch costs: the loss alone, in tiles, against whole logits and open_clip's ClipLoss.

    python benchmarks/large_batch.py [--sizes 4096 8192 …] [--time_at 8192] [--tile 2048] [--world 2] [--plot PNG]

Memory: the peak of a process of its own for each loss and batch (by the operating system), above what it held with the
features made and the libraries warm: forward and backward, gradients included. Whole logits that would not fit into
free memory are not run; their figure is extrapolated with B^2 from the largest that was, and marked. Time: forward and
backward in turns in one process, medians. Each ratio stands beside its limit. With --world, ranks of one thread each
share the batch of --time_at over gloo; what they send is also timed alone, which is the most that a ring, sending texts
on while tiles are computed, could save against gathering them first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from torch import Tensor
from tqdm import tqdm

from convclip.distributed import all_reduce_max, all_reduce_sum, gather_with_gradient
from convclip.losses.contrastive import clip_loss

MIB = 1024**2
LOSSES = ("tiled", "whole", "open_clip")
# Matrices of B x B floats that a loss with whole logits holds at its peak: measured, rounded up.
WHOLE_MATRICES = 5
MEMORY_AT, MEMORY_LIMIT = 32768, 1 / 50
TIME_LIMIT = 1.3


def loss_function(name: str, tile: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The loss (image, text, scale) -> scalar of that name."""
    return {
        "tiled": lambda image, text, scale: clip_loss(image, text, scale, tile=tile),
        "whole": clip_loss,
        "open_clip": ClipLoss(),
    }[name]


def make_features(batch: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """(image [B, D], text [B, D], scale) that ask for gradients; matching rows are somewhat alike."""
    torch.manual_seed(0)
    image = F.normalize(torch.randn(batch, width), dim=1)
    text = F.normalize(torch.randn(batch, width) + 10 * image, dim=1)
    return image.requires_grad_(), text.requires_grad_(), torch.tensor(30.0, requires_grad=True)


def seconds(loss: Callable[[Tensor, Tensor, Tensor], Tensor], features: tuple[Tensor, Tensor, Tensor]) -> float:
    """Wall time of one forward and backward."""
    for x in features:
        x.grad = None
    start = time.perf_counter()
    loss(*features).backward()
    return time.perf_counter() - start


def measure_memory(name: str, batch: int, width: int, tile: int) -> dict[str, float]:
    """In this process: {"mib": peak above the features, "seconds": one forward and backward}."""
    loss = loss_function(name, tile)
    seconds(loss, make_features(2 * tile, width))
    features = make_features(batch, width)
    before = resident("VmRSS")
    # Linux sets the peak back to the present size on this.
    Path("/proc/self/clear_refs").write_text("5")
    wall = seconds(loss, features)
    return {"mib": (resident("VmHWM") - before) / MIB, "seconds": wall}


def resident(field: str) -> int:
    """Bytes of this process's memory by the operating system: VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def available_memory() -> int:
    """Bytes that a new process can have without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def memory_of(name: str, batch: int, options: argparse.Namespace) -> dict[str, float] | None:
    """`measure_memory` in a process of its own; None where the loss would need more than there is."""
    if name != "tiled" and WHOLE_MATRICES * 4 * batch**2 > 0.7 * available_memory():
        return None
    command = [sys.executable, __file__, "--measure", name, str(batch), "--width", str(options.width)]
    command += ["--tile", str(options.tile), "--threads", str(options.threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def memory_table(options: argparse.Namespace) -> dict[str, dict[int, tuple[float, bool]]]:
    """{loss: {B: (MiB above the features, measured and not extrapolated)}}, printed as it grows."""
    peaks: dict[str, dict[int, tuple[float, bool]]] = {name: {} for name in LOSSES}
    print("peak memory above the features, MiB (*: extrapolated with B^2)")
    print(f"{'B':>8} {'features':>10}" + "".join(f"{name:>12}" for name in LOSSES) + f"{'tiled, s':>12}")
    for batch in tqdm(options.sizes, disable=not sys.stderr.isatty()):
        for name in LOSSES:
            result = memory_of(name, batch, options)
            if result is not None and name == "tiled":
                wall = result["seconds"]
            if result is None:
                known = max(b for b, (_, measured) in peaks[name].items() if measured)
                peaks[name][batch] = (peaks[name][known][0] * (batch / known) ** 2, False)
            else:
                peaks[name][batch] = (result["mib"], True)
        cells = [f"{peaks[name][batch][0]:11.0f}{' ' if peaks[name][batch][1] else '*'}" for name in LOSSES]
        print(f"{batch:8} {2 * batch * options.width * 4 / MIB:10.0f}{''.join(cells)}{wall:12.1f}", flush=True)
    return peaks


def time_table(options: argparse.Namespace) -> None:
    """Prints the median time of each loss at `time_at`, and the ratios to the tiled one's."""
    features = make_features(options.time_at, options.width)
    times: dict[str, list[float]] = {name: [] for name in LOSSES}
    for turn in range(options.repeats + 1):
        for name in LOSSES:
            wall = seconds(loss_function(name, options.tile), features)
            if turn:
                times[name].append(wall)
    medians = {name: statistics.median(walls) for name, walls in times.items()}
    print(f"forward and backward at B = {options.time_at}, {options.threads} threads, median of {options.repeats}, s")
    for name in LOSSES:
        print(f"{name:>12} {medians[name]:8.3f}  ({min(times[name]):.3f} to {max(times[name]):.3f})")
    verdict("tiled / whole", medians["tiled"] / medians["whole"], TIME_LIMIT)
    print(f"tiled / open_clip {medians['tiled'] / medians['open_clip']:.3f}")


def send(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Sends what the tiled loss sends and computes next to nothing; its backward is the gradients' way back."""
    texts = gather_with_gradient(text)
    sums = texts.new_zeros(2, len(texts))
    all_reduce_max(sums[0])
    all_reduce_sum(sums)
    return (texts * texts.detach()).sum()


def time_ranks(rank: int, options: argparse.Namespace, meeting: str) -> None:
    """On each rank: time the whole batch alone, its share of it, and what is sent; rank 0 prints."""
    torch.set_num_threads(1)
    tiled = loss_function("tiled", options.tile)
    image, text, scale = make_features(options.time_at, options.width)
    alone = [seconds(tiled, (image, text, scale)) for _ in range(options.repeats + 1)]
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=options.world)
    own_image, own_text = (x.detach().chunk(options.world)[rank].clone().requires_grad_() for x in (image, text))
    shared: list[float] = []
    sending: list[float] = []
    for _ in range(options.repeats + 1):
        for walls, work in ((shared, tiled), (sending, send)):
            dist.barrier()
            walls.append(seconds(work, (own_image, own_text, scale)))
    if rank == 0:
        one, loss, sent = (statistics.median(walls[1:]) for walls in (alone, shared, sending))
        print(f"B = {options.time_at}, {options.world} ranks of one thread: {loss:.3f} s; one rank: {one:.3f} s")
        print(f"sending alone {sent:.3f} s: a ring could save {100 * sent / loss:.1f} % at most")
    dist.barrier()
    # gloo's threads abort when Python is gone before they have let go of the last collective.
    time.sleep(0.2)
    dist.destroy_process_group()


def verdict(what: str, ratio: float, limit: float) -> None:
    """One line: the ratio and whether it keeps to its limit."""
    print(f"{what} {ratio:.4g}, limit {limit:.4g}: {'kept' if ratio <= limit else 'MISSED'}")


def plot(peaks: dict[str, dict[int, tuple[float, bool]]], path: Path) -> None:
    """Memory against batch, logarithmic both ways; extrapolated figures with hollow markers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, marker in zip(LOSSES, "osv", strict=True):
        points = peaks[name]
        (line,) = axes.plot(list(points), [mib for mib, _ in points.values()], label=name)
        for batch, (mib, measured) in points.items():
            axes.plot(batch, mib, marker, color=line.get_color(), fillstyle="full" if measured else "none")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel="batch", ylabel="peak memory above the features, MiB", title="Contrastive loss, forward + backward")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
    print(f"wrote {path}")


def main() -> None:
    """Print the tables; with --measure, only one figure as JSON, for the process that asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[4096 * 2**i for i in range(6)])
    parser.add_argument("--time_at", type=int, default=8192, help="batch of the time table, 0 for none")
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--tile", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--world", type=int, help="also time ranks that share the batch of --time_at")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--plot", type=Path, help="PNG of memory against batch (needs matplotlib)")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.measure:
        name, batch = options.measure
        print(json.dumps(measure_memory(name, int(batch), options.width, options.tile)))
        return
    if options.time_at:
        time_table(options)
    if options.time_at and options.world:
        with tempfile.TemporaryDirectory() as folder:
            meeting = (Path(folder) / "meeting").as_uri()
            torch.multiprocessing.spawn(time_ranks, (options, meeting), nprocs=options.world)
    if options.sizes:
        peaks = memory_table(options)
        if MEMORY_AT in options.sizes:
            ratio = peaks["tiled"][MEMORY_AT][0] / peaks["open_clip"][MEMORY_AT][0]
            verdict(f"tiled / open_clip at B = {MEMORY_AT}", ratio, MEMORY_LIMIT)
        if options.plot:
            plot(peaks, options.plot)


if __name__ == "__main__":
    main()
