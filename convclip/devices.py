"""The one place that names a device: which one this process computes on, its memory, its random state.

Asked of torch alone, so that using a trained model needs no DeepSpeed. `DS_ACCELERATOR=cpu`, DeepSpeed's own switch,
keeps everything on the CPU.
"""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convclip.schema import UserError

# Precisions by the names that ds_configs and command lines use.
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def on_accelerator() -> bool:
    """Whether this process computes on a device with memory of its own."""
    return os.environ.get("DS_ACCELERATOR") != "cpu" and torch.accelerator.is_available()


def current_device() -> torch.device:
    """This process's device: cpu, or the accelerator that the launcher chose, as in cuda:3."""
    if not on_accelerator():
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def pick_device(device: str | torch.device | None) -> torch.device:
    """`device`; for None what DS_ACCELERATOR names, else the accelerator, else the CPU. UserError: it is not there."""
    present = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    wanted = device or os.environ.get("DS_ACCELERATOR") or present or "cpu"
    count = torch.accelerator.device_count() if present else 0
    try:
        found = torch.device(wanted)
    except (RuntimeError, TypeError):
        found = None
    if found is not None and found.type == "cpu":
        return found
    if found is not None and present is not None and found.type == present.type and (found.index or 0) < count:
        return found
    named = f"device {wanted}" if device else f"DS_ACCELERATOR {wanted}"
    here = "cpu" if present is None else f"cpu and {count} x {present.type}"
    raise UserError(f"{named} is not there: this machine has {here}")


def memory_gib() -> float:
    """Peak memory of this process in GiB: on the accelerator where there is one, else resident."""
    if on_accelerator():
        return torch.accelerator.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def total_memory() -> int:
    """Bytes of the accelerator's memory, of the machine's where there is none."""
    if on_accelerator():
        return _module().get_device_properties(current_device()).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def forget_peak_memory() -> None:
    """Give unused memory back and start `memory_gib` anew; nothing on a CPU."""
    if on_accelerator():
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats()


@dataclass(frozen=True)
class RandomState:
    """State of the generators that the towers draw from; `device` is None on a CPU."""

    cpu: Tensor
    device: Tensor | None

    @classmethod
    def now(cls) -> RandomState:
        """The present state."""
        return cls(torch.get_rng_state(), _module().get_rng_state() if on_accelerator() else None)

    def restore(self) -> None:
        """Rewind the generators to this state."""
        torch.set_rng_state(self.cpu)
        if self.device is not None and on_accelerator():
            _module().set_rng_state(self.device)


def _module() -> Any:
    """torch.cuda, torch.xpu, …"""
    return torch.get_device_module(current_device())
