"""The optimizer: the only place that names one. What it keeps per parameter may be of any kind, tensor or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from convclip.engine.stages.groups import Group
from convclip.schema import Optim


def make_optimizer(optim: Optim, groups: Sequence[Mapping[str, Any]]) -> torch.optim.Optimizer:
    """AdamW over `groups` (see `optimizer_groups`); the trainer sets their lr before every step."""
    return torch.optim.AdamW([dict(group) for group in groups], lr=0.0, betas=optim.betas, eps=optim.eps, fused=True)


def optimizer_groups(model: nn.Module, groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The parameter groups of a torch optimizer: `params`, `name`, `lr_scale`, `weight_decay`."""
    parameters = dict(model.named_parameters())
    return [
        {
            "params": [parameters[name] for name in group.parameters],
            "name": group.name,
            "lr_scale": group.lr_scale,
            "weight_decay": group.weight_decay,
        }
        for group in groups
    ]


def moved_state(state: Mapping[str, Any], device: torch.device | str, copy: bool = False) -> dict[str, Any]:
    """An optimizer's state of one parameter with its tensors on `device`; what is no tensor stays as it is."""
    return {key: value.to(device, copy=copy) if isinstance(value, Tensor) else value for key, value in state.items()}
