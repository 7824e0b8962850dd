"""UpdateListeningPorts: what listens on TCP in each container, told whenever it has changed.

The kernel tells nobody that a socket begins to listen, so it has to be looked at: at once when a
container has come up or gone down, soon after something has changed, then less and less often,
and not at all while no container runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os

from agent.pb import tremplin_pb2 as pb
from agent.tremplin.sock_diag import listening_ports

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agent.tremplin.session import Session

_log = logging.getLogger(__name__)

_SECONDS = (1.0, 4.0)
"""From one look to the next: after a change, and the longest."""
_SLOWER = 1.5


class ListeningPorts:
    """Watches the running containers."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._told: dict[str, list[int]] = {}
        self._problem = ""
        self.kind = self
        """What the reports are about, so that a newer one takes the place of one not yet sent."""

    async def run(self) -> None:
        """Watches until cancelled."""
        lifecycle = self._session.lifecycle
        delay = _SECONDS[0]
        while True:
            lifecycle.changed.clear()
            if await self._look():
                delay = _SECONDS[0]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay if lifecycle.up else None):
                    await lifecycle.changed.wait()
            delay = _SECONDS[0] if lifecycle.changed.is_set() else min(_SLOWER * delay, _SECONDS[1])

    async def _look(self) -> bool:
        # Whether something has changed.
        now = await self._ports()
        if now is None or now == self._told:
            return False
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
        return True

    async def _ports(self) -> dict[str, list[int]] | None:
        # None when the kernel does not say.
        inits = self._session.inits
        up = set(self._session.lifecycle.up)
        for name in set(inits.known()) - up:
            inits.forget(name)
        networks: dict[str, int] = {}
        try:
            for name in sorted(up):
                network = await inits.network(name)
                if network is not None:
                    networks[name] = network
        except BaseException:
            for network in networks.values():
                os.close(network)
            raise
        if not networks:
            return {}
        try:
            # Not to be left in the middle: the thread closes them.
            return await asyncio.shield(asyncio.to_thread(listening_ports, networks))
        except OSError as error:
            if self._problem != str(error):
                self._problem = str(error)
                _log.warning("cannot see what listens in the containers: %s", error)
            return None
