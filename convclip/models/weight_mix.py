"""Weights between a run's start and end: theta = (1 - alpha) start + alpha end (WiSE-FT, arXiv 2109.01903)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from convclip.models.dual_tower import DualTower
from convclip.models.tower import Tower
from convclip.schema import UserError

# Differences named in a message.
NAMED = 3


@dataclass(frozen=True)
class WeightMix:
    """Both ends: `end` holds all weights and buffers of a model by name, `start` those of them that are mixed.

    Whatever is a floating-point number and has a start is mixed: parameters, running statistics of batch norms, the
    logit scale (its logarithm, so that the scales mix geometrically) and the logit bias. `kept` are the names that are
    the end's at every alpha: what is new in the run, such as a head that began at random, and counters.
    """

    start: Mapping[str, Tensor]
    end: Mapping[str, Tensor]
    kept: tuple[str, ...]

    def at(self, alpha: float) -> dict[str, Tensor]:
        """All weights at `alpha`, 0 to 1; to the bit the start's at 0 and the end's at 1, but for what is kept."""
        if alpha in (0.0, 1.0):
            return {**self.end, **(self.start if alpha == 0 else {})}
        # In double precision: what start and end have alike stays as it is.
        mixed = {n: torch.lerp(x.double(), self.end[n].double(), alpha).to(x.dtype) for n, x in self.start.items()}
        return {**self.end, **mixed}


def mix_weights(
    model: DualTower, start: Mapping[str, Tensor], end: Mapping[str, Tensor], fresh: Collection[str], source: str
) -> WeightMix:
    """The mix of `start` (of `source`, as users name it) and `end`, which are weights by name; `end` fits `model`.

    `fresh` names what of `start` is random. A head of which the start lacks a part, or has it random or in another
    shape, is the end's as a whole. Errors: UserError where the start lacks any other weight, or nothing differs.
    """
    heads = {**_head_of("visual", model.visual), **_head_of("text", model.text)}
    misfit = [name for name in end if name not in start or start[name].shape != end[name].shape]
    other = [name for name in misfit if name not in heads and not name.startswith("logit_")]
    if other:
        more = f" and {len(other) - NAMED} more" if len(other) > NAMED else ""
        raise UserError(
            f"{source} is another model than the run's: {', '.join(other[:NAMED])}{more} of the run are not in it, or "
            "in another shape; name the weights that the run began with (--start)"
        )
    new = {*misfit, *fresh}
    replaced = {heads[name] for name in new if name in heads}
    kept = [n for n, x in end.items() if n in new or heads.get(n) in replaced or not x.is_floating_point()]
    mixed = {name: start[name] for name in end if name not in set(kept)}
    if all(torch.equal(value, end[name]) for name, value in mixed.items()):
        what = "has no weight that is not new in the run" if not mixed else "has the same weights as the end"
        raise UserError(f"{source} {what}: there is nothing to mix; name the weights to start from (--start)")
    return WeightMix(mixed, end, tuple(kept))


def _head_of(part: str, tower: Tower) -> dict[str, str]:
    """Names of the parameters and buffers of a tower's head, each with the tower's part of the model."""
    head = tower.embed_head()
    places = [place for place, module in tower.named_modules() if module is head]
    return {f"{part}.{place}.{name}": part for place in places for name in head.state_dict()}
