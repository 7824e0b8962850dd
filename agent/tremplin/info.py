"""GetContainerInfo: whether a container runs, and at which address.

Hosts ask again and again until the container has its address, while it boots. LXD's own answer
starts a process in the container's network each time; the kernel says it at once, and with as much
effort however many addresses and routes a container has made itself.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import socket
import struct

from agent.pb import tremplin_pb2 as pb
from agent.syscalls import setns
from agent.tremplin.lxd_setup import NETWORK_DEVICE
from agent.tremplin.network_namespace import visits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agent.tremplin.session import Session

_INTERFACE = NETWORK_DEVICE.encode()
"""A container's own bridges have addresses too."""

# netdevice(7)
_SIOCGIFCONF, _SIOCGIFADDR = 0x8912, 0x8915
_IFREQ = struct.Struct("16s4x4s16x")
"""struct ifreq: the interface's name and its IPv4 address."""
_IFCONF = struct.Struct("iP")
_MOST = 64
"""Addresses that are looked at when the interface has none."""
_LOOPBACK = b"\x7f"


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
    network = await session.inits.network(container)
    address = 0
    if network is not None:
        with contextlib.suppress(OSError):
            # Not to be left in the middle: the thread closes it.
            address = await asyncio.shield(asyncio.to_thread(ipv4_address, network))
    return pb.GetContainerInfoResponse(
        status=pb.GetContainerInfoResponse.RUNNING, ipv4_address=address
    )


def ipv4_address(network: int) -> int:
    """A container's own IPv4 address, 0 for none yet, as it goes on the wire; blocks.

    That is in network byte order: the bytes in the memory of a little-endian machine read a.b.c.d.

    network: an open file of /proc/PID/ns/net, which is closed; see visits(). Raises OSError.
    """
    with visits([network]):
        setns(network)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as kernel:
            return int.from_bytes(_address(kernel) or _any_address(kernel), "little")


def _address(kernel: socket.socket) -> bytes:
    request = _IFREQ.pack(_INTERFACE, bytes(4))
    try:
        answer = fcntl.ioctl(kernel, _SIOCGIFADDR, request)
    except OSError:
        return b""
    return bytes(_IFREQ.unpack(answer)[1])


def _any_address(kernel: socket.socket) -> bytes:
    room = array.array("B", bytes(_MOST * _IFREQ.size))
    answer = fcntl.ioctl(kernel, _SIOCGIFCONF, _IFCONF.pack(len(room), room.buffer_info()[0]))
    used = _IFCONF.unpack(answer)[0]
    found = (bytes(address) for _, address in _IFREQ.iter_unpack(room[:used]))
    return next((address for address in found if not address.startswith(_LOOPBACK)), b"")
