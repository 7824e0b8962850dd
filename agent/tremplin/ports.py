"""UpdateListeningPorts: what listens on TCP in each container, told whenever it has changed.

One file of /proc for each running container says it all; no process is looked at.
Source: proc(5), /proc/PID/net/tcp.
"""

from __future__ import annotations

import asyncio
import logging

from agent.pb import tremplin_pb2 as pb

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
        for name in set(self._session.inits.known()) - up:
            self._session.inits.forget(name)
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
        found = await self._session.inits.read(name, "net/tcp", "net/tcp6")
        return [] if found is None else listening_ports(*found)


def listening_ports(tcp: str, tcp6: str) -> list[int]:
    """The TCP ports that IPv4 clients can connect to, in order; tcp, tcp6: of /proc/PID/net."""
    # A socket on :: takes IPv4 too, unless it was told not to.
    return sorted({*parse_ports(tcp), *parse_ports(tcp6, address=_ANY_IPV6)})


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
