"""IPv4 addresses as they stand in requests, checked before anything is changed. No system calls."""

from __future__ import annotations

import ipaddress

from agent.maitred.errors import BadRequest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agent.pb import vm_guest_pb2


def from_fixed32(value: int) -> ipaddress.IPv4Address:
    """The address in a fixed32 that holds network byte order: on the little-endian machines that
    the wire was made for, its bytes in memory read a.b.c.d.
    """
    return ipaddress.IPv4Address(value.to_bytes(4, "little"))


class InterfaceConfig:
    """What ConfigureNetwork asks for, in one piece and consistent.

    interface: address and prefix length; gateway: a neighbour in that network.
    """

    __slots__ = ("gateway", "interface")

    def __init__(self, interface: ipaddress.IPv4Interface, gateway: ipaddress.IPv4Address) -> None:
        self.interface = interface
        self.gateway = gateway

    def __str__(self) -> str:
        return f"{self.interface} via {self.gateway}"


def check_config(config: vm_guest_pb2.IPv4Config) -> InterfaceConfig:
    """The configuration in a request. Raises BadRequest."""
    try:
        return _check_config(config)
    except BadRequest as error:
        raise BadRequest(f"cannot configure the network: {error}") from None


def _check_config(config: vm_guest_pb2.IPv4Config) -> InterfaceConfig:
    for what, value in (
        ("address", config.address),
        ("netmask", config.netmask),
        ("gateway", config.gateway),
    ):
        if value == 0:
            raise BadRequest(f"{what} is zero")
    address, gateway = from_fixed32(config.address), from_fixed32(config.gateway)
    interface = ipaddress.IPv4Interface((address, _prefix_length(from_fixed32(config.netmask))))
    for what, one in (("address", address), ("gateway", gateway)):
        if not _is_of_a_machine(one, interface.network):
            raise BadRequest(f"{what} {one} is not the address of a machine in {interface.network}")
    if gateway not in interface.network:
        raise BadRequest(f"gateway {gateway} is outside of {interface.network}")
    if gateway == address:
        raise BadRequest(f"gateway and address are both {address}")
    return InterfaceConfig(interface, gateway)


def _prefix_length(netmask: ipaddress.IPv4Address) -> int:
    holes = int(netmask) ^ 0xFFFFFFFF
    if holes & (holes + 1):
        raise BadRequest(f"netmask {netmask} has holes")
    return 32 - holes.bit_length()


def _is_of_a_machine(address: ipaddress.IPv4Address, network: ipaddress.IPv4Network) -> bool:
    if address.is_multicast or address.is_loopback or address.is_reserved:
        return False
    if int(address) >> 24 == 0:  # RFC 1122, 3.2.1.3: "this" network
        return False
    # What stands for the network, or for everybody in it; RFC 3021: in a /31, neither does.
    return network.prefixlen >= 31 or address not in {
        network.network_address,
        network.broadcast_address,
    }


def check_bridge_subnet(text: str) -> ipaddress.IPv4Interface:
    """The address of the containers' bridge, `a.b.c.d/n`, with room for containers beside it.

    Raises BadRequest: not of that form, no address of a machine, or too small or large a network.
    """
    what = "cannot use the subnet for containers"
    if not text:
        raise BadRequest(f"{what}: lxd_ipv4_subnet is empty")
    try:
        if "/" not in text:
            raise ValueError("no prefix length")  # ipaddress would take it for a /32
        interface = ipaddress.IPv4Interface(text)
    except ValueError:
        raise BadRequest(f"{what}: {text!r} is not of the form a.b.c.d/n") from None
    address = interface.ip
    if not 8 <= interface.network.prefixlen <= 29:
        raise BadRequest(f"{what}: prefix length of {text} is not from 8 to 29")
    if address.is_link_local or not _is_of_a_machine(address, interface.network):
        raise BadRequest(f"{what}: {address} in {text} is not the address of a machine")
    return interface
