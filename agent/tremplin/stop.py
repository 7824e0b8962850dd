"""StopContainer: cleanly, and after a while by force."""

from __future__ import annotations

import functools
import logging

from agent.pb import tremplin_pb2 as pb
from agent.tremplin.lxd_client import LxdError
from agent.tremplin.operation import Operation, OperationError, Outcome
from agent.tremplin.retry import while_busy

_log = logging.getLogger(__name__)

_CLEAN_SECONDS = 30
"""What a container's init has to end everything; systemd under emulation needs 4 to 5."""


class Stop(Operation):
    """Stops a container that is not stopped."""

    verb = "stop"
    method = "StopContainer"

    async def work(self) -> None:
        """See Operation."""
        try:
            await while_busy(self._stop)
        except LxdError as error:
            _log.info("container %s does not stop by itself: %s", self.container, error)
            await while_busy(functools.partial(self._stop, force=True))

    async def _stop(self, *, force: bool = False) -> None:
        instance = await self.session.instance(self.container)
        if instance is None:
            raise OperationError("there is no such container")
        if instance["status"] == "Stopped":
            return
        force = force or instance["status"] == "Frozen"
        timeout = -1 if force else _CLEAN_SECONDS
        stop = {"action": "stop", "force": force, "timeout": timeout}
        await self.session.lxd_operations.run(
            "put", "instances", self.container, "state", json=stop
        )

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
