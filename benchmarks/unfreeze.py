"""What staged unfreezing costs: the rebuild, its memory, the steps before it, and DeepSpeed's share of a step.

    python benchmarks/unfreeze.py [--part rebuild|locked|overhead] [--micro 4] [--repeats 5]

Prints each figure beside its limit, measured in the same run on synthetic pictures at full model size.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from convclip.config import load_recipe
from convclip.engine.stages.groups import Stage, training_stages
from convclip.engine.zero.build import build_engine, rebuild_engine, take_snapshot
from convclip.engine.zero.launcher import start_processes
from convclip.losses.contrastive import clip_loss
from convclip.models import build_model
from convclip.schema import Recipe

LR = 1e-4


def batch(recipe: Recipe, micro: int) -> tuple[Tensor, Tensor]:
    """Synthetic pictures [B, 3, S, S] and full-length captions [B, T]."""
    size, text = recipe.model.image.image_size, recipe.model.text
    tokens = torch.randint(1, text.vocab_size - 1, (micro, text.context_length))
    tokens[:, -1] = text.vocab_size - 1
    return torch.randn(micro, 3, size, size), tokens


def ds_config(stage: int, micro: int) -> dict[str, Any]:
    """fp32, one micro batch per step."""
    return {
        "train_batch_size": micro,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": stage},
    }


def engine_step(engine: Any, images: Tensor, texts: Tensor) -> None:
    """Forward, backward and optimizer step under DeepSpeed."""
    outputs = engine(images, texts)
    engine.backward(clip_loss(outputs.image, outputs.text, outputs.logit_scale))
    for group in engine.optimizer.param_groups:
        group["lr"] = LR * group["lr_scale"]
    engine.step()


def seconds(action: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def resident() -> int:
    """Bytes of this process in memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def optimizer_bytes(engine: Any) -> int:
    """Bytes of masters and Adam state on this rank."""
    snapshot = take_snapshot(engine)
    tensors = [*snapshot.masters, *(value for state in snapshot.states for value in state.values())]
    return sum(tensor.nbytes for tensor in tensors)


def prepare(recipe: Recipe, micro: int, stage: int = 2) -> tuple[nn.Module, list[Stage], dict[str, Any], dict]:
    """Model, its stages, a configuration and full-precision values."""
    torch.manual_seed(0)
    model = build_model(recipe.model)
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return model, training_stages(model, recipe), ds_config(stage, micro), values


def measure_rebuild(micro: int, repeats: int) -> None:
    """convnext_base_w with both towers open: the rebuild against three steps, its peak against the optimizer state."""
    recipe = load_recipe("base_absattn_3stage", ["teacher=null"])
    images, texts = batch(recipe, micro)
    took, peaks, steps, state = [], [], [], 0
    for _ in range(repeats):
        model, stages, config, values = prepare(recipe, micro)
        engine = build_engine(model, stages[1].groups, config, recipe.optim, {})
        engine_step(engine, images, texts)
        gc.collect()
        before, peak = resident(), PeakMemory()
        with peak:
            start = time.perf_counter()
            engine = rebuild_engine(engine, stages[2].groups, config, recipe.optim, {})
            took.append(time.perf_counter() - start)
        peaks.append(peak.bytes - before)
        engine_step(engine, images, texts)
        steps.append(seconds(partial(engine_step, engine, images, texts)))
        state = optimizer_bytes(engine)
        del engine, model, values
        gc.collect()
    rebuild, step = statistics.median(took), statistics.median(steps)
    limit = max(3 * step, 3.0)
    print(f"rebuild, all of convnext_base_w: {rebuild:.2f} s; step of micro batch {micro}: {step:.2f} s; ", end="")
    print(f"limit max(3 steps, 3 s) = {limit:.2f} s: {rebuild / limit:.2f}x of the limit")
    extra = statistics.median(peaks)
    print(f"extra peak memory in it {extra / 2**20:.0f} MiB, optimizer state {state / 2**20:.0f} MiB: ", end="")
    print(f"{extra / state:.2f}x (limit 1x)")


class PeakMemory:
    """Largest resident size while the block runs, by sampling in a thread."""

    def __enter__(self) -> PeakMemory:

        self.bytes, self._stop = resident(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.bytes = max(self.bytes, resident())

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()


def measure_locked(micro: int, repeats: int) -> None:
    """Steps of a locked stage of a recipe with events, against the same recipe that never unfreezes."""
    recipe = load_recipe("base_absattn_3stage")
    never = load_recipe("base_absattn_3stage", ["freezing.unfreeze=[]"])
    images, texts = batch(recipe, micro)
    engines, sizes = [], {}
    for each in (recipe, never):
        model, stages, config, _ = prepare(each, micro)
        engines.append(build_engine(model, stages[0].groups, config, each.optim, {}))
        engine_step(engines[-1], images, texts)
        sizes = {name: p.numel() for name, p in model.named_parameters()}
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for engine, took in zip(engines, times, strict=True):
            took.append(seconds(partial(engine_step, engine, images, texts)))
    ratio = statistics.median(a / b for a, b in zip(*times, strict=True))
    print(f"locked step with events ahead against never unfreezing: {ratio:.3f}x (limit 1.03x)")
    trainable = sum(sizes[name] for name in stages[0].trainable)
    print(
        f"optimizer state {optimizer_bytes(engines[0]):,} bytes = {optimizer_bytes(engines[0]) / trainable:.2f} bytes "
        f"for each of {trainable:,} trainable parameters; {sum(sizes.values()) - trainable:,} locked ones hold none"
    )


def measure_overhead(repeats: int) -> None:
    """The demo with convnext_atto, batch 128 of 64 px: the step under each ZeRO stage against a plain torch loop."""
    recipe = load_recipe("demo", ["freezing.lock=[]", "freezing.unfreeze=[]", "model.image.backbone=convnext_atto"])
    rows = recipe.batch.global_
    images, texts = batch(recipe, rows)
    plain, _, _, _ = prepare(recipe, rows)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=LR, betas=recipe.optim.betas, eps=recipe.optim.eps, fused=True)

    def plain_step() -> None:
        optimizer.zero_grad()
        outputs = plain(images, texts)
        clip_loss(outputs.image, outputs.text, outputs.logit_scale).backward()
        optimizer.step()

    for stage in range(4):
        model, stages, config, _ = prepare(recipe, rows, stage)
        engine = build_engine(model, stages[0].groups, config, recipe.optim, {})
        pairs = []
        for number in range(2 * repeats + 1):
            pair = seconds(partial(engine_step, engine, images, texts)), seconds(plain_step)
            if number:
                pairs.append(pair)
        ratio = statistics.median(ours / bare for ours, bare in pairs)
        extra = statistics.median(ours - bare for ours, bare in pairs)
        limit = " (limit 1.15x)" if stage in (1, 2) else ""
        print(
            f"step under ZeRO {stage} against plain torch, convnext_atto: {ratio:.2f}x{limit}, {extra * 1000:+.0f} ms"
        )


def main() -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["rebuild", "locked", "overhead"], help="one part instead of all")
    parser.add_argument("--micro", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    start_processes()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    if arguments.part in (None, "rebuild"):
        measure_rebuild(arguments.micro, max(1, arguments.repeats // 2))
    if arguments.part in (None, "locked"):
        measure_locked(arguments.micro, arguments.repeats)
    if arguments.part in (None, "overhead"):
        measure_overhead(arguments.repeats)


if __name__ == "__main__":
    main()
