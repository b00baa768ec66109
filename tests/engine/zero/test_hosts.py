"""Several hosts asked over ssh: what is read of a hostfile, said of an answer, and a made-up ssh."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from convclip.engine.agreement import versions
from convclip.engine.zero.hosts import look_at_answer, read_hostfile
from tests.conftest import REPOSITORY

# Runs the command on this machine, in an environment of its own, as sshd does; one host is not there.
SSH = """#!/bin/sh
shift 4
host=$1
shift
[ "$host" = gone ] && { echo "ssh: connect to host gone port 22: No route to host" >&2; exit 255; }
exec env -i PATH=/usr/bin:/bin HOME="$HOME" sh -c "$*"
"""


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# ours\nworker-1 slots=8\n\n  10.0.0.7   slots=2  # the old one\nme@worker-2 slots=8\n")
    assert read_hostfile(path) == ["worker-1", "10.0.0.7", "me@worker-2"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("worker-1\n", "line 1 is 'worker-1', not one like"),
        ("worker-1 slots=8\n-oProxyCommand=x slots=1\n", "line 2 is '-oProxyCommand=x slots=1'"),
        ("worker-1;reboot slots=8\n", "line 1"),
        ("a slots=1\na slots=2\n", "line 2 names a again"),
        ("# none\n", "names no host"),
    ],
)
def test_a_line_that_is_none_is_named(tmp_path, text, words):
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(words)):
        read_hostfile(path)


def test_what_is_wrong_with_a_host_is_said_with_what_to_do():
    own, rows = versions(), []

    def add(what: str, value: str, problem: str | None = None) -> None:
        rows.append((what, value, problem))

    sound = {"host": "w1", "address": ["10.0.0.7"], "token": "t", "versions": own, "time": 100.0, "heard": 100.3}
    look_at_answer(add, "w1", sound, "t", own, Path("runs"))
    assert rows == [("host w1", "w1, 10.0.0.7, clock 0.3 s off", None)]
    rows.clear()
    other = {**own, "the version of torch": "1.0"}
    bad = {**sound, "time": 60.0, "token": "cannot read runs/x: No such file or directory", "versions": other}
    look_at_answer(add, "w2", bad, "t", own, Path("runs"))
    look_at_answer(add, "w3", {"failed": "Permission denied (publickey)."}, "t", own, Path("runs"))
    expected = ("clock of w2 is 40 s off", "w2 does not see", "w2 has the version of torch 1.0", "try `ssh w3 true`")
    for (*_, problem), words in zip(rows, expected, strict=True):
        assert words in problem


@pytest.mark.full
def test_the_doctor_asks_all_hosts(tmp_path):
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(SSH)
    ssh.chmod(0o755)
    (tmp_path / ".deepspeed_env").write_text("DS_ACCELERATOR=cpu\n")
    environment = {**os.environ, "PATH": f"{ssh.parent}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
    environment["HOME"] = str(tmp_path)

    def doctor(hosts: str) -> subprocess.CompletedProcess:
        (tmp_path / "hosts").write_text(hosts)
        given = ["tools/doctor.py", "--hostfile", str(tmp_path / "hosts"), "--shared", str(tmp_path)]
        command = [sys.executable, *given]
        return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)

    found = doctor("a slots=1\nb slots=1\n")
    assert "all-reduce of 100 MB" in found.stdout and "GB/s, by gloo, of 2" in found.stdout, found.stdout + found.stderr
    found = doctor("a slots=1\ngone slots=1\n")
    assert "problem: gone did not answer (ssh: connect to host gone port 22: No route to host)" in found.stdout
    assert "all-reduce" not in found.stdout and found.returncode == 1
    assert not list(tmp_path.glob(".doctor-*"))
    found = doctor("a\n")
    assert found.returncode == 2 and found.stderr.count("\n") == 1 and "line 1" in found.stderr
