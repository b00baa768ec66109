"""Which of a run's processes this one is: by the variables of deepspeed and torchrun, of MPI, or of Slurm.

Without this, tasks of `srun` or `mpirun` would each train alone, and write one folder. Facts of an environment in,
five of torch.distributed's variables out; nothing is guessed. Imports no torch.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from convclip.schema import UserError

# Ports for runs that are given none: below those that a machine hands out to connections.
PORTS = range(20_000, 32_000)


@dataclass(frozen=True)
class Launcher:
    """The variables of one kind of launcher."""

    name: str
    rank: str
    world: str
    local_rank: tuple[str, ...]
    # Processes on this machine.
    local_world: tuple[str, ...] = ()


# The innermost first: torchrun may be started by srun, and mpirun starts its helpers by it.
LAUNCHERS = (
    Launcher("torchrun or deepspeed", "RANK", "WORLD_SIZE", ("LOCAL_RANK",)),
    Launcher(
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    Launcher(
        "MPI", "PMI_RANK", "PMI_SIZE", ("MPI_LOCALRANKID", "PMI_LOCAL_RANK"), ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE")
    ),
    Launcher("Slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", ("SLURM_LOCALID",)),
)
OURS, SLURM = LAUNCHERS[0], LAUNCHERS[-1]


@dataclass(frozen=True)
class Ranks:
    """This process among the run's; `address` and `port` are where rank 0 listens (port 0: whichever is free)."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    address: str = "127.0.0.1"
    port: int = 0

    def environment(self) -> dict[str, str]:
        """The variables that torch.distributed and DeepSpeed read."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world),
            "LOCAL_RANK": str(self.local_rank),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def find_ranks(given: Mapping[str, str]) -> Ranks:
    """This process by the environment `given`; alone where no launcher is in it. UserError: it is partial, or
    contradicts itself."""
    # In the body of an sbatch script Slurm has a rank, but started no step.
    found = [each for each in LAUNCHERS if each.rank in given and (each is not SLURM or SLURM.world in given)]
    if not found:
        _refuse_partial(given)
        return Ranks()
    launcher = found[0]
    if found[-1] is SLURM and launcher is not OURS and all(given.get(a) == given.get(b) for a, b in _pairs(launcher)):
        # `srun --mpi=pmi2` says it in both ways.
        launcher = SLURM
    rank, world = _numbers(launcher, given)
    for outer in found[1:]:
        started = _number(given, outer.world, outer)
        if started > world:
            raise UserError(
                f"{launcher.world} says {world} processes, but {outer.name} started {started} ({outer.world}): unset "
                f"{launcher.rank} and {launcher.world}, or start one task per machine"
            )
    local = _local_rank(found, given, rank, world)
    if world == 1 and launcher is not OURS:
        return Ranks()
    return Ranks(rank, world, local, *_meeting_point(launcher, given, world))


def _pairs(launcher: Launcher) -> tuple[tuple[str, str], ...]:
    """Its names of rank and world, and Slurm's."""
    return (launcher.rank, SLURM.rank), (launcher.world, SLURM.world)


def planned_world(given: Mapping[str, str]) -> int:
    """The number of processes that a plan is for: WORLD_SIZE, else as `find_ranks`."""
    return _number(given, OURS.world, OURS, smallest=1) if OURS.world in given else find_ranks(given).world


def _refuse_partial(given: Mapping[str, str]) -> None:
    """UserError where something says that there are others, but not which of them this one is."""
    for name in (OURS.world, *OURS.local_rank):
        if name in given:
            raise UserError(f"{name} is set, {OURS.rank} is not: unset it, or start by deepspeed, torchrun or srun")
    if "PMIX_RANK" in given:
        raise UserError(
            "PMIX_RANK is set, but nothing says of how many: set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and "
            "MASTER_PORT, or start by srun or Open MPI's mpirun"
        )
    tasks = given.get("SLURM_NTASKS", "1")
    if SLURM.world not in given and tasks.isdecimal() and int(tasks) > 1:
        raise UserError(
            f"Slurm's job has {tasks} tasks (SLURM_NTASKS), and this process is none of them: start it with srun, or "
            "by deepspeed or torchrun; to run alone, `srun --ntasks=1`"
        )


