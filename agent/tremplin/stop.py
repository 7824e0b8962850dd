"""StopContainer: cleanly, and after a while by force."""

from __future__ import annotations

import asyncio
import logging

from agent.pb import tremplin_pb2 as pb
from agent.tremplin.lxd_client import LxdError
from agent.tremplin.operation import Operation, OperationError, Outcome
from agent.tremplin.remove import is_busy

_log = logging.getLogger(__name__)

_CLEAN_SECONDS = 30
"""What a container's init has to end everything; systemd under emulation needs 4 to 5."""
_BUSY_SECONDS = 60.0
_POLL_SECONDS = 0.1


class Stop(Operation):
    """Stops a container that is not stopped."""

    verb = "stop"
    method = "StopContainer"

    async def work(self) -> None:
        """See Operation."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + _BUSY_SECONDS
        force = False
        while True:
            instance = await self.session.instance(self.container)
            if instance is None:
                raise OperationError("there is no such container")
            if instance["status"] == "Stopped":
                return
            force = force or instance["status"] == "Frozen"
            try:
                await self.session.lxd_operations.run(
                    "put",
                    "instances",
                    self.container,
                    "state",
                    json={
                        "action": "stop",
                        "force": force,
                        "timeout": -1 if force else _CLEAN_SECONDS,
                    },
                )
                return
            except LxdError as error:
                if is_busy(error) and clock() < deadline:
                    await asyncio.sleep(_POLL_SECONDS)
                elif force:
                    raise
                else:
                    _log.info("container %s does not stop by itself: %s", self.container, error)
                    force = True

    def report_end(self, outcome: Outcome, reason: str) -> None:
        """See Operation."""
        status = {
            Outcome.DONE: pb.ContainerStopProgress.STOPPED,
            Outcome.CANCELLED: pb.ContainerStopProgress.CANCELLED,
        }.get(outcome, pb.ContainerStopProgress.FAILED)
        self.report(
            "UpdateStopStatus",
            pb.ContainerStopProgress(
                status=status, container_name=self.container, failure_reason=reason
            ),
        )
