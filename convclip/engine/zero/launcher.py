"""Starting the processes of a run: under `deepspeed`, `torchrun`, `srun`, `mpirun`, or alone."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import time
from pathlib import Path

import torch

from convclip.engine.agreement import refuse_differing, versions
from convclip.engine.zero.ranks import find_ranks


def build_extension() -> None:
    """Compile what the first run on a CPU would compile, as `make` does when it installs; nothing if it is there."""
    _find_ninja()
    os.environ.setdefault("RANK", "0")
    from deepspeed.accelerator import get_accelerator

    _announce_build()
    get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)


def start_processes() -> None:
    """Join the process group of the launcher, or form one of this process alone; picks this rank's device.

    Errors: UserError where the launcher's variables are partial or contradict each other, and on all ranks where one
    runs other code.
    """
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    _find_ninja()
    ranks = find_ranks(os.environ)
    # Without these DeepSpeed looks for mpi4py.
    os.environ.update(ranks.environment())
    # With it DeepSpeed's CPU backend sets up shared memory for an all-reduce that only inference uses, and leaves the
    # 66 MiB of each rank of each run behind in /dev/shm.
    local_size = os.environ.pop("LOCAL_SIZE", None)
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != "cpu":
        # Slurm may show each task its own device only.
        get_accelerator().set_device(ranks.local_rank % get_accelerator().device_count())
    _announce_build()
    deepspeed.init_distributed(dist_backend=get_accelerator().communication_backend_name(), verbose=False)
    if local_size is not None:
        os.environ["LOCAL_SIZE"] = local_size
    refuse_differing(versions())
    atexit.register(_stop)


def _find_ninja() -> None:
    """DeepSpeed compiles with ninja, which stands beside python and may not be on the PATH."""
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def _announce_build() -> None:
    """Say, on rank 0, that DeepSpeed is about to compile what it reduces tensors on a CPU with, if it is."""
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    name = getattr(builder, "name", None)
    if os.environ["RANK"] != "0" or name is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        return
    from deepspeed.git_version_info import installed_ops

    if not installed_ops.get(name, False) and not (library := _extension_folder(name) / f"{name}.so").is_file():
        print(f"compiling DeepSpeed's CPU extension, once for this machine: 30 to 60 s ({library})", flush=True)


def _extension_folder(name: str) -> Path:
    """Where torch keeps the extension of that name: it asks TORCH_EXTENSIONS_DIR first."""
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(name, False))


def _stop() -> None:
    # gloo's threads let go of the last collective's tensors a moment after it, and abort when Python is gone by then.
    time.sleep(0.2)
    # What a rebuild froze (see rebuild.py) would be taken for leaked by extension modules.
    gc.unfreeze()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
