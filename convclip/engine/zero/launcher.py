"""Starting the processes of a run: under `deepspeed`, `torchrun`, or alone."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import time
from pathlib import Path

import torch

# Port 0: whichever is free when it is opened.
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def start_processes() -> None:
    """Join the process group of the launcher, or form one of this process alone; picks this rank's device."""
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    # DeepSpeed compiles an extension with ninja, which stands beside python and may not be on the PATH.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if "RANK" not in os.environ:
        # Without these DeepSpeed looks for mpi4py.
        os.environ.update(ALONE)
    # With it DeepSpeed's CPU backend sets up shared memory for an all-reduce that only inference uses, and leaves the
    # 66 MiB of each rank of each run behind in /dev/shm.
    local_size = os.environ.pop("LOCAL_SIZE", None)
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != "cpu":
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(dist_backend=get_accelerator().communication_backend_name(), verbose=False)
    if local_size is not None:
        os.environ["LOCAL_SIZE"] = local_size
    atexit.register(_stop)


def _stop() -> None:
    # gloo's threads let go of the last collective's tensors a moment after it, and abort when Python is gone by then.
    time.sleep(0.2)
    # What a rebuild froze (see rebuild.py) would be taken for leaked by extension modules.
    gc.unfreeze()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
