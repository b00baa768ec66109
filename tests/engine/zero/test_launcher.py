"""What starting the processes of a run leaves on the machine."""

from pathlib import Path

import pytest

from convclip.engine.zero import launcher
from tests.processes import launch, run

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


def test_a_build_is_announced_on_rank_0_where_it_will_happen(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launcher, "_extension_folder", lambda name: tmp_path)
    for rank, said in (("1", False), ("0", True)):
        monkeypatch.setenv("RANK", rank)
        launcher._announce_build()
        assert ("compiling DeepSpeed's CPU extension" in (out := capsys.readouterr().out)) == said, out
    assert "30 to 60 s" in out and str(tmp_path) in out
    (tmp_path / "deepspeed_shm_comm.so").touch()
    launcher._announce_build()
    assert capsys.readouterr().out == ""
