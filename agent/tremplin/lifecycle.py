"""ContainerShutdown: tells the host when a container goes down, once, by whatever way it does, and
not when it restarts.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from urllib.parse import unquote, urlsplit

from agent.pb import tremplin_pb2 as pb
from agent.tremplin.lxd_client import LxdError
from agent.tremplin.names import is_reserved

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from agent.tremplin.session import Session

_log = logging.getLogger(__name__)

_UP = {"instance-started", "instance-restarted", "instance-resumed"}
_DOWN = {"instance-shutdown", "instance-stopped", "instance-deleted"}
_POLL_SECONDS = 0.1
_REBOOT_BEGINS_SECONDS = 1.5
"""A container that went down from inside and shows no sign of a reboot for so long is down."""
_REBOOT_SECONDS = 15.0
"""The longest time from one sign of a reboot to the next."""


class Lifecycle:
    """Which containers run, as far as the host was told."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.up: set[str] = set()
        """The containers that run."""
        self.changed = asyncio.Event()
        """Set whenever one comes up or goes down."""
        self._checks: dict[str, asyncio.Task[None]] = {}

    async def catch_up(self) -> None:
        """Compares with what LXD says, after a time without events. Raises LxdError."""
        instances = await self._session.lxd.get("instances", params={"recursion": "1"})
        up = {found["name"] for found in instances if found["status"] != "Stopped"}
        for name in self.up - up:
            self._is_down(name)
        self.up = {name for name in up if not is_reserved(name)}
        self.changed.set()

    def on_event(self, event: dict[str, Any]) -> None:
        """Takes an event of type lifecycle; event: its metadata."""
        action = event.get("action")
        name = unquote(urlsplit(str(event.get("source", ""))).path.rpartition("/")[2])
        if is_reserved(name):
            return
        if action in _UP:
            check = self._checks.pop(name, None)
            if check is not None:
                check.cancel()
                if action == "instance-started":
                    # It was down all the same, and somebody started it at once.
                    self._is_down(name)
            self.up.add(name)
            self.changed.set()
        elif action in _DOWN and name in self.up and name not in self._checks:
            if action == "instance-shutdown" and not event.get("requestor"):
                # A reboot from inside looks at first like a power-off from inside.
                self._checks[name] = asyncio.create_task(self._check(name))
            else:
                self._is_down(name)

    def settle(self, name: str) -> None:
        """Takes a container for down that may be rebooting: it is about to be started."""
        if name in self._checks:
            self._is_down(name)

    async def _check(self, name: str) -> None:
        # In a reboot LXD takes the network away late, if at all, and gives a new one a moment
        # later; in a power-off it is gone when the event comes, and stays away.
        clock = asyncio.get_running_loop().time
        deadline = clock() + _REBOOT_BEGINS_SECONDS
        while clock() < deadline:
            try:
                instance = await self._session.instance(name)
            except LxdError:
                instance = None
            if instance is not None and instance["status"] != "Stopped":
                del self._checks[name]
                return
            if instance is not None and _has_network(instance):
                deadline = clock() + _REBOOT_SECONDS
            await asyncio.sleep(_POLL_SECONDS)
        self._is_down(name)

    def _is_down(self, name: str) -> None:
        check = self._checks.pop(name, None)
        if check is not None:
            check.cancel()
        with contextlib.suppress(KeyError):
            self.up.remove(name)
        self.changed.set()
        _log.info("container %s is down", name)
        self._session.reporter.report(
            "ContainerShutdown", pb.ContainerShutdownInfo(container_name=name), container=name
        )


def _has_network(instance: dict[str, Any]) -> bool:
    return any(
        key.startswith("volatile.") and key.endswith(".host_name") and value
        for key, value in instance["config"].items()
    )
