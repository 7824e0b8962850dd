"""ContainerShutdown: tells the host when a container goes down, once, by whatever way it does, and
not when it restarts.
"""

from __future__ import annotations

import asyncio
import datetime
import logging

from agent.pb import tremplin_pb2 as pb
from agent.tremplin import markers
from agent.tremplin.life import Life, Turn
from agent.tremplin.lxd_client import LxdError
from agent.tremplin.names import is_reserved
from agent.tremplin.names_in_use import instance_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from agent.tremplin.session import Session

_log = logging.getLogger(__name__)

_TURNS = {
    "instance-started": Turn.UP,
    "instance-resumed": Turn.UP,
    "instance-restarted": Turn.REBOOTED,
    "instance-shutdown": Turn.DOWN,
    "instance-stopped": Turn.DOWN,
    "instance-deleted": Turn.DOWN,
}
_POLL_SECONDS = 0.1
_REBOOT_BEGINS_SECONDS = 1.5
"""A container that went down from inside and shows no sign of a reboot for so long is down."""
_REBOOT_SECONDS = 15.0
"""The longest time from one sign of a reboot to the next."""


class Lifecycle:
    """Which containers run, as far as the host was told."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._lives: dict[str, Life] = {}
        self.changed = asyncio.Event()
        """Set whenever one comes up or goes down."""
        self._checks: dict[str, asyncio.Task[None]] = {}

    @property
    def up(self) -> set[str]:
        """The containers that run."""
        return {name for name, life in self._lives.items() if life.up}

    def catch_up(self, instances: list[dict[str, Any]]) -> None:
        """Compares with what LXD says, after a time without events; instances: LXD's list."""
        up = {found["name"] for found in instances if found["status"] != "Stopped"}
        for name in self.up - up:
            self._is_down(name)
        self._lives = {name: Life(up=True) for name in up if not is_reserved(name)}
        for name in list(self._checks):
            self._checks.pop(name).cancel()
        for name in self._lives:
            self._is_up(name)
        self.changed.set()

    def on_event(self, event: dict[str, Any], sent: str) -> None:
        """Takes an event of type lifecycle; event: its metadata; sent: when LXD sent it."""
        turn = _TURNS.get(str(event.get("action")))
        name = instance_of(event)
        if turn is None or is_reserved(name):
            return
        if event["action"] == "instance-shutdown" and not event.get("requestor"):
            turn = Turn.DOWN_OR_REBOOTING
        at = datetime.datetime.fromisoformat(sent).timestamp()
        life = self._lives.setdefault(name, Life(up=False))
        if not life.is_in_order(at):
            # Or the clock was set back, and not by much.
            self._session.in_background(self._compare(name))
        for _ in range(life.take(turn, at)):
            self._is_down(name)
        if turn is Turn.UP:
            self._is_up(name)
        self._look_after(name, life)

    def settle(self, name: str) -> None:
        """Takes a container for down that may be rebooting: it is about to be started."""
        life = self._lives.get(name)
        if life is not None and life.undecided:
            self._decide(name, life, down=True)

    def _decide(self, name: str, life: Life, *, down: bool) -> None:
        for _ in range(life.resolve(down=down)):
            self._is_down(name)
        self._look_after(name, life)

    def _look_after(self, name: str, life: Life) -> None:
        self.changed.set()
        if not life.undecided:
            check = self._checks.pop(name, None)
            if check is not None and check is not asyncio.current_task():
                check.cancel()
        elif name not in self._checks:
            self._checks[name] = asyncio.create_task(self._check(name, life))

    async def _check(self, name: str, life: Life) -> None:
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
                self._decide(name, life, down=False)
                return
            if instance is not None and _has_network(instance):
                deadline = clock() + _REBOOT_SECONDS
            await asyncio.sleep(_POLL_SECONDS)
        self._decide(name, life, down=True)

    async def _compare(self, name: str) -> None:
        # What LXD says counts, if it is not what the events say.
        try:
            instance = await self._session.instance(name)
        except LxdError:
            return
        life = self._lives.get(name)
        if life is None:
            return  # a catch_up in the meantime knows better
        runs = instance is not None and instance["status"] != "Stopped"
        if life.up != runs and not life.undecided:
            self._lives[name] = Life(up=runs)
            if not runs:
                self._is_down(name)
            self.changed.set()

    def _is_up(self, name: str) -> None:
        # Started behind tremplin's back it is in use all the same. Of its own starts it knows.
        if not self._session.begun_by("StartContainer", name):
            self._session.in_background(markers.mark_started(self._session.lxd, name))

    def _is_down(self, name: str) -> None:
        _log.info("container %s is down", name)
        self._session.reporter.report(
            "ContainerShutdown", pb.ContainerShutdownInfo(container_name=name), container=name
        )


def _has_network(instance: dict[str, Any]) -> bool:
    return any(
        key.startswith("volatile.") and key.endswith(".host_name") and value
        for key, value in instance["config"].items()
    )
