"""OnHostNetworkChanged and ResetIPv6: what the VM learnt from the network is learnt again."""

from __future__ import annotations

import errno
import logging
import os
import socket

from agent.maitred.errors import Failed, NotNow
from agent.maitred.processes import program_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agent.maitred.netlink import AsyncIPRoute
    from agent.process_supervisor.client import AsyncClient

_log = logging.getLogger(__name__)

_NUD_KEPT = 0x40 | 0x80
"""NUD_NOARP and NUD_PERMANENT of linux/neighbour.h: entries that nobody learnt."""

_DHCP_CLIENTS = frozenset({"dhclient", "udhcpc", "dhcpcd"})


def reset_ipv6(interface: str) -> None:
    """Drops the interface's IPv6 addresses and routes; the kernel then asks the routers again.

    Raises NotNow: there is no such interface, or no IPv6; Failed.
    """
    path = f"/proc/sys/net/ipv6/conf/{interface}/disable_ipv6"
    if not os.path.exists(path):
        what = "interface" if os.path.isdir("/proc/sys/net/ipv6") else "IPv6 on interface"
        raise NotNow(f"cannot reset IPv6: there is no {what} {interface}")
    try:
        for value in ("1", "0"):
            with open(path, "w", encoding="ascii") as file:
                file.write(value)
    except OSError as error:
        raise Failed(f"cannot reset IPv6 of {interface}: {error}") from None


async def forget_neighbours(interface: str) -> None:
    """Empties the interface's ARP and NDP tables. Raises NotNow: no such interface; Failed."""
    from agent.maitred.netlink import AsyncIPRoute, NetlinkError

    try:
        async with AsyncIPRoute() as ip:
            found = await ip.link_lookup(ifname=interface)
            if not found:
                raise NotNow(f"cannot renew the network: there is no interface {interface}")
            for family in (socket.AF_INET, socket.AF_INET6):
                await _forget(ip, found[0], family)
    except NetlinkError as error:
        raise Failed(f"cannot renew the network: {os.strerror(error.code)}") from None


async def _forget(ip: AsyncIPRoute, index: int, family: int) -> None:
    from agent.maitred.netlink import NetlinkError

    async for neighbour in await ip.neigh("dump", ifindex=index, family=family):
        if neighbour["state"] & _NUD_KEPT:
            continue
        try:
            await ip.neigh("del", ifindex=index, family=family, dst=neighbour.get("dst"))
        except NetlinkError as error:
            if error.code != errno.ENOENT:  # it went by itself
                raise


async def renew_leases(client: AsyncClient) -> None:
    """Ends the DHCP clients that PID 1 respawns; their successors ask for an address anew.

    Raises SupervisorError.
    """
    for process in await client.list():
        program = program_name(process["argv"][0]) if process["argv"] else ""
        if program in _DHCP_CLIENTS and process["respawn"] and process["pid"] is not None:
            await client.signal(process["key"], "SIGTERM")
            _log.info("%s begins anew", program)
