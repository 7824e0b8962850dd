"""The names that LXD's containers have, without asking it: what is about to get a new one need not
wait for the answer.

Source: LXD's doc/events.md, lifecycle events.
"""

from __future__ import annotations

from urllib.parse import unquote, urlsplit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class NamesInUse:
    """The names, as LXD's events tell: by a moment behind, and for as long as there are events."""

    def __init__(self) -> None:
        self._names: set[str] | None = None

    def catch_up(self, instances: list[dict[str, Any]]) -> None:
        """instances: LXD's list."""
        self._names = {found["name"] for found in instances}

    def know_nothing(self) -> None:
        """There are no events any more."""
        self._names = None

    def on_event(self, event: dict[str, Any]) -> None:
        """Takes an event of type lifecycle; event: its metadata."""
        if self._names is None:
            return
        action = event.get("action")
        name = instance_of(event)
        if action == "instance-deleted":
            self._names.discard(name)
        elif action == "instance-created":
            self._names.add(name)
        elif action == "instance-renamed":
            self._names.discard(str((event.get("context") or {}).get("old_name")))
            self._names.add(name)

    def is_free(self, name: str) -> bool:
        """Whether no container has that name; False also when that is not known."""
        return self._names is not None and name not in self._names


def instance_of(event: dict[str, Any]) -> str:
    """The name of the instance that a lifecycle event is about; event: its metadata."""
    return unquote(urlsplit(str(event.get("source", ""))).path.rpartition("/")[2])
