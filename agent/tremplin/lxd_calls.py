"""The RPC about LXD itself: StartLxd, and its progress."""

from __future__ import annotations

import asyncio
import logging

from agent.pb import tremplin_pb2 as pb
from agent.pb.tremplin_pb2_grpc import TremplinServicer
from agent.tremplin.lxd_client import LxdError
from agent.tremplin.lxd_recovery import RecoveryError, reset_database
from agent.tremplin.lxd_setup import set_up_lxd
from agent.tremplin.operation import one_line

TYPE_CHECKING = False
if TYPE_CHECKING:
    import grpc.aio

    from agent.tremplin.session import Session

_LXD_SECONDS = 120.0
"""How long an LXD that died has to come back, once the host asks for it."""

_log = logging.getLogger(__name__)


class LxdCalls(TremplinServicer):
    """Start and reset of LXD."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._resetting: asyncio.Task[None] | None = None

    async def StartLxd(
        self,
        request: pb.StartLxdRequest,
        context: grpc.aio.ServicerContext[pb.StartLxdRequest, pb.StartLxdResponse],
    ) -> pb.StartLxdResponse:
        """LXD is up before the host hears of us; what is left to do is to reset its database."""
        del context
        statuses = pb.StartLxdResponse
        if self._resetting is not None and not self._resetting.done():
            return statuses(status=statuses.STARTING)
        if request.reset_lxd_db:
            if self._session.running:
                return statuses(
                    status=statuses.FAILED,
                    failure_reason="cannot reset LXD's database: something else is going on",
                )
            self._resetting = asyncio.create_task(self._reset())
            return statuses(status=statuses.STARTING)
        if not self._session.lxd_is_up.is_set():
            self._resetting = asyncio.create_task(self._wait_for_lxd())
            return statuses(status=statuses.STARTING)
        return statuses(status=statuses.ALREADY_RUNNING)

    async def _reset(self) -> None:
        statuses = pb.StartLxdProgress
        self._report_lxd(statuses.RECOVERING)
        try:
            await reset_database(self._session)
            await set_up_lxd(self._session)
        except (LxdError, RecoveryError) as error:
            _log.warning("cannot reset LXD's database: %s", error)
            self._report_lxd(statuses.FAILED, f"cannot reset LXD's database: {one_line(error)}")
        else:
            self._report_lxd(statuses.STARTED)

    async def _wait_for_lxd(self) -> None:
        try:
            async with asyncio.timeout(_LXD_SECONDS):
                await self._session.lxd_is_up.wait()
        except TimeoutError:
            self._report_lxd(
                pb.StartLxdProgress.FAILED, f"cannot start LXD: no answer in {_LXD_SECONDS:.0f} s"
            )
        else:
            self._report_lxd(pb.StartLxdProgress.STARTED)

    def _report_lxd(self, status: pb.StartLxdProgress.Status.ValueType, reason: str = "") -> None:
        self._session.reporter.report(
            "UpdateStartLxdStatus",
            pb.StartLxdProgress(status=status, failure_reason=reason),
            container="",
        )
