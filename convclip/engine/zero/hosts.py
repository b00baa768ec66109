"""What the hosts of a hostfile say of themselves, asked over ssh as the deepspeed launcher starts them."""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from convclip.engine.agreement import versions
from convclip.engine.zero import host_report

# What is looked at, what was found, and what is wrong with it and what to do, if anything.
Add = Callable[..., None]
# Names that ssh takes for a host, and for nothing else.
HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:@-]*")
# What the deepspeed launcher hands on to other hosts; all else has to stand in .deepspeed_env.
HANDED_ON = ("MLFLOW", "PYTHON", "MV2", "UCX")
SSH_SECONDS, HOST_SECONDS, CLOCK_SECONDS = 10, 120, 5.0


def read_hostfile(path: Path) -> list[str]:
    """Host names of lines such as `worker-1 slots=8`. ValueError names a line that is none, or a name given twice."""
    hosts: list[str] = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.split("#")[0].strip():
            continue
        name, _, slots = line.split("#")[0].strip().partition(" ")
        if not HOST.fullmatch(name) or not re.fullmatch(r"slots=[0-9]+", slots.strip()):
            raise ValueError(f"line {number} is {line!r}, not one like `worker-1 slots=8`")
        if name in hosts:
            raise ValueError(f"line {number} names {name} again")
        hosts.append(name)
    if not hosts:
        raise ValueError("it names no host")
    return hosts


def look_at_hosts(add: Add, hosts: list[str], shared: Path) -> None:
    """What each host says of itself, compared with this machine; and all of them talking."""
    print(f"asking {len(hosts)} hosts over ssh", flush=True)
    if shutil.which("pdsh") is None:
        add(
            "pdsh",
            "none",
            "pdsh is not installed, deepspeed --hostfile starts hosts with it (Debian: apt install pdsh)",
        )
    file, token, own = shared.resolve() / f".doctor-{secrets.token_hex(8)}", secrets.token_hex(8), versions()
    try:
        file.write_text(token)
        with ThreadPoolExecutor(len(hosts)) as pool:
            answers = list(pool.map(lambda host: ask(host, ["report", str(file)]), hosts))
    except OSError as error:
        add(f"shared {shared}", "cannot be written", f"--shared {shared} cannot be written: {error.strerror}")
        return
    finally:
        file.unlink(missing_ok=True)
    for host, answer in zip(hosts, answers, strict=True):
        look_at_answer(add, host, answer, token, own, shared)
    if len(hosts) > 1 and not any("failed" in answer for answer in answers):
        look_at_all_reduce(add, hosts, answers[0])


def look_at_answer(add: Add, host: str, answer: dict[str, Any], token: str, own: dict[str, str], shared: Path) -> None:
    """One row for a host, and what is wrong with it."""
    if "failed" in answer:
        advice = f"try `ssh {host} true`; it must need no password, and find {sys.executable} and {Path.cwd()} there"
        add(f"host {host}", "no answer", f"{host} did not answer ({answer['failed']}): {advice}")
        return
    off = abs(answer["heard"] - answer["time"])
    late = f"the clock of {host} is {off:.0f} s off this one's: run an NTP client on both"
    address = (answer["address"] or ["no address"])[0]
    add(f"host {host}", f"{answer['host']}, {address}, clock {off:.1f} s off", late if off > CLOCK_SECONDS else None)
    if answer["token"] != token:
        said = answer["token"] or "an empty file"
        add(
            f"its view of {shared}",
            "another folder",
            f"{host} does not see what this machine wrote into --shared {shared} ({said}): a run needs a folder that "
            "all hosts share",
        )
    theirs = answer["versions"]
    differ = [f"{name} {theirs.get(name)}, here {value}" for name, value in own.items() if theirs.get(name) != value]
    if differ:
        add("its software", "differs", f"{host} has {'; '.join(differ)}: install the same on all hosts")


def look_at_all_reduce(add: Add, hosts: list[str], first: dict[str, Any]) -> None:
    """100 MB summed over the hosts, one process on each."""
    where = [str(len(hosts)), first["address"][0] if first["address"] else hosts[0], str(first["port"])]
    with ThreadPoolExecutor(len(hosts)) as pool:
        numbered = list(enumerate(hosts))
        answers = list(pool.map(lambda one: ask(one[1], ["reduce", str(one[0]), *where]), numbered))
    failed = [(host, answer["failed"]) for host, answer in zip(hosts, answers, strict=True) if "failed" in answer]
    if failed:
        add(
            "all-reduce of 100 MB",
            "failed",
            f"the hosts cannot talk ({failed[0][0]}: {failed[0][1]}): open their ports to each other, and name the "
            "network's interface in .deepspeed_env (NCCL_SOCKET_IFNAME=…, GLOO_SOCKET_IFNAME=…)",
        )
        return
    seconds = max(answer["seconds"] for answer in answers)
    add(
        "all-reduce of 100 MB",
        f"{seconds:.2f} s, {0.1 / seconds:.2f} GB/s, by {answers[0]['backend']}, of {len(hosts)}",
    )


def ask(host: str, arguments: list[str]) -> dict[str, Any]:
    """What host_report.py says on a host, `heard` at this moment; or why it `failed`."""
    handed_on = [f"{name}={value}" for name, value in os.environ.items() if name.startswith(HANDED_ON)]
    for folder in (Path.home(), Path.cwd()):
        if (folder / ".deepspeed_env").is_file():
            handed_on += [line for line in (folder / ".deepspeed_env").read_text().splitlines() if "=" in line]
    words = ["env", *handed_on, sys.executable, "-m", host_report.__name__, *arguments]
    command = [
        "ssh",
        "-o",
        "BatchMode=yes",
        "-o",
        f"ConnectTimeout={SSH_SECONDS}",
        host,
        f"cd {shlex.quote(os.getcwd())} && {shlex.join(words)}",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=HOST_SECONDS, check=False)
        return {**json.loads(done.stdout.splitlines()[-1]), "heard": time.time()}
    except subprocess.TimeoutExpired:
        return {"failed": f"nothing within {HOST_SECONDS} s"}
    except FileNotFoundError:
        return {"failed": "ssh is not installed"}
    except (ValueError, IndexError):
        return {"failed": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
