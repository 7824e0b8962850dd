"""What maitred checks before it changes anything, and what it makes of requests."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path

import pytest

from agent.maitred import ipv4, mounts, processes, resolv_conf, startup, termina
from agent.maitred.errors import BadRequest
from agent.option_table import ALL
from agent.options import UnixAddress, VsockAddress, parse
from agent.pb import vm_guest_pb2


def fixed32(address: str) -> int:
    return int.from_bytes(ipaddress.IPv4Address(address).packed, "little")


def _config(address: str, netmask: str, gateway: str) -> vm_guest_pb2.IPv4Config:
    return vm_guest_pb2.IPv4Config(
        address=fixed32(address), netmask=fixed32(netmask), gateway=fixed32(gateway)
    )


def test_the_bytes_of_an_address_on_the_wire_read_as_it_is_written() -> None:
    config = _config("100.64.1.1", "255.255.255.252", "100.64.1.2")
    assert bytes([0x0D, 100, 64, 1, 1]) in config.SerializeToString()
    checked = ipv4.check_config(config)
    assert str(checked) == "100.64.1.1/30 via 100.64.1.2"


@pytest.mark.parametrize(
    ("address", "netmask", "gateway"),
    [
        ("10.0.0.1", "255.255.255.254", "10.0.0.0"),  # RFC 3021
        ("10.0.0.1", "255.0.0.0", "10.255.255.254"),
        ("192.168.1.255", "255.255.0.0", "192.168.0.1"),
    ],
)
def test_unusual_but_good_configurations(address: str, netmask: str, gateway: str) -> None:
    ipv4.check_config(_config(address, netmask, gateway))


@pytest.mark.parametrize(
    ("address", "netmask", "gateway", "why"),
    [
        ("0.0.0.0", "255.255.255.0", "10.0.0.1", "address is zero"),
        ("10.0.0.2", "0.0.0.0", "10.0.0.1", "netmask is zero"),
        ("10.0.0.2", "255.255.255.0", "0.0.0.0", "gateway is zero"),
        ("10.0.0.2", "255.0.255.0", "10.0.0.1", "has holes"),
        ("10.0.0.2", "0.0.0.255", "10.0.0.1", "has holes"),
        ("10.0.0.2", "255.255.255.0", "10.0.1.1", "outside of 10.0.0.0/24"),
        ("10.0.0.2", "255.255.255.255", "10.0.0.1", "outside of 10.0.0.2/32"),
        ("10.0.0.2", "255.255.255.0", "10.0.0.2", "gateway and address are both"),
        ("10.0.0.0", "255.255.255.0", "10.0.0.1", "not the address of a machine in"),
        ("10.0.0.255", "255.255.255.0", "10.0.0.1", "not the address of a machine in"),
        ("10.0.0.2", "255.255.255.0", "10.0.0.255", "not the address of a machine in"),
        ("127.0.0.2", "255.0.0.0", "127.0.0.1", "not the address of a machine"),
        ("224.0.0.2", "255.0.0.0", "224.0.0.1", "not the address of a machine"),
        ("0.0.0.2", "255.0.0.0", "0.0.0.1", "not the address of a machine"),
    ],
)
def test_bad_configurations(address: str, netmask: str, gateway: str, why: str) -> None:
    with pytest.raises(BadRequest, match=r"^cannot configure the network: ") as caught:
        ipv4.check_config(_config(address, netmask, gateway))
    assert why in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        *("", "100.115.92.1", "100.115.92.1/", "100.115.92.1/33", "100.115.92.0/24"),
        *("100.115.92.255/24", "100.115.92.1/30", "100.115.92.1/7", "127.0.0.1/24"),
        *("224.0.0.1/24", "fd00::1/64", "a.b.c.d/24", "100.115.92.1/24 ", "1.2.3.4/255.255.0.0x"),
        *("169.254.1.1/24", "0.1.2.3/24", "010.1.1.1/24"),
    ],
)
def test_bad_subnets(text: str) -> None:
    with pytest.raises(BadRequest, match=r"^cannot use the subnet for containers: "):
        ipv4.check_bridge_subnet(text)


def test_good_subnets() -> None:
    assert str(ipv4.check_bridge_subnet("100.115.92.1/24")) == "100.115.92.1/24"
    assert str(ipv4.check_bridge_subnet("10.0.0.193/28")) == "10.0.0.193/28"


def test_resolv_conf_is_what_the_resolver_reads() -> None:
    config = vm_guest_pb2.ResolvConfig(
        nameservers=["9.9.9.9", "fe80::1%eth0"], search_domains=["lan", "_x.example.org."]
    )
    assert resolv_conf.content(config) == (
        "nameserver 9.9.9.9\nnameserver fe80::1%eth0\nsearch lan _x.example.org.\n"
    )
    assert resolv_conf.content(vm_guest_pb2.ResolvConfig()) == ""


@pytest.mark.parametrize("server", ["", "localhost", "1.2.3", "1.2.3.4\n", "fe80::1%a b", "::1%\n"])
def test_bad_name_servers(server: str) -> None:
    with pytest.raises(BadRequest, match="is not an IP address"):
        resolv_conf.content(vm_guest_pb2.ResolvConfig(nameservers=[server]))


@pytest.mark.parametrize(
    "domain", ["", ".", "a..b", "-a", "a-", "a b", "a\nnameserver 1.2.3.4", "ü.de", "x" * 64]
)
def test_bad_search_domains(domain: str) -> None:
    with pytest.raises(BadRequest, match="is not a domain name"):
        resolv_conf.content(vm_guest_pb2.ResolvConfig(search_domains=[domain]))


def test_resolv_conf_is_replaced_where_a_link_points(tmp_path: Path) -> None:
    real, link = tmp_path / "run" / "resolv.conf", tmp_path / "resolv.conf"
    link.symlink_to(real)
    resolv_conf.replace(str(link), "nameserver 1.1.1.1\n")
    before = real.stat().st_ino
    resolv_conf.replace(str(link), "nameserver 9.9.9.9\n")
    assert link.is_symlink()
    assert real.read_text() == "nameserver 9.9.9.9\n"
    assert real.stat().st_ino != before, "a reader could have seen half of it"
    assert real.stat().st_mode & 0o777 == 0o644
    assert os.listdir(tmp_path / "run") == ["resolv.conf"]


@pytest.mark.parametrize(
    "request_",
    [
        vm_guest_pb2.LaunchProcessRequest(),
        vm_guest_pb2.LaunchProcessRequest(argv=[""]),
        vm_guest_pb2.LaunchProcessRequest(argv=["a"], respawn=True, wait_for_exit=True),
        vm_guest_pb2.LaunchProcessRequest(argv=["a", "\0"]),
        vm_guest_pb2.LaunchProcessRequest(argv=["a"], env={"": "x"}),
        vm_guest_pb2.LaunchProcessRequest(argv=["a"], env={"A=": "x"}),
        vm_guest_pb2.LaunchProcessRequest(argv=["a"], env={"A": "\0"}),
    ],
)
def test_bad_launches(request_: vm_guest_pb2.LaunchProcessRequest) -> None:
    with pytest.raises(BadRequest, match=r"^cannot launch a process: "):
        processes.check_launch(request_)


def test_only_the_program_of_a_process_is_ever_named() -> None:
    assert processes.program_name("/usr/bin/lxc") == "lxc"
    assert processes.program_name("dir/") == "dir/"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], VsockAddress(7777, 2)),
        (["maitred.listen_port=9000"], VsockAddress(9000, 2)),
        (["maitred.startup_listener=vsock:2:7000"], VsockAddress(7000, 2)),
        (
            ["maitred.startup_listener=vsock:9:7000", "maitred.listen_port=9000"],
            VsockAddress(9000, 9),
        ),
        (["maitred.listen=unix:/a"], None),
        (["maitred.listen=unix:/a", "maitred.listen_port=9000"], None),
        (
            ["maitred.listen=unix:/a", "maitred.startup_listener=unix:/b"],
            UnixAddress("/b"),
        ),
    ],
)
def test_where_the_host_is_told(words: list[str], expected: object) -> None:
    assert startup.startup_listener(parse(words, ALL)) == expected


def test_the_stateful_device_has_a_default_and_is_a_path() -> None:
    assert termina.check_device("") == "/dev/vdb"
    assert termina.check_device("/dev/vdc") == "/dev/vdc"
    for bad in ("vdb", "./vdb", "/dev/v\0db"):
        with pytest.raises(BadRequest, match="not an absolute path"):
            termina.check_device(bad)


def test_mount_requests_that_no_kernel_takes() -> None:
    for bad in (
        vm_guest_pb2.MountRequest(target="/a", options="x" * 4096),
        vm_guest_pb2.MountRequest(target="/a\0b"),
        vm_guest_pb2.MountRequest(target="/a", permissions=0o10000),
        vm_guest_pb2.MountRequest(),
    ):
        with pytest.raises(OSError, match=r"."):
            mounts.check(bad)
