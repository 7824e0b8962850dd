"""The init of each running container, in whose directory of /proc the container's own network can
be found. LXD is asked for it once: its answer starts processes in the container.
"""

from __future__ import annotations

import os

from agent.tremplin.lxd_client import LxdError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agent.tremplin.lxd_client import LxdClient


class Inits:
    """Those of one LXD."""

    def __init__(self, lxd: LxdClient) -> None:
        self._lxd = lxd
        self._directories: dict[str, int] = {}
        """By container, of /proc/PID: open, so that no later process of that pid is taken for it.
        """

    async def network(self, container: str) -> int | None:
        """The container's network namespace, an open file for the caller to close; None when it
        does not run, or LXD does not say.
        """
        # The init of a container that restarted has another pid.
        for _ in range(2):
            if container not in self._directories:
                try:
                    state = await self._lxd.get("instances", container, "state")
                except LxdError:
                    return None
                if not state["pid"] > 0:
                    return None
                try:
                    directory = os.open(f"/proc/{state['pid']}", os.O_RDONLY | os.O_DIRECTORY)
                except OSError:
                    return None
                if container in self._directories:  # somebody else asked at the same time
                    os.close(directory)
                else:
                    self._directories[container] = directory
            init = self._directories[container]
            try:
                return os.open("ns/net", os.O_RDONLY | os.O_CLOEXEC, dir_fd=init)
            except OSError:
                self.forget(container)
        return None

    def known(self) -> list[str]:
        """The containers whose init is known."""
        return list(self._directories)

    def forget(self, container: str) -> None:
        """Lets go of what is known of a container that has gone down."""
        directory = self._directories.pop(container, None)
        if directory is not None:
            os.close(directory)
