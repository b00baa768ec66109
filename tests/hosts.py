"""Two machines made of one: network namespaces joined by a wire, each with its own name, home and, where asked, disk.

They need root, `ip` and `unshare`. Processes on a host are seen by `Host.popen`; whatever is left is killed at the end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import REPOSITORY

PREFIX = "convclip"


def why_not() -> str:
    """Why this machine cannot be two; empty where it can."""
    if os.geteuid() != 0:
        return "two hosts need root"
    missing = [name for name in ("ip", "unshare", "hostname") if shutil.which(name) is None]
    if missing:
        return f"two hosts need {', '.join(missing)} (Debian: apt install iproute2)"
    name = f"{PREFIX}-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return "" if made else "two hosts need network namespaces, which this machine does not let root make"


@dataclass
class Host:
    """One of the machines; `private` is a folder in whose place it has an empty one of its own."""

    name: str
    number: int
    home: Path
    private: Path | None = None

    @property
    def namespace(self) -> str:
        return f"{PREFIX}-{os.getpid()}-{self.number}"

    @property
    def address(self) -> str:
        return f"10.77.{os.getpid() % 200}.{self.number}"

    @property
    def wire(self) -> str:
        return f"cc{os.getpid() % 100000}-{self.number}"

    def popen(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        """Start a command on this host, at the repository's root, in a session of its own."""
        mounts = f"mount -t tmpfs none {self.private};" if self.private else ""
        inside = f'hostname {self.name}; {mounts} exec "$@"'
        return subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "--mount", "sh", "-c", inside, "sh", *command],
            cwd=REPOSITORY,
            env={
                **os.environ,
                "HOME": str(self.home),
                "GLOO_SOCKET_IFNAME": self.wire,
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def torchrun(self, nodes: int, *arguments: str, first: Host, port: int, ranks: int = 1) -> subprocess.Popen[str]:
        """`torchrun launch/train.py arguments`, as one of `nodes`; `first` is where rank 0 is."""
        return self.popen(
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", str(nodes)),
            *("--node_rank", str(self.number - first.number), "--nproc_per_node", str(ranks)),
            *("--master_addr", first.address, "--master_port", str(port), "launch/train.py", *arguments),
        )

    def wire_is(self, state: str) -> None:
        """Plug the wire in (`up`) or cut it (`down`)."""
        call("ip", "-n", self.namespace, "link", "set", self.wire, state)

    def slow_down(self) -> None:
        """A bad wire for what this host sends: late and with losses, or where the kernel has no netem, narrow."""
        place = ("tc", "-n", self.namespace, "qdisc", "replace", "dev", self.wire, "root")
        try:
            call(*place, "netem", "delay", "5ms", "loss", "1%")
        except subprocess.CalledProcessError:
            call(*place, "tbf", "rate", "20mbit", "burst", "32kbit", "latency", "20ms")

    def pids(self) -> list[int]:
        """Processes that run here."""
        return [int(pid) for pid in call("ip", "netns", "pids", self.namespace).split()]


def call(*command: str) -> str:
    """What a command prints; raises where it fails."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Two hosts, `alpha` and `beta`, that reach each other by name."""
    hosts = tuple(Host(name, number, folder / f"home-{name}") for number, name in enumerate(("alpha", "beta"), start=1))
    names = "127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in hosts)
    try:
        for host in hosts:
            # Homes of their own, but DeepSpeed's extension is not compiled anew in each.
            (host.home / ".cache").mkdir(parents=True)
            (host.home / ".cache" / "torch_extensions").symlink_to(Path.home() / ".cache" / "torch_extensions")
            call("ip", "netns", "add", host.namespace)
            # `ip netns exec` puts what lies there over /etc.
            own = Path("/etc/netns", host.namespace)
            own.mkdir(parents=True)
            (own / "hosts").write_text(names)
        one, two = hosts
        call("ip", "link", "add", one.wire, "netns", one.namespace, "type", "veth", "peer", two.wire, "netns",
             two.namespace)  # fmt: skip
        for host in hosts:
            call("ip", "-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", host.wire)
            call("ip", "-n", host.namespace, "link", "set", "lo", "up")
            host.wire_is("up")
        yield one, two
    finally:
        for host in hosts:
            with contextlib.suppress(subprocess.CalledProcessError):
                for pid in host.pids():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True, check=False)
            shutil.rmtree(Path("/etc/netns", host.namespace), ignore_errors=True)
