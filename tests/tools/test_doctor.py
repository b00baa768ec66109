"""The doctor's table on this machine, and each trouble it must name, made by hand."""

import collections
import os
import subprocess
import sys
from pathlib import Path

import pytest

from convclip.engine.zero.accelerator import find_devices
from tools import doctor

SCRIPT = Path(doctor.__file__)


def test_it_prints_the_table_and_no_problem_of_its_own():
    result = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False)
    assert result.stderr == "" and "Traceback" not in result.stdout
    for row in ("python ", "torch ", "C++ compiler", "precisions", "two processes"):
        assert row in result.stdout
    assert "talk over gloo" in result.stdout
    assert result.returncode == (1 if "problem: " in result.stdout else 0)


def test_devices_are_what_the_accelerator_says():
    devices = find_devices()
    assert devices.kind == os.environ["DS_ACCELERATOR"] and devices.count >= 1 and devices.memory > 2**28
    assert devices.precisions[0] == "fp32" and "bf16" in devices.precisions


@pytest.fixture
def findings():
    return doctor.Findings()


def test_versions_are_compared_with_the_constraints(findings, tmp_path):
    constraints = tmp_path / "constraints.txt"
    constraints.write_text('# tested\n\ntorch==0.0.1; python_version >= "3.11"\nno-such-package==1.0\n')
    doctor.look_at_packages(findings, constraints)
    (_, torch), (_, absent) = findings.rows
    assert "(tested with 0.0.1)" in torch and absent == "not installed"
    assert len(findings.problems) == 1 and "no-such-package is not installed: pip install" in findings.problems[0]


def test_a_missing_compiler_and_ninja_are_named(findings, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "g++-of-nowhere")
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda name: str(tmp_path))
    doctor.look_at_compiler(findings)
    compiler, headers, ninja = findings.problems
    assert "'g++-of-nowhere'" in compiler and "apt install g++" in compiler
    assert "Python.h is missing" in headers and "activate" in ninja


def test_little_room_is_named(findings, monkeypatch, tmp_path):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(2**30, 2**30, 2**25))
    monkeypatch.setattr(doctor.os, "sysconf", lambda name: 2**15)
    monkeypatch.setattr(doctor.os.path, "isdir", lambda path: True)
    doctor.look_at_memory_and_disk(findings, tmp_path)
    memory, disk, shared = findings.problems
    assert "batch.global" in memory and str(tmp_path) in disk and "--shm-size" in shared


def test_processes_that_do_not_meet_are_one_line(findings, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("process 0 terminated\n\nTraceback\n  gloo: no route to host")

    monkeypatch.setattr("torch.multiprocessing.spawn", fail)
    doctor.look_at_two_processes(findings)
    assert findings.rows == [("two processes", "failed")]
    assert "no route to host" in findings.problems[0] and "\n" not in findings.problems[0]


def test_problems_set_the_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "look_at_two_processes", lambda findings: findings.add("x", "y", "x is wrong: do z"))
    monkeypatch.setattr(doctor, "look_at_packages", lambda findings, constraints: None)
    assert doctor.main([]) == 1
    assert "problem: x is wrong: do z" in capsys.readouterr().out
