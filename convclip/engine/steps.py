"""One optimizer step: with a loss per micro batch, or with one loss over chunks of a batch too large to run at once.

The chunked step follows GradCache (arXiv 2101.06983). First every chunk's features are computed without gradient; the
loss over all of them gives a gradient for each feature; then each chunk runs again, with gradient, and its features'
cached gradients are sent back through the towers. The random state is replayed, so that drop path drops the same
paths. Frozen layers do not run twice. Nor does the last chunk: it runs with gradient the first time, because its
backward pass comes first.
Shapes: B rows of a micro batch or chunk, N chunks, D embed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from convclip.devices import RandomState
from convclip.engine.inputs import Inputs
from convclip.engine.objective import Losses
from convclip.engine.zero.build import reduce_once
from convclip.engine.zero.update import take_update
from convclip.models.dual_tower import Cut, Outputs

# (outputs of the model, the micro batches they come from, the optimizer step) -> losses.
Objective: TypeAlias = Callable[[Outputs, Sequence[Any], int], Losses]


class ModelInputs(Protocol):
    """A micro batch on the device, of any task."""

    def model_inputs(self) -> tuple[Any, ...]:
        """Arguments of the model."""


class StepResult(NamedTuple):
    """Losses of this rank, and the model's exponentiated logit scale [1] and logit bias [1]; no gradient.

    `updated` is False where the optimizer skipped its update, because a gradient of some rank is not finite.
    """

    losses: Losses
    logit_scale: Tensor
    logit_bias: Tensor | None
    updated: bool


def accumulated_step(
    engine: DeepSpeedEngine, batches: Iterable[ModelInputs], objective: Objective, step: int
) -> StepResult:
    """One optimizer step over as many micro batches as the engine accumulates, each with its own loss; mean losses."""
    mean: Losses = {}
    count = engine.gradient_accumulation_steps()
    for batch in batches:
        outputs: Outputs = engine(*batch.model_inputs())
        losses = objective(outputs, [batch], step)
        engine.backward(losses["total"])
        updated = take_update(engine)
        for name, loss in losses.items():
            share = loss.detach() / count
            mean[name] = mean[name] + share if name in mean else share
    return StepResult(mean, outputs.logit_scale.detach(), _detached(outputs.logit_bias), updated)


def chunked_step(
    engine: DeepSpeedEngine,
    chunks: Iterable[Inputs],
    objective: Objective,
    step: int,
    frozen: Cut,
    keep_bytes: float,
) -> StepResult:
    """One optimizer step over `chunks` (as many as the engine accumulates) with one loss for all of them.

    Nothing below `frozen` trains. What the towers make of a chunk up to there is kept for the second pass, as long as
    it takes at most `keep_bytes` more than the inputs that it replaces.
    """
    last = engine.gradient_accumulation_steps() - 1
    kept: list[Inputs] = []
    states: list[RandomState] = []
    parts: list[Outputs] = []
    with torch.no_grad():
        for number, chunk in enumerate(chunks):
            # What is frozen draws no random numbers, so this is also the state behind it.
            states.append(RandomState.now())
            chunk, keeps, keep_bytes = _without_frozen(engine, chunk, frozen, keep_bytes)
            with torch.set_grad_enabled(number == last):
                parts.append(engine(*chunk.model_inputs()))
            kept.append(keeps)
        outputs = parts[last]
        leaves = _leaves(parts)
        parts.clear()
        # What the second pass must not change: random state, and the running statistics of batch norms.
        after, buffers = RandomState.now(), [buffer.clone() for buffer in engine.module.buffers()]
    losses = objective(leaves, kept, step)
    losses["total"].backward()
    text_learns = leaves.text is not None and leaves.text.requires_grad
    rows = len(outputs.image)
    with reduce_once(engine):
        for number in reversed(range(len(kept))):
            if number != last:
                states[number].restore()
                outputs = engine(*kept[number].model_inputs(without_text=not text_learns))
            engine.set_gradient_accumulation_boundary(number == 0)
            engine.backward(_surrogate(outputs, leaves, number * rows, len(kept)), scale_wrt_gas=False)
    engine.set_gradient_accumulation_boundary(True)
    updated = take_update(engine)
    after.restore()
    with torch.no_grad():
        for buffer, value in zip(engine.module.buffers(), buffers, strict=True):
            buffer.copy_(value)
    found = {name: loss.detach() for name, loss in losses.items()}
    return StepResult(found, leaves.logit_scale.detach(), _detached(leaves.logit_bias), updated)


def _leaves(parts: Sequence[Outputs]) -> Outputs:
    """The outputs of all chunks as one, cut off from the towers: leaves that gather the loss's gradient.

    Only the last chunk ran with gradient, so it tells which outputs learn.
    """
    last = parts[-1]

    def leaf(values: list[Tensor | None]) -> Tensor | None:
        if values[-1] is None:
            return None
        given = [value for value in values if value is not None]
        return torch.cat(given).detach().requires_grad_(values[-1].requires_grad)

    return Outputs(
        leaf([part.image for part in parts]),
        leaf([part.text for part in parts]),
        last.logit_scale.detach().requires_grad_(),
        None if last.logit_bias is None else last.logit_bias.detach().requires_grad_(),
        {name: torch.cat([part.extras[name] for part in parts]).detach() for name in last.extras},
    )


def _surrogate(outputs: Outputs, leaves: Outputs, first: int, chunks: int) -> Tensor:
    """A scalar whose gradient in a chunk's outputs is that of the loss: `first` is the chunk's first row."""
    assert outputs.image is not None  # the image tower runs in every step
    rows = slice(first, first + len(outputs.image))
    of_rows = ((outputs.image, leaves.image), (outputs.text, leaves.text))
    of_all = ((outputs.logit_scale, leaves.logit_scale), (outputs.logit_bias, leaves.logit_bias))
    terms = [(x * slope[rows]).sum() for x, slope in _with_slopes(of_rows)]
    terms += [(x * slope).sum() / chunks for x, slope in _with_slopes(of_all)]
    return torch.stack(terms).sum()


def _with_slopes(pairs: Iterable[tuple[Tensor | None, Tensor | None]]) -> Iterator[tuple[Tensor, Tensor]]:
    """(output, gradient of the loss in its leaf), where there is one."""
    for output, leaf in pairs:
        if output is not None and leaf is not None and leaf.grad is not None:
            yield output, leaf.grad


def _without_frozen(engine: DeepSpeedEngine, chunk: Inputs, frozen: Cut, room: float) -> tuple[Inputs, Inputs, float]:
    """(the chunk as it enters at `frozen`, what of that may be kept in `room` bytes, what is left of them)."""
    keeps = chunk
    below = chunk.up_to(frozen)
    if all(x is None for x in below):
        return chunk, chunk, room
    for tower, value in zip(Cut._fields, engine(*below, chunk.cut, stop=frozen), strict=True):
        if value is None:
            continue
        chunk = chunk.entering(tower, value, frozen)
        beyond = chunk.nbytes(tower) - keeps.nbytes(tower)
        if beyond <= room:
            room -= beyond
            keeps = keeps.entering(tower, value, frozen)
    return chunk, keeps, room


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()
