"""ConfigureNetwork: addresses and routes of the VM's own interface, through netlink (rtnetlink(7)).
Checked values only; checking is in ipv4.py and resolv_conf.py.
"""

from __future__ import annotations

import os
import socket

from agent.maitred import resolv_conf
from agent.maitred.errors import Failed, NotNow

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from agent.maitred.ipv4 import InterfaceConfig
    from agent.maitred.netlink import AsyncIPRoute

_MAIN_TABLE = 254  # RT_TABLE_MAIN
_PROTO_KERNEL = 2  # RTPROT_KERNEL
_PROTO_STATIC = 4  # RTPROT_STATIC
_IFF_UP = 1
_LOOPBACK = "lo"


async def configure(
    name: str, config: InterfaceConfig, *, resolv_conf_path: str, name_servers: str | None
) -> None:
    """Gives the interface this address and default route, and no other IPv4 addresses.

    name: of the interface; it and lo are up afterwards, and packets are forwarded.
    name_servers: new content of resolv.conf; None leaves it.
    Raises NotNow: there is no such interface; Failed: the kernel refused. What was in force before
    is then in force again.
    """
    from agent.maitred.netlink import AsyncIPRoute, NetlinkError

    try:
        async with AsyncIPRoute() as ip:
            index = await _index(ip, name)
            before = await _State.read(ip, index)
            sysctls = _Sysctls()
            try:
                sysctls.forward(name)
                await _set_up(ip, index, config)
                if name_servers is not None:
                    resolv_conf.replace(resolv_conf_path, name_servers)
            except (NetlinkError, OSError):
                await before.restore(ip)
                sysctls.restore()
                raise
    except NetlinkError as error:
        raise Failed(
            f"cannot configure {name} as {config}: {os.strerror(error.code)}, "
            "the kernel says; the configuration is the one before"
        ) from None
    except OSError as error:
        raise Failed(f"cannot configure {name} as {config}: {error}") from None


async def _index(ip: AsyncIPRoute, name: str) -> int:
    found = await ip.link_lookup(ifname=name)
    if not found:
        raise NotNow(f"cannot configure the network: there is no interface {name}")
    index: int = found[0]
    return index


async def _set_up(ip: AsyncIPRoute, index: int, config: InterfaceConfig) -> None:
    for loopback in await ip.link_lookup(ifname=_LOOPBACK):
        await ip.link("set", index=loopback, state="up")
    await ip.link("set", index=index, state="up")
    wanted = {"address": str(config.interface.ip), "prefixlen": config.interface.network.prefixlen}
    if config.interface.network.prefixlen < 31:
        wanted["broadcast"] = str(config.interface.network.broadcast_address)
    await _set_addresses(ip, index, [wanted])
    route = {
        "dst": "default",
        "gateway": str(config.gateway),
        "oif": index,
        "proto": _PROTO_STATIC,
        "table": _MAIN_TABLE,
    }
    await ip.route("replace", **route)
    await _drop_other_defaults(ip, index, [route])


async def _set_addresses(ip: AsyncIPRoute, index: int, wanted: list[dict[str, Any]]) -> None:
    def key(address: dict[str, Any]) -> tuple[str, int]:
        return address["address"], address["prefixlen"]

    keys = [key(address) for address in wanted]
    for address in await _addresses(ip, index):
        if key(address) not in keys:
            await ip.addr("del", index=index, **address)
    # Other addresses of a network go with its first one, so only now it shows what is missing.
    present = [key(address) for address in await _addresses(ip, index)]
    for address in wanted:
        if key(address) not in present:
            await ip.addr("add", index=index, **address)


async def _addresses(ip: AsyncIPRoute, index: int) -> list[dict[str, Any]]:
    found = []
    async for message in await ip.addr("dump", index=index, family=socket.AF_INET):
        address = {"address": message.get("local"), "prefixlen": message["prefixlen"]}
        if message.get("broadcast"):
            address["broadcast"] = message.get("broadcast")
        if message["scope"]:
            address["scope"] = message["scope"]
        found.append(address)
    return found


async def _drop_other_defaults(ip: AsyncIPRoute, index: int, keep: list[dict[str, Any]]) -> None:
    kept = {(route.get("gateway"), route.get("priority")) for route in keep}
    for route in await _routes(ip, index):
        if route["dst"] == "default" and (route.get("gateway"), route.get("priority")) not in kept:
            await ip.route("del", **route)


async def _routes(ip: AsyncIPRoute, index: int) -> list[dict[str, Any]]:
    """Routes that somebody set: those of the interface, and default routes of any."""
    found = []
    async for message in await ip.route("dump", family=socket.AF_INET, table=_MAIN_TABLE):
        is_default = message["dst_len"] == 0
        if message["proto"] == _PROTO_KERNEL or not (is_default or message.get("oif") == index):
            continue
        route = {
            "dst": "default" if is_default else f"{message.get('dst')}/{message['dst_len']}",
            "proto": message["proto"],
            "scope": message["scope"],
            "type": message["type"],
            "table": _MAIN_TABLE,
        }
        for attribute in ("gateway", "oif", "priority", "prefsrc"):
            if message.get(attribute) is not None:
                route[attribute] = message.get(attribute)
        found.append(route)
    return found


class _State:
    """What an interface was like, to go back to."""

    def __init__(
        self,
        index: int,
        was_up: bool,
        addresses: list[dict[str, Any]],
        routes: list[dict[str, Any]],
    ) -> None:
        self._index = index
        self._was_up = was_up
        self._addresses = addresses
        self._routes = routes

    @classmethod
    async def read(cls, ip: AsyncIPRoute, index: int) -> _State:
        (link,) = [message async for message in await ip.link("dump", index=index)]
        return cls(
            index,
            bool(link["flags"] & _IFF_UP),
            await _addresses(ip, index),
            await _routes(ip, index),
        )

    async def restore(self, ip: AsyncIPRoute) -> None:
        await _set_addresses(ip, self._index, self._addresses)
        # Routes to networks come before those through a gateway in one of them.
        for route in sorted(self._routes, key=lambda route: "gateway" in route):
            await ip.route("replace", **route)
        await _drop_other_defaults(ip, self._index, self._routes)
        if not self._was_up:
            await ip.link("set", index=self._index, state="down")


class _Sysctls:
    """Settings below /proc/sys/net, which are those of the network namespace; see ip-sysctl.rst."""

    def __init__(self) -> None:
        self._before: list[tuple[str, str]] = []

    def forward(self, name: str) -> None:
        """Lets packets through for the containers. Raises OSError."""
        self._set("net/ipv4/ip_forward", "1")
        if os.path.isdir("/proc/sys/net/ipv6"):
            # A machine that forwards ignores router advertisements unless this is 2.
            self._set(f"net/ipv6/conf/{name}/accept_ra", "2")
            self._set("net/ipv6/conf/all/forwarding", "1")

    def _set(self, key: str, value: str) -> None:
        path = f"/proc/sys/{key}"
        with open(path, encoding="ascii") as file:
            before = file.read().strip()
        if before != value:
            with open(path, "w", encoding="ascii") as file:
                file.write(value)
            self._before.append((path, before))

    def restore(self) -> None:
        for path, value in reversed(self._before):
            with open(path, "w", encoding="ascii") as file:
                file.write(value)
