"""The TCP ports that something listens on in a network namespace, asked of the kernel over netlink.

/proc/PID/net/tcp would say it too, but for it the kernel walks its table of all connections of all
namespaces, which takes a hundred times as long. pyroute2 could ask too: its import takes 13 MB
and 0.13 s, many times that in an emulated guest.
Sources: sock_diag(7); inet_diag_sk_diag_fill() in net/ipv4/inet_diag.c of Linux.
"""

from __future__ import annotations

import os
import socket
import struct

from agent.syscalls import setns
from agent.tremplin.network_namespace import visits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_REQUEST_DUMP = 0x301
_ERROR, _DONE = 2, 3
_STATE_LISTEN = 10
_V6ONLY = 11
"""The attribute INET_DIAG_SKV6ONLY."""
_HEADER = struct.Struct("=IHHII")
"""struct nlmsghdr"""
_QUESTION = struct.Struct("=BBBxI48x")
"""struct inet_diag_req_v2"""
_ANSWER = struct.Struct("!4xH2x16s48x")
"""struct inet_diag_msg: the local port and address."""
_ATTRIBUTE = struct.Struct("=HH")
_ANY_IPV6 = bytes(16)
_MAPPED_IPV4 = bytes(10) + b"\xff\xff"
_LARGEST = 64 * 1024


def listening_ports(networks: Mapping[str, int]) -> dict[str, list[int]]:
    """The TCP ports that IPv4 clients can connect to, in order, by the names given; blocks.

    networks: open files of /proc/PID/ns/net. They are closed; see visits(). A name without a
    port is left out. Raises OSError.
    """
    found = {}
    with visits(networks.values()):
        for name, network in networks.items():
            setns(network)
            if ports := _ports():
                found[name] = ports
    return found


def _ports() -> list[int]:
    with socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG
    ) as kernel:
        return sorted({*_dump(kernel, socket.AF_INET), *_dump(kernel, socket.AF_INET6)})


def _dump(kernel: socket.socket, family: int) -> Iterator[int]:
    question = _QUESTION.pack(family, socket.IPPROTO_TCP, 0, 1 << _STATE_LISTEN)
    header = _HEADER.pack(
        _HEADER.size + len(question), _SOCK_DIAG_BY_FAMILY, _REQUEST_DUMP, family, 0
    )
    kernel.send(header + question)
    while True:
        for kind, body in _split(kernel.recv(_LARGEST), _HEADER):
            if kind == _ERROR:
                number = -struct.unpack_from("=i", body)[0]
                raise OSError(number, os.strerror(number))
            if kind == _DONE:
                return
            port, address = _ANSWER.unpack_from(body)
            if family == socket.AF_INET or _takes_ipv4(address, body):
                yield port


def _takes_ipv4(address: bytes, body: bytes) -> bool:
    # A socket on :: takes IPv4 too, unless it was told not to.
    if address.startswith(_MAPPED_IPV4):
        return True
    attributes = dict(_split(body[_ANSWER.size :], _ATTRIBUTE))
    return address == _ANY_IPV6 and attributes.get(_V6ONLY, b"\0")[0] == 0


def _split(data: bytes, header: struct.Struct) -> Iterator[tuple[int, bytes]]:
    # Messages and attributes alike: a length, a kind, and what they hold, on bounds of 4 bytes.
    while len(data) >= header.size:
        length, kind = header.unpack_from(data)[:2]
        if length < header.size:
            return
        yield kind, data[header.size : length]
        data = data[(length + 3) & ~3 :]