def _numbers(launcher: Launcher, given: Mapping[str, str]) -> tuple[int, int]:
    """(rank, world) of a launcher. Errors: UserError."""
    rank, world = _number(given, launcher.rank, launcher), _number(given, launcher.world, launcher, smallest=1)
    if rank >= world:
        raise UserError(f"{launcher.rank} {rank} is not below {launcher.world} {world}: mend the launcher's variables")
    return rank, world


def _number(given: Mapping[str, str], name: str, launcher: Launcher, smallest: int = 0) -> int:
    text = given.get(name)
    if text is None:
        raise UserError(f"{launcher.rank} is set, {name} is not: set it, or start by deepspeed, torchrun or srun")
    if not text.strip().isdecimal() or int(text) < smallest:
        raise UserError(f"{name} is {text!r}, not a whole number from {smallest}: mend it")
    return int(text)


def _local_rank(found: list[Launcher], given: Mapping[str, str], rank: int, world: int) -> int:
    """Which process of its machine it is: by the launcher, else by an outer one that counts alike."""
    for launcher in found:
        if (given.get(launcher.rank), given.get(launcher.world)) != (str(rank), str(world)):
            continue
        for name in launcher.local_rank:
            if name in given:
                return _number(given, name, launcher)
    if world == 1:
        return 0
    name = found[0].local_rank[0] if found[0].local_rank else "LOCAL_RANK"
    raise UserError(f"{found[0].rank} is set, {name} is not: set it (0 where each machine has one process)")


def _meeting_point(launcher: Launcher, given: Mapping[str, str], world: int) -> tuple[str, int]:
    """(address, port) of rank 0, alike for all ranks. Errors: UserError."""
    address, port = given.get("MASTER_ADDR"), given.get("MASTER_PORT")
    if port is not None:
        number = _number({"MASTER_PORT": port}, "MASTER_PORT", launcher)
    elif launcher is OURS and world > 1:
        raise UserError("RANK is set, MASTER_PORT is not: set it, or start by deepspeed, torchrun or srun")
    else:
        # Of one job, and so the same on all its ranks and another than that of a job beside it.
        step = ("SLURM_STEP_ID",) if launcher is SLURM else ()
        names = ("SLURM_JOB_ID", *step, "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID")
        job = "/".join(given.get(name, "") for name in names)
        number = 0 if world == 1 else PORTS[zlib.crc32(job.encode()) % len(PORTS)]
    if address is not None:
        return address, number
    if world == 1:
        return "127.0.0.1", number
    # A step's list where Slurm started the ranks. mpirun starts helpers on the other machines by a step of its own, and
    # its ranks there would take the second machine for the first.
    nodes = (given.get("SLURM_STEP_NODELIST") if launcher is SLURM else None) or given.get("SLURM_JOB_NODELIST")
    if launcher is not OURS and nodes:
        return first_node(nodes), number
    if launcher is not OURS and any(given.get(name) == str(world) for name in launcher.local_world):
        return "127.0.0.1", number
    raise UserError(
        f"{launcher.rank} is set, MASTER_ADDR is not: set it to the machine of rank 0"
        + ("" if launcher is OURS else f" on all {world} processes (mpirun -x MASTER_ADDR=…)")
    )


def first_node(nodes: str) -> str:
    """The first machine of Slurm's list: `gpu[07-12,20],login1` is gpu07."""
    # A comma within brackets is not between machines.
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        raise UserError(f"Slurm's list of machines {nodes!r} cannot be read: set MASTER_ADDR")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])
