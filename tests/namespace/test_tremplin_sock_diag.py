"""What the kernel says of listening sockets in other network namespaces."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from agent.tremplin.sock_diag import listening_ports

if TYPE_CHECKING:
    from collections.abc import Iterator

_LISTEN = """
import socket, subprocess, sys
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
def listen(family, address, port, only=0):
    s = socket.socket(family, socket.SOCK_STREAM)
    if family == socket.AF_INET6:
        s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
    s.bind((address, port))
    s.listen()
    return s
kept = [
    listen(socket.AF_INET, "127.0.0.1", 4001),
    listen(socket.AF_INET, "0.0.0.0", 443),
    listen(socket.AF_INET6, "::", 4003),
    listen(socket.AF_INET6, "::", 4004, 1),
    listen(socket.AF_INET6, "::1", 4005),
    listen(socket.AF_INET6, "::ffff:127.0.0.1", 4006),
    *(listen(socket.AF_INET, "0.0.0.0", port) for port in range(5000, 5900)),
]
kept.append(socket.create_connection(("127.0.0.1", 4001)))
print("ready", flush=True)
sys.stdin.read()
"""


def _network(script: str) -> Iterator[str]:
    # The namespace, as a path.
    with subprocess.Popen(
        ["unshare", "-n", sys.executable, "-c", script],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        assert child.stdout is not None
        assert child.stdin is not None
        assert child.stdout.readline() == "ready\n"
        yield f"/proc/{child.pid}/ns/net"
        child.stdin.close()


@pytest.fixture
def busy() -> Iterator[str]:
    """A network namespace in which much listens."""
    yield from _network(_LISTEN)


@pytest.fixture
def silent() -> Iterator[str]:
    """One in which nothing does."""
    yield from _network('import sys; print("ready", flush=True); sys.stdin.read()')


def test_ports(busy: str, silent: str) -> None:
    """Those that IPv4 clients reach, of each namespace; the caller is where it was."""
    before = os.readlink("/proc/thread-self/ns/net")
    descriptors = len(os.listdir("/proc/self/fd"))
    networks = {
        name: os.open(path, os.O_RDONLY) for name, path in (("busy", busy), ("silent", silent))
    }
    found = listening_ports(networks)
    assert found == {"busy": [443, 4001, 4003, 4006, *range(5000, 5900)]}
    assert os.readlink("/proc/thread-self/ns/net") == before
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_not_a_namespace() -> None:
    """An error, nothing left open, and the caller is where it was."""
    before = os.readlink("/proc/thread-self/ns/net")
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="Invalid argument"):
        listening_ports({"none": os.open("/dev/null", os.O_RDONLY)})
    assert os.readlink("/proc/thread-self/ns/net") == before
    assert len(os.listdir("/proc/self/fd")) == descriptors
