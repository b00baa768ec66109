"""One optimizer step: with a loss per micro batch, or with one loss over chunks of a batch too large to run at once.

The chunked step follows GradCache (arXiv 2101.06983). First every chunk's features are computed without gradient; the
loss over all of them gives a gradient for each feature; then each chunk runs again, with gradient, and its features'
cached gradients are sent back through the towers. Random state is replayed, so that drop path drops the same. What is
frozen is not run a second time, nor is the last chunk: it runs with gradient at once, for its backward comes first.
Shapes: B rows of a micro batch or chunk, N chunks, D embed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from convclip.engine.inputs import Inputs
from convclip.engine.meters import on_accelerator
from convclip.models.dual_tower import Cut

Losses: TypeAlias = dict[str, Tensor]
# (image features, text features, logit scale, the micro batches they come from) -> losses by name, `total` among them.
LossOf: TypeAlias = Callable[[Tensor, Tensor, Tensor, list[Inputs]], Losses]


@dataclass
class RandomState:
    """State of the generators that the towers draw from."""

    cpu: Tensor
    device: Tensor | None

    @classmethod
    def now(cls) -> RandomState:
        """The present state."""
        on_device = on_accelerator()
        return cls(torch.get_rng_state(), get_accelerator().get_rng_state() if on_device else None)

    def restore(self) -> None:
        """Draw again what was drawn after `now()`."""
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            get_accelerator().set_rng_state(self.device)


def accumulated_step(
    engine: DeepSpeedEngine, batches: Iterable[Inputs], loss_of: LossOf, count: int
) -> tuple[Losses, Tensor]:
    """One optimizer step over `count` micro batches, each with its own loss; (mean losses, exp(logit_scale))."""
    mean: Losses = {}
    for batch in batches:
        image, text, scale, *reference = engine(*batch.model_inputs())
        losses = loss_of(
            image, batch.text_embedding if text is None else text, scale, [batch.with_reference(*reference)]
        )
        engine.backward(losses["total"])
        engine.step()
        for name, loss in losses.items():
            mean[name] = mean.get(name, 0) + loss.detach() / count
    return mean, scale.detach()


def chunked_step(
    engine: DeepSpeedEngine, chunks: Iterable[Inputs], loss_of: LossOf, frozen: Cut, keep_bytes: float
) -> tuple[Losses, Tensor]:
    """One optimizer step over `chunks` (as many as the engine accumulates) with one loss for all of them.

    Nothing below `frozen` trains; what the towers make of a chunk up to there is kept for the second pass while what
    it takes beyond the input that it replaces fits what is left of `keep_bytes`. Returns (losses, exp(logit_scale)).
    """
    last = engine.gradient_accumulation_steps() - 1
    kept: list[Inputs] = []
    states, images, texts = [], [], []
    with torch.no_grad():
        for number, chunk in enumerate(chunks):
            # What is frozen draws no random numbers, so this is also the state behind it.
            states.append(RandomState.now())
            chunk, keeps, keep_bytes = _without_frozen(engine, chunk, frozen, keep_bytes)
            with torch.set_grad_enabled(number == last):
                image, text, scale, *reference = engine(*chunk.model_inputs())
            images.append(image)
            texts.append(chunk.text_embedding if text is None else text)
            kept.append(keeps.with_reference(*reference))
        features = [torch.cat(images), torch.cat(texts), scale]
        # What the second pass must not change: random state, and the running statistics of batch norms.
        after, buffers = RandomState.now(), [buffer.clone() for buffer in engine.module.buffers()]
    text_learns = texts[last].requires_grad
    leaves = [x.detach().requires_grad_(learns) for x, learns in zip(features, (True, text_learns, True), strict=True)]
    losses = loss_of(*leaves, kept)
    losses["total"].backward()
    image_gradients, text_gradients = (None if x.grad is None else x.grad.split(len(image)) for x in leaves[:2])
    with _one_reduction(engine):
        for number in reversed(range(len(kept))):
            if number != last:
                states[number].restore()
                image, text, scale, *_ = engine(*kept[number].model_inputs(without_text=not text_learns))
            surrogate = (image * image_gradients[number]).sum() + (scale * leaves[2].grad).sum() / len(kept)
            if text_learns:
                surrogate = surrogate + (text * text_gradients[number]).sum()
            engine.set_gradient_accumulation_boundary(number == 0)
            engine.backward(surrogate, scale_wrt_gas=False)
    engine.set_gradient_accumulation_boundary(True)
    engine.step()
    after.restore()
    with torch.no_grad():
        for buffer, value in zip(engine.module.buffers(), buffers, strict=True):
            buffer.copy_(value)
    return {name: loss.detach() for name, loss in losses.items()}, leaves[2].detach()


def _without_frozen(engine: DeepSpeedEngine, chunk: Inputs, frozen: Cut, room: float) -> tuple[Inputs, Inputs, float]:
    """(the chunk as it enters at `frozen`, what of that may be kept in `room` bytes, what is left of them)."""
    keeps = chunk
    below = chunk.up_to(frozen)
    if all(x is None for x in below):
        return chunk, chunk, room
    for tower, value in zip(Cut._fields, engine(*below, chunk.cut, frozen), strict=True):
        if value is None:
            continue
        chunk = chunk.entering(tower, value, frozen)
        beyond = chunk.nbytes(tower) - keeps.nbytes(tower)
        if beyond <= room:
            room -= beyond
            keeps = keeps.entering(tower, value, frozen)
    return chunk, keeps, room


def _one_reduction(engine: DeepSpeedEngine) -> contextlib.AbstractContextManager:
    """Makes ZeRO stage 2 reduce gradients once for all backward passes within; stages 0 and 1 do by themselves.

    Stage 3 goes on reducing at each, which is how it never holds the whole gradient.
    """
    return engine.coalesce_grad_reduction() if engine.zero_optimization_stage() == 2 else contextlib.nullcontext()
