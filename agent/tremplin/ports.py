"""UpdateListeningPorts: what listens on TCP in each container, told whenever it has changed.

One file of /proc for each running container says it all; no process is looked at.
Source: proc(5), /proc/PID/net/tcp.
"""

from __future__ import annotations

import asyncio
import logging

from agent.pb import tremplin_pb2 as pb
from agent.tremplin.lxd_client import LxdError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agent.tremplin.session import Session

_log = logging.getLogger(__name__)

_LISTENING = "0A"
_ANY_IPV6 = "0" * 32
_SECONDS = 2.0


class ListeningPorts:
    """Watches the running containers."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._pids: dict[str, int] = {}
        self._told: dict[str, list[int]] = {}
        self.kind = self
        """What the reports are about, so that a newer one takes the place of one not yet sent."""

    async def run(self) -> None:
        """Watches until cancelled."""
        while True:
            await self._look()
            await asyncio.sleep(_SECONDS)

    async def _look(self) -> None:
        up = set(self._session.lifecycle.up)
        for name in set(self._pids) - up:
            del self._pids[name]
        now = {}
        for name in sorted(up):
            ports = await self._ports(name)
            if ports:
                now[name] = ports
        if now == self._told:
            return
        self._told = now
        info = pb.ListeningPortInfo.ContainerPortInfo
        self._session.reporter.report(
            "UpdateListeningPorts",
            pb.ListeningPortInfo(
                container_ports={
                    name: info(listening_tcp4_ports=ports) for name, ports in now.items()
                }
            ),
            container=":ports",
            kind=self.kind,
            final=False,
        )

    async def _ports(self, name: str) -> list[int]:
        # The init of a container that restarted has another pid.
        for _ in range(2):
            if name not in self._pids:
                try:
                    state = await self._session.lxd.get("instances", name, "state")
                except LxdError:
                    return []
                if not state["pid"] > 0:
                    return []
                self._pids[name] = state["pid"]
            try:
                return read_ports(f"/proc/{self._pids[name]}/net")
            except OSError:
                del self._pids[name]
        return []


def read_ports(directory: str) -> list[int]:
    """The TCP ports that IPv4 clients can connect to, in order; directory: /proc/PID/net.

    Raises OSError.
    """
    with open(f"{directory}/tcp", encoding="ascii") as file:
        ports = set(parse_ports(file.read()))
    try:
        with open(f"{directory}/tcp6", encoding="ascii") as file:
            # A socket on :: takes IPv4 too, unless it was told not to.
            ports |= set(parse_ports(file.read(), address=_ANY_IPV6))
    except FileNotFoundError:
        pass
    return sorted(ports)


def parse_ports(table: str, *, address: str | None = None) -> list[int]:
    """The ports in the state LISTEN of /proc/net/tcp; address: only those on it, in its form."""
    ports = []
    for line in table.splitlines()[1:]:
        fields = line.split()
        if len(fields) > 3 and fields[3] == _LISTENING:
            local, _, port = fields[1].partition(":")
            if address in {None, local}:
                ports.append(int(port, 16))
    return ports
