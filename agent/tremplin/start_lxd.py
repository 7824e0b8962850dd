"""StartLxd: an LXD that died or was stopped, or a new database for it."""

from __future__ import annotations

import asyncio

from agent.pb import tremplin_pb2 as pb
from agent.tremplin import lxd_process
from agent.tremplin.lxd_recovery import database_identity, reset_database
from agent.tremplin.lxd_setup import set_up_lxd
from agent.tremplin.operation import Operation, OperationError, Outcome

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agent.tremplin.session import Session

_LXD_SECONDS = 120.0
"""How long an LXD that died has to come back, once the host asks for it."""


class StartLxd(Operation):
    """Returns when LXD is up, with its old database or with a new one."""

    method = "StartLxd"

    def __init__(self, session: Session, request: pb.StartLxdRequest) -> None:
        super().__init__(session, request)
        self.verb = "reset the database of" if request.reset_lxd_db else "start"

    async def work(self) -> None:
        """See Operation."""
        if self.request.reset_lxd_db:
            await self._reset()
            return
        await asyncio.to_thread(lxd_process.start_again, self.session.settings.run_dir)
        try:
            async with asyncio.timeout(_LXD_SECONDS):
                await self.session.lxd_is_up.wait()
        except TimeoutError:
            raise OperationError(f"no answer in {_LXD_SECONDS:.0f} s") from None

    async def _reset(self) -> None:
        self._report(pb.StartLxdProgress.RECOVERING, final=False)
        database = await asyncio.to_thread(database_identity, self.session)
        # A tremplin that was killed may have come as far as to take the old one away.
        if self.notes.setdefault("database", database) == database:
            self.note()
            await reset_database(self.session)
        await set_up_lxd(self.session)

    def report_end(self, outcome: Outcome, reason: str) -> None:
        """See Operation."""
        statuses = pb.StartLxdProgress
        self._report(statuses.STARTED if outcome is Outcome.DONE else statuses.FAILED, reason)

    def _report(
        self, status: pb.StartLxdProgress.Status.ValueType, reason: str = "", *, final: bool = True
    ) -> None:
        self.report(
            "UpdateStartLxdStatus",
            pb.StartLxdProgress(status=status, failure_reason=reason),
            final=final,
        )
