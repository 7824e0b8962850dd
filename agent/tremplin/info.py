"""GetContainerInfo: whether a container runs, and at which address.

Hosts ask again and again until the container has its address, while it boots. LXD's own answer
starts a process in the container's network each time; what /proc says costs nothing.
"""

from __future__ import annotations

import ipaddress
import itertools
import sys

from agent.pb import tremplin_pb2 as pb

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agent.tremplin.session import Session

_INTERFACE = "eth0"
"""The one that LXD gives to containers; their own bridges have addresses too."""


async def container_info(session: Session, container: str) -> pb.GetContainerInfoResponse:
    """The answer to GetContainerInfo. Raises LxdError."""
    instance = await session.instance(container)
    if instance is None:
        return pb.GetContainerInfoResponse(
            status=pb.GetContainerInfoResponse.NOT_FOUND,
            failure_reason=f"cannot look at container {container}: there is no such container",
        )
    if instance["status"] == "Stopped":
        return pb.GetContainerInfoResponse(status=pb.GetContainerInfoResponse.STOPPED)
    found = await session.inits.read(container, "net/fib_trie", "net/route")
    return pb.GetContainerInfoResponse(
        status=pb.GetContainerInfoResponse.RUNNING,
        ipv4_address=0 if found is None else ipv4_address(*found),
    )


def ipv4_address(fib_trie: str, route: str) -> int:
    """A container's own IPv4 address, 0 for none yet, as it goes on the wire.

    That is in network byte order: the bytes in the memory of a little-endian machine read a.b.c.d.

    fib_trie, route: those files of /proc/PID/net. Their forms: net/ipv4/fib_trie.c of Linux, in
    fib_trie_seq_show() and fib_route_seq_show().
    """
    addresses = [address for address in _local(fib_trie) if not address.is_loopback]
    networks = _networks(route)
    for address in addresses:
        if any(address in network for network in networks):
            return int.from_bytes(address.packed, "little")
    return int.from_bytes(addresses[0].packed, "little") if addresses else 0


def _local(fib_trie: str) -> list[ipaddress.IPv4Address]:
    found = []
    lines = [line.split() for line in fib_trie.splitlines()]
    for leaf, route in itertools.pairwise(lines):
        if leaf[:1] == ["|--"] and route == ["/32", "host", "LOCAL"]:
            found.append(ipaddress.IPv4Address(leaf[1]))
    return found


def _networks(route: str) -> list[ipaddress.IPv4Network]:
    # The numbers are those of the machine's memory, printed; the default route is no network.
    found = []
    for line in route.splitlines()[1:]:
        fields = line.split()
        if len(fields) > 7 and fields[0] == _INTERFACE and int(fields[7], 16):
            network, mask = (int(field, 16).to_bytes(4, sys.byteorder) for field in fields[1:8:6])
            netmask = ipaddress.IPv4Address(mask)
            found.append(ipaddress.IPv4Network(f"{ipaddress.IPv4Address(network)}/{netmask}"))
    return found
