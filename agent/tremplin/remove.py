"""DeleteContainer, and making sure that a container is gone whatever state it is in."""

from __future__ import annotations

import contextlib
import os

from agent.pb import tremplin_pb2 as pb
from agent.tremplin.lxd_client import LxdError, LxdNotFoundError
from agent.tremplin.operation import Operation, Outcome
from agent.tremplin.retry import is_busy, while_busy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agent.tremplin.session import Session


class Delete(Operation):
    """Removes a container, stopping it first; one that is being made is given up."""

    verb = "delete"
    method = "DeleteContainer"

    async def work(self) -> None:
        """See Operation."""
        from agent.tremplin.create import Create

        create = self.session.operation(Create, self.container)
        if create is not None:
            create.cancel()
            await create.ended.wait()
        await remove_container(self.session, self.container)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(token_path(self.session.settings.token_dir, self.container))

    def report_end(self, outcome: Outcome, reason: str) -> None:
        """See Operation."""
        status = {
            Outcome.DONE: pb.ContainerDeletionProgress.DELETED,
            Outcome.CANCELLED: pb.ContainerDeletionProgress.CANCELLED,
        }.get(outcome, pb.ContainerDeletionProgress.FAILED)
        self.report(
            "UpdateDeletionStatus",
            pb.ContainerDeletionProgress(
                status=status, container_name=self.container, failure_reason=reason
            ),
        )


def token_path(token_dir: str, container: str) -> str:
    """Where the token of a container is, in the VM."""
    return f"{token_dir}/{container}_token"


def token_device(token_dir: str, container: str) -> dict[str, str]:
    """The device that shows a container its token."""
    return {
        "type": "disk",
        "source": token_path(token_dir, container),
        "path": "/dev/.container_token",
        "required": "false",
    }


async def remove_container(session: Session, container: str) -> None:
    """Returns when there is no such container: stops and deletes it. Raises LxdError."""

    async def attempt() -> None:
        try:
            await session.lxd_operations.run("delete", "instances", container)
            return
        except LxdError as error:
            if not is_busy(error):
                raise
        instance = await session.instance(container)
        if instance is not None and instance["status"] != "Stopped":
            stop = {"action": "stop", "force": True, "timeout": -1}
            await session.lxd_operations.run("put", "instances", container, "state", json=stop)
        await session.lxd_operations.run("delete", "instances", container)

    with contextlib.suppress(LxdNotFoundError):
        await while_busy(attempt)
