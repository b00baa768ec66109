"""The chunked step beside open_clip_train's --accum-freq: samples/s and peak memory, with and without locked towers.

    python benchmarks/chunked_step.py [--global_batch 32] [--chunk 8] [--rounds 5] [--threads 1] [--locks none …]

Both have the same ConvNeXt and CLIP text tower with the same weights, the same made-up batch (random pictures, captions
of a usual length: 10 to 22 of 77 tokens), fp32, AdamW, and one loss over the global batch. open_clip's side is its own
`train_one_epoch` with `accum_freq`; ours is `chunked_step` under DeepSpeed. Steps of the two take turns in one process,
ratios are medians over rounds, of wall time and of CPU time, which other work on the machine disturbs less. Memory: the
peak of a process of its own (by the operating system) above what it held with the libraries loaded. `--full_captions`
fills the context, where our cut to the longest caption saves nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from large_batch import MIB, resident, verdict
from open_clip.loss import ClipLoss
from open_clip.model import CustomTextCLIP
from open_clip_train.train import train_one_epoch
from torch import Tensor, nn

from convclip.engine.inputs import Inputs
from convclip.engine.stages.groups import training_stages
from convclip.engine.steps import chunked_step
from convclip.engine.zero.build import build_engine
from convclip.engine.zero.launcher import start_processes
from convclip.engine.zero.ranks import Ranks
from convclip.losses.contrastive import clip_loss
from convclip.models import build_model
from convclip.models.layer_groups import frozen_cut
from convclip.schema import Recipe

SIDES = ("convclip", "open_clip")
# `partly`: the last stage and what follows it, and the last half of the text blocks, are open again.
OPENED = [{"epoch": 1, "tower": "image", "groups": 4}, {"epoch": 1, "tower": "text", "layers": 6}]
FREEZING = {
    "none": {},
    "image": {"lock": ["image"]},
    "partly": {"lock": ["image", "text"], "unfreeze": OPENED},
    "both": {"lock": ["image", "text"]},
}
# samples/s of ours over open_clip's that is wanted at least.
TARGETS = {"none": 1.1, "image": 1.5, "partly": 1.1, "both": 1.5}
LR, EMBED, CONTEXT, VOCABULARY = 1e-5, 512, 77, 49408


def make_recipe(options: argparse.Namespace, lock: str) -> Recipe:
    """The model and the batch of both sides."""
    image = {"backbone": options.backbone, "image_size": options.size, "head": "attention_pool"}
    return Recipe.model_validate(
        {
            "name": "benchmark",
            "epochs": 1,
            "model": {"embed_dim": EMBED, "image": image},
            "batch": {"global": options.global_batch, "micro": options.chunk},
            "freezing": FREEZING[lock],
        }
    )


def make_batch(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Pictures [B, 3, S, S] and token ids [B, 77]."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(options.global_batch, 3, options.size, options.size, generator=generator)
    texts = torch.randint(1, VOCABULARY - 2, (options.global_batch, CONTEXT), generator=generator)
    lengths = torch.randint(10, 23, (options.global_batch, 1), generator=generator)
    if options.full_captions:
        lengths = torch.full_like(lengths, CONTEXT)
    places = torch.arange(CONTEXT)
    texts.masked_fill_(places >= lengths, 0)
    return images, texts.masked_fill_(places == lengths - 1, VOCABULARY - 1)


def our_step(options: argparse.Namespace, recipe: Recipe, losses: list[float]) -> Callable[[], None]:
    """One step of convclip, ready to be called."""
    torch.manual_seed(0)
    model = build_model(recipe.model)
    stage = training_stages(model, recipe)[-1]
    config = {
        "train_batch_size": options.global_batch,
        "train_micro_batch_size_per_gpu": options.chunk,
        "gradient_accumulation_steps": options.global_batch // options.chunk,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": options.zero},
        "zero_force_ds_cpu_optimizer": False,
    }
    engine = build_engine(model, stage.groups, config, recipe.optim, {})
    frozen = frozen_cut(model, stage.trainable)
    images, texts = make_batch(options)
    ids = torch.arange(options.chunk)

    def chunks() -> Iterator[Inputs]:
        for image, text in zip(images.split(options.chunk), texts.split(options.chunk), strict=True):
            yield Inputs(image.clone(), text, ids)

    def step() -> None:
        for group in engine.optimizer.param_groups:
            group["lr"] = LR
        result = chunked_step(
            engine,
            chunks(),
            lambda outputs, *_: {"total": clip_loss(outputs.image, outputs.text, outputs.logit_scale)},
            0,
            frozen,
            recipe.batch.keep_frozen_gib * 2**30,
        )
        losses.append(result.losses["total"].item())

    return step


class RecordedLoss(ClipLoss):
    """open_clip's loss, which also notes its value."""

    def __init__(self, losses: list[float]) -> None:
        super().__init__()
        self.losses = losses

    def forward(self, *features: Any, **options: Any) -> Any:
        """As ClipLoss."""
        result = super().forward(*features, **options)
        self.losses.append(result["contrastive_loss"].item())
        return result


