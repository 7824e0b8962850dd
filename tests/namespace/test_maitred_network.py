"""ConfigureNetwork on a veth in a network namespace, through the kernel's own netlink."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc

from agent.pb import vm_guest_pb2
from tests.namespace.vm_in_namespaces import Vm, fixed32, in_vm, refusal

if TYPE_CHECKING:
    from pathlib import Path

VETH = "ip link add eth0 type veth peer name peer0; ip link set peer0 up"


def _request(
    address: str = "100.64.1.1",
    netmask: str = "255.255.255.252",
    gateway: str = "100.64.1.2",
    resolv_config: vm_guest_pb2.ResolvConfig | None = None,
) -> vm_guest_pb2.NetworkConfigRequest:
    return vm_guest_pb2.NetworkConfigRequest(
        ipv4_config=vm_guest_pb2.IPv4Config(
            address=fixed32(address), netmask=fixed32(netmask), gateway=fixed32(gateway)
        ),
        resolv_config=resolv_config,
    )


def _state(vm: Vm, interface: str = "eth0") -> tuple[Any, ...]:
    (link,) = vm.ip("-4", "addr", "show", "dev", interface) or [{}]
    addresses = [
        (address["local"], address["prefixlen"], address.get("broadcast"))
        for address in link.get("addr_info", [])
    ]
    routes = [
        (route["dst"], route.get("gateway"), route.get("dev")) for route in vm.ip("-4", "route")
    ]
    return addresses, sorted(routes, key=str)


def test_address_route_links_and_forwarding_are_set(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        await vm.maitred.ConfigureNetwork(_request())
        assert _state(vm) == (
            [("100.64.1.1", 30, "100.64.1.3")],
            [("100.64.1.0/30", None, "eth0"), ("default", "100.64.1.2", "eth0")],
        )
        (route,) = vm.ip("-4", "route", "get", "8.8.8.8")
        assert (route["gateway"], route["dev"]) == ("100.64.1.2", "eth0")
        for name in ("lo", "eth0"):
            (link,) = vm.ip("link", "show", "dev", name)
            assert "UP" in link["flags"]
        for key, value in (
            ("net.ipv4.ip_forward", "1"),
            ("net.ipv6.conf.all.forwarding", "1"),
            ("net.ipv6.conf.eth0.accept_ra", "2"),
        ):
            assert vm.inside("cat", "/proc/sys/" + key.replace(".", "/")).strip() == value

    in_vm(tmp_path, scenario, before=VETH)


def test_a_second_call_leaves_nothing_of_the_first_behind(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        await vm.maitred.ConfigureNetwork(_request())
        vm.inside("ip", "addr", "add", "100.64.1.9/30", "dev", "eth0")
        vm.inside("ip", "route", "add", "default", "via", "100.64.1.2", "metric", "77")
        await vm.maitred.ConfigureNetwork(_request("10.9.0.7", "255.255.0.0", "10.9.255.254"))
        expected = (
            [("10.9.0.7", 16, "10.9.255.255")],
            [("10.9.0.0/16", None, "eth0"), ("default", "10.9.255.254", "eth0")],
        )
        assert _state(vm) == expected
        await vm.maitred.ConfigureNetwork(_request("10.9.0.7", "255.255.0.0", "10.9.255.254"))
        assert _state(vm) == expected

    in_vm(tmp_path, scenario, before=VETH)


def test_a_change_within_one_network_keeps_only_the_new_address(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        await vm.maitred.ConfigureNetwork(_request("10.9.0.7", "255.255.255.0", "10.9.0.1"))
        await vm.maitred.ConfigureNetwork(_request("10.9.0.8", "255.255.255.0", "10.9.0.1"))
        assert _state(vm) == (
            [("10.9.0.8", 24, "10.9.0.255")],
            [("10.9.0.0/24", None, "eth0"), ("default", "10.9.0.1", "eth0")],
        )

    in_vm(tmp_path, scenario, before=VETH)


def test_when_the_last_step_fails_the_configuration_before_is_in_force(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        await vm.maitred.ConfigureNetwork(_request())
        for words in (
            "addr add 172.16.0.8/16 dev eth0",
            "addr add 172.16.0.9/16 dev eth0",
            "route add 192.168.7.0/24 via 172.16.0.1 metric 5",
            "route add default via 172.16.0.2 metric 9",
        ):
            vm.inside("ip", *words.split())
        was = _state(vm)
        (tmp_path / "resolv.conf").mkdir()
        servers = vm_guest_pb2.ResolvConfig(nameservers=["1.1.1.1"])
        code, details = await refusal(
            vm.maitred.ConfigureNetwork(
                _request("10.1.0.2", "255.255.255.0", "10.1.0.1", resolv_config=servers)
            )
        )
        assert code is grpc.StatusCode.INTERNAL
        assert "cannot configure eth0 as 10.1.0.2/24 via 10.1.0.1: " in details
        assert _state(vm) == was
        assert list((tmp_path / "resolv.conf").parent.glob("resolv.conf.*")) == []

    in_vm(tmp_path, scenario, before=VETH)


def test_bad_requests_change_nothing(tmp_path: Path) -> None:
    bad = [
        (_request(address="0.0.0.0"), "address is zero"),
        (_request(netmask="0.0.0.0"), "netmask is zero"),
        (_request(gateway="0.0.0.0"), "gateway is zero"),
        (vm_guest_pb2.NetworkConfigRequest(), "address is zero"),
        (_request(netmask="255.0.255.0"), "has holes"),
        (_request(gateway="100.64.2.2"), "outside of"),
        (
            _request(resolv_config=vm_guest_pb2.ResolvConfig(nameservers=["example"])),
            "not an IP address",
        ),
    ]

    async def scenario(vm: Vm) -> None:
        await vm.maitred.ConfigureNetwork(_request())
        was = _state(vm)
        for request, why in bad:
            code, details = await refusal(vm.maitred.ConfigureNetwork(request))
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert why in details
            assert _state(vm) == was

    in_vm(tmp_path, scenario, before=VETH)


def test_without_the_interface_the_call_waits_for_nothing_and_it_can_come_later(
    tmp_path: Path,
) -> None:
    async def scenario(vm: Vm) -> None:
        code, details = await refusal(vm.maitred.ConfigureNetwork(_request()))
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert details == "cannot configure the network: there is no interface net7"
        vm.inside("ip", "link", "add", "net7", "type", "veth", "peer", "name", "peer7")
        await vm.maitred.ConfigureNetwork(_request())
        assert _state(vm, "net7")[0] == [("100.64.1.1", 30, "100.64.1.3")]

    in_vm(tmp_path, scenario, options=["maitred.interface=net7"])


def test_name_servers_are_written(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        config = vm_guest_pb2.ResolvConfig(
            nameservers=["9.9.9.9", "2620:fe::fe"], search_domains=["lan", "example.org"]
        )
        await vm.maitred.ConfigureNetwork(_request(resolv_config=config))
        assert (vm.directory / "resolv.conf").read_text() == (
            "nameserver 9.9.9.9\nnameserver 2620:fe::fe\nsearch lan example.org\n"
        )
        await vm.maitred.ConfigureNetwork(_request())
        assert (vm.directory / "resolv.conf").read_text().startswith("nameserver 9.9.9.9\n")

    in_vm(tmp_path, scenario, before=VETH)
