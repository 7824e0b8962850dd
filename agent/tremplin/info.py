"""GetContainerInfo: whether a container runs, and at which address."""

from __future__ import annotations

import ipaddress

from agent.pb import tremplin_pb2 as pb
from agent.tremplin.lxd_client import LxdNotFoundError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from agent.tremplin.session import Session


async def container_info(session: Session, container: str) -> pb.GetContainerInfoResponse:
    """The answer to GetContainerInfo. Raises LxdError."""
    try:
        state = await session.lxd.get("instances", container, "state")
    except LxdNotFoundError:
        return pb.GetContainerInfoResponse(
            status=pb.GetContainerInfoResponse.NOT_FOUND,
            failure_reason=f"cannot look at container {container}: there is no such container",
        )
    if state["status"] == "Stopped":
        return pb.GetContainerInfoResponse(status=pb.GetContainerInfoResponse.STOPPED)
    return pb.GetContainerInfoResponse(
        status=pb.GetContainerInfoResponse.RUNNING, ipv4_address=ipv4_address(state)
    )


def ipv4_address(state: dict[str, Any]) -> int:
    """The IPv4 address in LXD's state of an instance, 0 for none yet, as it goes on the wire.

    That is in network byte order: the bytes in the memory of a little-endian machine read a.b.c.d.
    """
    networks = state.get("network") or {}
    for name in sorted(networks, key=lambda name: (name != "eth0", name)):
        for address in networks[name].get("addresses") or ():
            if address["family"] == "inet" and address["scope"] == "global":
                packed = ipaddress.IPv4Address(address["address"]).packed
                return int.from_bytes(packed, "little")
    return 0