def their_model(options: argparse.Namespace, recipe: Recipe) -> nn.Module:
    """open_clip's model with our weights, locked as ours is."""
    vision = {
        "timm_model_name": options.backbone,
        "timm_pool": "abs_attn",
        "timm_proj": "",
        "image_size": options.size,
    }
    text = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 512, "heads": 8, "layers": 12}
    model = CustomTextCLIP(EMBED, vision, text, nonscalar_logit_scale=True, output_dict=True)
    torch.manual_seed(0)
    ours = build_model(recipe.model)
    model.load_state_dict(ours.state_dict())
    trainable = training_stages(ours, recipe)[-1].trainable
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    return model


def their_step(options: argparse.Namespace, recipe: Recipe, losses: list[float]) -> Callable[[], None]:
    """One step of open_clip_train, ready to be called: an epoch of accum_freq batches."""
    model = their_model(options, recipe)
    decays = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    optim = recipe.optim
    groups = [{"params": others, "weight_decay": 0.0}, {"params": decays, "weight_decay": optim.weight_decay}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=optim.betas, eps=optim.eps)
    images, texts = make_batch(options)
    count = options.global_batch // options.chunk

    class Batches:
        num_batches, num_samples = count, options.global_batch

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for image, text in zip(images.split(options.chunk), texts.split(options.chunk), strict=True):
                yield image.clone(), text

    data = {"train": SimpleNamespace(set_epoch=lambda epoch: None, dataloader=Batches())}
    arguments = SimpleNamespace(
        device="cpu",
        precision="fp32",
        distill=False,
        accum_freq=count,
        skip_scheduler=True,
        horovod=False,
        grad_clip_norm=None,
        rank=0,
        local_rank=0,
        world_size=1,
        log_local=False,
        log_every_n_steps=1,
        batch_size=options.chunk,
        wandb=False,
    )
    loss = RecordedLoss(losses)
    return lambda: train_one_epoch(model, data, loss, 0, optimizer, None, None, None, arguments)


def make_step(side: str, options: argparse.Namespace, lock: str, losses: list[float]) -> Callable[[], None]:
    """The step of a side; it appends the loss of every call to `losses`."""
    return (our_step if side == "convclip" else their_step)(options, make_recipe(options, lock), losses)


def compare_times(options: argparse.Namespace, lock: str) -> None:
    """Steps in turns; prints each side's samples/s and the ratios."""
    losses: dict[str, list[float]] = {side: [] for side in SIDES}
    steps = {side: make_step(side, options, lock, losses[side]) for side in SIDES}
    wall: dict[str, list[float]] = {side: [] for side in SIDES}
    cpu: dict[str, list[float]] = {side: [] for side in SIDES}
    for turn in range(options.rounds + 1):
        for side in SIDES if turn % 2 else reversed(SIDES):
            start, start_cpu = time.perf_counter(), time.process_time()
            steps[side]()
            if turn:
                wall[side].append(time.perf_counter() - start)
                cpu[side].append(time.process_time() - start_cpu)
    first = losses["convclip"][0], losses["open_clip"][0]
    print(f"locked {lock}: losses of the first step {first[0]:.6f} and {first[1]:.6f}")
    for side in SIDES:
        rate = options.global_batch / statistics.median(wall[side])
        print(f"  {side:>10} {rate:8.3f} samples/s, {statistics.median(cpu[side]):8.2f} CPU seconds a step")
    for name, seconds in (("wall time", wall), ("CPU time", cpu)):
        ratios = [b / a for a, b in zip(seconds["convclip"], seconds["open_clip"], strict=True)]
        print(f"  {name}: {statistics.median(ratios):.3f}x ({min(ratios):.3f} to {max(ratios):.3f})", end="")
        print(f", target >= {TARGETS[lock]}x")


def measure_memory(side: str, options: argparse.Namespace, lock: str) -> float:
    """In this process: MiB that three steps need at their peak above what the process held before."""
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step = make_step(side, options, lock, [])
    for _ in range(3):
        step()
    return (resident("VmHWM") - before) / MIB


def compare_memory(options: argparse.Namespace, lock: str) -> None:
    """Prints each side's peak and the ratio."""
    peaks = {}
    for side in SIDES:
        command = [sys.executable, *sys.argv, "--measure", side, "--locks", lock]
        # A process group of its own.
        environment = {name: value for name, value in os.environ.items() if name not in Ranks().environment()}
        output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
        peaks[side] = json.loads(output.strip().splitlines()[-1])
    print(f"  peak memory: convclip {peaks['convclip']:.0f} MiB, open_clip {peaks['open_clip']:.0f} MiB")
    verdict("  convclip / open_clip", peaks["convclip"] / peaks["open_clip"], 1.0)


def main() -> None:
    """Print the comparison; with --measure only one figure as JSON, for the process that asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="convnext_tiny")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--global_batch", type=int, default=32)
    parser.add_argument("--chunk", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--zero", type=int, default=0, help="ZeRO stage of our side")
    parser.add_argument("--locks", nargs="+", choices=FREEZING, default=list(FREEZING))
    parser.add_argument("--full_captions", action="store_true")
    parser.add_argument("--no_memory", action="store_true", help="times only")
    parser.add_argument("--measure", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)
    start_processes()
    if options.measure:
        print(json.dumps(measure_memory(options.measure, options, options.locks[0])))
        return
    for lock in options.locks:
        compare_times(options, lock)
        if not options.no_memory:
            compare_memory(options, lock)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
