"""What starting the processes of a run leaves on the machine."""

from pathlib import Path

import pytest

from tests.engine.small_run import launch, run

START = """
from convclip.engine.zero.launcher import start_processes

start_processes()
"""


def shared_memory() -> set[str]:
    """Names of DeepSpeed's buffers in shared memory."""
    return {path.name for path in Path("/dev/shm").glob("deepspeed_*")}


@pytest.mark.launch
def test_ranks_under_the_launcher_leave_no_shared_memory_behind(tmp_path):
    script = tmp_path / "start.py"
    script.write_text(START)
    before = shared_memory()
    done = run(launch(2, str(script)))
    assert done.returncode == 0, done.stdout + done.stderr
    assert shared_memory() <= before
