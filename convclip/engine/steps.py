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
    engine: DeepSpeedEngine,
    chunks: Iterable[Inputs],
    loss_of: LossOf,
    frozen_boundary: int,
    text_is_frozen: bool,
    keep_bytes: float,
) -> tuple[Losses, Tensor]:
    """One optimizer step over `chunks` (as many as the engine accumulates) with one loss for all of them.

    Layer groups of the image tower below `frozen_boundary` hold nothing that trains; their output is kept for the
    second pass while what it takes beyond the input that it replaces fits `keep_bytes` (0: not kept). Returns (losses,
    exp(logit_scale)).
    """
    last = engine.gradient_accumulation_steps() - 1
    kept: list[Inputs] = []
    states, images, texts = [], [], []
    with torch.no_grad():
        for number, chunk in enumerate(chunks):
            if frozen_boundary > chunk.boundary and keep_bytes > 0:
                features = engine(chunk.image, None, chunk.boundary, frozen_boundary)
                keep_bytes -= features.nbytes - chunk.image.nbytes
                chunk = chunk.with_prefix(features, frozen_boundary)
            states.append(RandomState.now())
            with torch.set_grad_enabled(number == last):
                image, text, scale, *reference = engine(*chunk.model_inputs())
            images.append(image)
            texts.append(chunk.text_embedding if text is None else text)
            kept.append(chunk.with_reference(*reference))
        leaves = [torch.cat(images), torch.cat(texts), scale]
        # What the second pass must not change: random state, and the running statistics of batch norms.
        after, buffers = RandomState.now(), [buffer.clone() for buffer in engine.module.buffers()]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    losses = loss_of(*leaves, kept)
    losses["total"].backward()
    image_gradients, text_gradients = (leaf.grad.split(len(image)) for leaf in leaves[:2])
    with _one_reduction(engine):
        for number in reversed(range(len(kept))):
            if number != last:
                states[number].restore()
                image, text, scale, *_ = engine(*kept[number].model_inputs(without_text=text_is_frozen))
            surrogate = (image * image_gradients[number]).sum() + (scale * leaves[2].grad).sum() / len(kept)
            if text is not None:
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


def _one_reduction(engine: DeepSpeedEngine) -> contextlib.AbstractContextManager:
    """Makes ZeRO stage 2 reduce gradients once for all backward passes within; stages 0 and 1 do by themselves.

    Stage 3 goes on reducing at each, which is how it never holds the whole gradient.
    """
    return engine.coalesce_grad_reduction() if engine.zero_optimization_stage() == 2 else contextlib.nullcontext()
