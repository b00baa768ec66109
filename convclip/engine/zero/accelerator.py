"""What this machine can train with, asked of DeepSpeed's accelerator, for tools: they do not import deepspeed."""

from __future__ import annotations

import logging
from dataclasses import dataclass

# Without a GPU, DeepSpeed warns on import that it found none, in every process; callers say it in their own words.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())

from deepspeed.accelerator import get_accelerator  # noqa: E402


@dataclass(frozen=True)
class Devices:
    """The devices DeepSpeed would use on this machine.

    `kind` is the accelerator's name (cpu, cuda, npu, …); `memory` is bytes of the first device, of all of it on a CPU;
    `backend` is what its ranks talk through; `precisions` are the ds_config names it computes in.
    """

    kind: str
    count: int
    memory: int
    backend: str
    precisions: tuple[str, ...]


def find_devices() -> Devices:
    """Ask DeepSpeed's accelerator; starts no process group and keeps no device memory."""
    accelerator = get_accelerator()
    kind = accelerator.device_name()
    precisions = ["fp32"]
    if accelerator.is_bf16_supported():
        precisions.append("bf16")
    if accelerator.is_fp16_supported():
        precisions.append("fp16")
    # DeepSpeed counts a CPU's NUMA nodes as devices; to a user it is one.
    count = 1 if kind == "cpu" else accelerator.device_count()
    return Devices(
        kind, count, accelerator.total_memory(0), accelerator.communication_backend_name(), tuple(precisions)
    )
