"""The address that the kernel tells of a network namespace, a real one."""

from __future__ import annotations

import ipaddress
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from agent.tremplin.info import ipv4_address

_BRIDGE = "ip link add {0} type bridge; ip link set {0} up; ip address add {1} dev {0}; "


def _found(setup: str) -> tuple[str, float]:
    """The address, and the seconds that it took to find it."""
    script = f"ip link set lo up; {setup}\necho ready; read -r line"
    with subprocess.Popen(
        ["unshare", "-n", "sh", "-ec", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as namespace:
        assert namespace.stdin is not None
        assert namespace.stdout is not None
        assert namespace.stdout.readline() == "ready\n"
        network = os.open(f"/proc/{namespace.pid}/ns/net", os.O_RDONLY)
        began = time.monotonic()
        with ThreadPoolExecutor(1) as thread:
            number = thread.submit(ipv4_address, network).result()
        took = time.monotonic() - began
        namespace.stdin.write("\n")
    return str(ipaddress.IPv4Address(number.to_bytes(4, "little"))), took


@pytest.mark.parametrize(
    ("setup", "expected"),
    [
        ("", "0.0.0.0"),
        (_BRIDGE.format("eth0", "100.115.92.43/24"), "100.115.92.43"),
        (_BRIDGE.format("docker0", "172.17.0.1/16"), "172.17.0.1"),
        (
            _BRIDGE.format("docker0", "10.17.0.1/16")
            + _BRIDGE.format("eth0", "100.115.92.43/24")
            + "ip route add default via 100.115.92.1; ip address add 127.0.0.9/8 dev lo",
            "100.115.92.43",
        ),
    ],
)
def test_the_address_is_that_of_eth0(setup: str, expected: str) -> None:
    assert _found(setup)[0] == expected


def test_many_routes() -> None:
    """A container makes as many as it likes, and nobody waits for that."""
    routes = (
        "for a in $(seq 0 99); do for b in $(seq 0 255); do "
        "echo route add local 10.0.$a.$b/32 dev lo; done; done | ip -batch -"
    )
    address, took = _found(_BRIDGE.format("eth0", "100.115.92.43/24") + routes)
    assert address == "100.115.92.43"
    assert took < 1
