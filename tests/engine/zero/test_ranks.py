"""Which rank a process is, by the environments that launchers make (as their own documents show them)."""

from __future__ import annotations

import os

import pytest
import torch

from convclip.distributed import gather_objects
from convclip.engine.zero.ranks import Ranks, find_ranks, first_node, planned_world
from convclip.schema import UserError
from tests.processes import forked, free_port

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu1", "MASTER_PORT": "29500"}
# srun -N2 --ntasks-per-node=4; SLURM_NTASKS is the job's, the rest the step's.
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07,12]",
}
BATCH_SCRIPT = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "8",
}
# One helper of mpirun per node is started by srun.
ORTED = {**SLURM, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
ORTED |= {"SLURM_STEP_NODELIST": "gpu12", "SLURM_JOB_NODELIST": "gpu[07,12]"}


def without(given, *names):
    return {name: value for name, value in given.items() if name not in names}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (0, 1, 0, "127.0.0.1")),
        (TORCHRUN, (5, 8, 1, "gpu1")),
        (SLURM, (5, 8, 1, "gpu07")),
        ({**SLURM, "MASTER_ADDR": "10.0.0.1"}, (5, 8, 1, "10.0.0.1")),
        # srun --mpi=pmi2 says both; only Slurm counts within a machine.
        ({**SLURM, "PMI_RANK": "5", "PMI_SIZE": "8"}, (5, 8, 1, "gpu07")),
        ({**SLURM, **TORCHRUN}, (5, 8, 1, "gpu1")),
        # torchrun on each of two machines, started by srun.
        ({**ORTED, **TORCHRUN}, (5, 8, 1, "gpu1")),
        (OPEN_MPI, (5, 8, 1, "127.0.0.1")),
        # Their step leaves out the first machine; where mpirun runs there is none.
        ({**OPEN_MPI, **ORTED, "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, (5, 8, 1, "gpu07")),
        ({**OPEN_MPI, **BATCH_SCRIPT, "SLURM_JOB_NODELIST": "gpu[07,12]"}, (5, 8, 1, "gpu07")),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MASTER_ADDR": "a"}, (1, 2, 0, "a")),
        # One task, or a shell within a step of one.
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, (0, 1, 0, "127.0.0.1")),
        ({**BATCH_SCRIPT, "SLURM_NTASKS": "1"}, (0, 1, 0, "127.0.0.1")),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1, 0, "127.0.0.1")),
    ],
)
def test_the_rank_is_what_the_launcher_says(given, expected):
    found = find_ranks(given)
    assert (found.rank, found.world, found.local_rank, found.address) == expected
    assert found.port == int(given.get("MASTER_PORT", found.port)) and (found.port > 0) == (expected[1] > 1)


def test_ranks_of_a_job_meet_at_one_port_and_jobs_at_others():
    ports = {find_ranks({**SLURM, "SLURM_PROCID": str(rank)}).port for rank in range(8)}
    assert len(ports) == 1
    assert find_ranks({**SLURM, "SLURM_JOB_ID": "4712"}).port not in ports
    mpi = [{**OPEN_MPI, **ORTED}, {**OPEN_MPI, **BATCH_SCRIPT, "SLURM_JOB_NODELIST": "gpu[07,12]"}]
    assert len({find_ranks(given).port for given in mpi}) == 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (without(TORCHRUN, "WORLD_SIZE"), "RANK is set, WORLD_SIZE is not"),
        (without(TORCHRUN, "RANK"), "WORLD_SIZE is set, RANK is not"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK is set, RANK is not"),
        (without(TORCHRUN, "LOCAL_RANK"), "RANK is set, LOCAL_RANK is not"),
        (without(TORCHRUN, "MASTER_ADDR"), "RANK is set, MASTER_ADDR is not"),
        (without(TORCHRUN, "MASTER_PORT"), "RANK is set, MASTER_PORT is not"),
        ({**TORCHRUN, "RANK": "8"}, "RANK 8 is not below WORLD_SIZE 8"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK is '-1'"),
        ({**TORCHRUN, "WORLD_SIZE": "many"}, "WORLD_SIZE is 'many'"),
        ({**TORCHRUN, "WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({**TORCHRUN, "MASTER_PORT": "x"}, "MASTER_PORT is 'x'"),
        # Exported in a shell's start-up file, they would make eight runs of one process.
        (
            {**SLURM, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
            "WORLD_SIZE says 1 processes, but Slurm started 8",
        ),
        ({**OPEN_MPI, "RANK": "0", "WORLD_SIZE": "1"}, "but Open MPI started 8 (OMPI_COMM_WORLD_SIZE)"),
        (BATCH_SCRIPT, "Slurm's job has 8 tasks (SLURM_NTASKS), and this process is none of them"),
        ({"PMIX_RANK": "3"}, "PMIX_RANK is set, but nothing says of how many"),
        (
            {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4"},
            "MASTER_ADDR is not: set it to the machine of rank 0 on all 8",
        ),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MASTER_ADDR": "a"}, "PMI_RANK is set, MPI_LOCALRANKID is not"),
    ],
)
def test_what_is_partial_or_contradicts_itself_is_refused(given, words):
    with pytest.raises(UserError) as caught:
        find_ranks(given)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[07-12,20],login1", "gpu07"),
        ("gpu[3,1]-ib", "gpu3-ib"),
        ("rack[2-3]n[01-04]", "rack2n01"),
        ("a.example.org", "a.example.org"),
    ],
)
def test_the_first_machine_of_slurms_list(nodes, first):
    assert first_node(nodes) == first


def test_a_plan_is_for_the_world_size_that_is_said():
    assert planned_world({}) == 1 and planned_world({"WORLD_SIZE": "16"}) == 16 and planned_world(SLURM) == 8
    with pytest.raises(UserError, match="WORLD_SIZE is 'x'"):
        planned_world({"WORLD_SIZE": "x"})
    assert Ranks().environment()["MASTER_PORT"] == "0"


def join(given, results):
    """One task of srun."""
    from convclip.engine.zero.launcher import start_processes

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ.update(given)
    start_processes()
    results.put(gather_objects((torch.distributed.get_rank(), os.environ["LOCAL_RANK"])))
    torch.distributed.barrier()


@pytest.mark.launch
def test_tasks_of_srun_are_ranks_of_one_run():
    results, shared = forked().SimpleQueue(), {**SLURM, "SLURM_STEP_NUM_TASKS": "2", "MASTER_PORT": str(free_port())}
    shared["MASTER_ADDR"] = "127.0.0.1"
    tasks = []
    for number in ("0", "1"):
        given = {**shared, "SLURM_PROCID": number, "SLURM_LOCALID": number}
        tasks.append(forked().Process(target=join, args=(given, results)))
        tasks[-1].start()
    assert [results.get() for _ in tasks] == [[(0, "0"), (1, "1")]] * 2
    for task in tasks:
        task.join()
    assert [task.exitcode for task in tasks] == [0, 0]
