"""The address in what the kernel prints of a network namespace, where there is a real one."""

from __future__ import annotations

import ipaddress
import subprocess

import pytest

from agent.tremplin.info import ipv4_address

_PRINT = "cat /proc/self/net/fib_trie; echo ====; cat /proc/self/net/route"
_BRIDGE = "ip link add {0} type bridge; ip link set {0} up; ip address add {1} dev {0}; "


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
    done = subprocess.run(
        ["unshare", "-n", "sh", "-ec", f"ip link set lo up; {setup}\n{_PRINT}"],
        check=True,
        capture_output=True,
        text=True,
    )
    fib_trie, route = done.stdout.split("====\n")
    found = ipv4_address(fib_trie, route)
    assert found == int.from_bytes(ipaddress.IPv4Address(expected).packed, "little")
