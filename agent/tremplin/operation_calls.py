"""The RPCs that begin, join or cancel a long operation: each one checks what it was
given, hands it on to the operation, and says how it stands.
"""

from __future__ import annotations

import asyncio

from agent.pb import tremplin_pb2 as pb
from agent.pb.tremplin_pb2_grpc import TremplinServicer
from agent.tremplin import markers
from agent.tremplin.create import Create
from agent.tremplin.export import Export, export_problem
from agent.tremplin.image_source import image_source, source_problem
from agent.tremplin.imports import Import, import_problem
from agent.tremplin.lxd_client import LxdError
from agent.tremplin.names import name_problem
from agent.tremplin.operation import Operation, Outcome, cannot, one_line
from agent.tremplin.os_release import read_os_release
from agent.tremplin.remove import Delete
from agent.tremplin.start import ANSWER_SECONDS, Start
from agent.tremplin.start_lxd import StartLxd
from agent.tremplin.stop import Stop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeVar

    import grpc.aio

    from agent.tremplin.session import Session

    OperationT = TypeVar("OperationT", bound=Operation)


class OperationCalls(TremplinServicer):
    """Start of LXD; create, delete, start, stop, export, import."""

    def __init__(self, session: Session) -> None:
        self._session = session

    async def StartLxd(
        self,
        request: pb.StartLxdRequest,
        context: grpc.aio.ServicerContext[pb.StartLxdRequest, pb.StartLxdResponse],
    ) -> pb.StartLxdResponse:
        """LXD is up before the host hears of us; it may have died, or need a new database."""
        statuses = pb.StartLxdResponse
        reset = request.reset_lxd_db
        under_way = self._session.operation(StartLxd, "")
        if under_way is not None and (under_way.request.reset_lxd_db or not reset):
            return statuses(status=statuses.STARTING)
        if reset and self._session.running:
            return statuses(
                status=statuses.FAILED,
                failure_reason="cannot reset the database of LXD: something else is going on",
            )
        if not reset and self._session.lxd_is_up.is_set():
            return statuses(status=statuses.ALREADY_RUNNING)
        self._begin(StartLxd, request, context)
        return statuses(status=statuses.STARTING)

    async def CreateContainer(
        self,
        request: pb.CreateContainerRequest,
        context: grpc.aio.ServicerContext[pb.CreateContainerRequest, pb.CreateContainerResponse],
    ) -> pb.CreateContainerResponse:
        """Begins to make a container, unless it is there and whole."""
        name = request.container_name
        try:
            problem = name_problem(name) or await source_problem(image_source(request))
            if problem:
                return _create_failed(name, problem)
            if self._session.operation(Create, name):
                return pb.CreateContainerResponse(status=pb.CreateContainerResponse.CREATING)
            deleted = self._session.operation(Delete, name) is not None
            free = deleted or self._session.names_in_use.is_free(name)
            instance = None if free else await self._session.instance(name)
            if instance is not None and await self._is_whole(instance):
                return pb.CreateContainerResponse(status=pb.CreateContainerResponse.EXISTS)
        except LxdError as error:
            return _create_failed(name, error)
        self._begin(Create, request, context).name_is_free = instance is None and not deleted
        return pb.CreateContainerResponse(status=pb.CreateContainerResponse.CREATING)

    async def _is_whole(self, instance: dict[str, Any]) -> bool:
        name = instance["name"]
        if instance["status"] != "Stopped" or self._session.operation(Start, name):
            return True
        return not await markers.is_unfinished(self._session.lxd, name)

    async def DeleteContainer(
        self,
        request: pb.DeleteContainerRequest,
        context: grpc.aio.ServicerContext[pb.DeleteContainerRequest, pb.DeleteContainerResponse],
    ) -> pb.DeleteContainerResponse:
        """Begins to remove a container."""
        name = request.container_name
        statuses = pb.DeleteContainerResponse
        if problem := name_problem(name):
            return statuses(status=statuses.FAILED, failure_reason=cannot("delete", name, problem))
        if self._session.operation(Delete, name):
            return statuses(status=statuses.DELETING)
        try:
            there = self._session.operation(Create, name) or await self._session.instance(name)
        except LxdError as error:
            return statuses(status=statuses.FAILED, failure_reason=cannot("delete", name, error))
        if not there:
            return statuses(status=statuses.DOES_NOT_EXIST)
        self._begin(Delete, request, context)
        return statuses(status=statuses.DELETING)

    async def StartContainer(
        self,
        request: pb.StartContainerRequest,
        context: grpc.aio.ServicerContext[pb.StartContainerRequest, pb.StartContainerResponse],
    ) -> pb.StartContainerResponse:
        """Begins to start a container; a start that is quick is answered when it is over."""
        name = request.container_name
        statuses = pb.StartContainerResponse
        start = self._session.operation(Start, name)
        if start is None:
            try:
                problem, running = await self._may_start(name)
            except LxdError as error:
                problem, running = one_line(error), False
            if problem:
                return statuses(
                    status=statuses.FAILED, failure_reason=cannot("start", name, problem)
                )
            if running:
                return statuses(
                    status=statuses.RUNNING,
                    os_release=await asyncio.to_thread(
                        read_os_release, self._session.lxd.container_directory(name)
                    ),
                )
            start = self._begin(Start, request, context)
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await start.ended.wait()
        except TimeoutError:
            status = statuses.REMAPPING if start.remapping else statuses.STARTING
            return statuses(status=status, os_release=start.os_release)
        if start.outcome is not Outcome.DONE:
            return statuses(status=statuses.FAILED, failure_reason=start.reason)
        return statuses(status=statuses.STARTED, os_release=start.os_release)

    async def _may_start(self, name: str) -> tuple[str, bool]:
        # Why a container cannot be started, or ""; and whether it runs already.
        if problem := name_problem(name):
            return problem, False
        if self._session.operation(Create, name):
            return "it is being created", False
        if self._session.operation(Delete, name):
            return "it is being deleted", False
        instance = await self._session.instance(name)
        if instance is None:
            return "there is no such container", False
        running = instance["status"] == "Running" and not self._session.operation(Stop, name)
        return "", running

    async def StopContainer(
        self,
        request: pb.StopContainerRequest,
        context: grpc.aio.ServicerContext[pb.StopContainerRequest, pb.StopContainerResponse],
    ) -> pb.StopContainerResponse:
        """Begins to stop a container."""
        name = request.container_name
        statuses = pb.StopContainerResponse
        if problem := name_problem(name):
            return statuses(status=statuses.FAILED, failure_reason=cannot("stop", name, problem))
        if self._session.operation(Stop, name):
            return statuses(status=statuses.STOPPING)
        try:
            instance = await self._session.instance(name)
        except LxdError as error:
            return statuses(status=statuses.FAILED, failure_reason=cannot("stop", name, error))
        if instance is None:
            return statuses(status=statuses.DOES_NOT_EXIST)
        if instance["status"] == "Stopped" and not self._session.operation(Start, name):
            return statuses(status=statuses.STOPPED)
        self._begin(Stop, request, context)
        return statuses(status=statuses.STOPPING)

    async def ExportContainer(
        self,
        request: pb.ExportContainerRequest,
        context: grpc.aio.ServicerContext[pb.ExportContainerRequest, pb.ExportContainerResponse],
    ) -> pb.ExportContainerResponse:
        """Begins to write a container to a file."""
        name = request.container_name
        statuses = pb.ExportContainerResponse
        problem = name_problem(name) or await asyncio.to_thread(export_problem, request.export_path)
        try:
            if not problem and await self._session.instance(name) is None:
                problem = "there is no such container"
        except LxdError as error:
            problem = one_line(error)
        reason = self._begin_alone(Export, request, context, problem)
        return statuses(
            status=statuses.FAILED if reason else statuses.EXPORTING, failure_reason=reason
        )

    async def CancelExportContainer(
        self,
        request: pb.CancelExportContainerRequest,
        context: grpc.aio.ServicerContext[
            pb.CancelExportContainerRequest, pb.CancelExportContainerResponse
        ],
    ) -> pb.CancelExportContainerResponse:
        """Gives up an export; its end is reported as CANCELLED."""
        del context
        statuses = pb.CancelExportContainerResponse
        found = self._cancel(Export, request.in_progress_container_name)
        return statuses(status=statuses.CANCEL_QUEUED if found else statuses.OPERATION_NOT_FOUND)

    async def ImportContainer(
        self,
        request: pb.ImportContainerRequest,
        context: grpc.aio.ServicerContext[pb.ImportContainerRequest, pb.ImportContainerResponse],
    ) -> pb.ImportContainerResponse:
        """Begins to make a container from an exported file."""
        statuses = pb.ImportContainerResponse
        problem = name_problem(request.container_name) or await asyncio.to_thread(
            import_problem, request.import_path
        )
        reason = self._begin_alone(Import, request, context, problem)
        return statuses(
            status=statuses.FAILED if reason else statuses.IMPORTING, failure_reason=reason
        )

    async def CancelImportContainer(
        self,
        request: pb.CancelImportContainerRequest,
        context: grpc.aio.ServicerContext[
            pb.CancelImportContainerRequest, pb.CancelImportContainerResponse
        ],
    ) -> pb.CancelImportContainerResponse:
        """Gives up an import; its end is reported as CANCELLED."""
        del context
        statuses = pb.CancelImportContainerResponse
        found = self._cancel(Import, request.in_progress_container_name)
        return statuses(status=statuses.CANCEL_QUEUED if found else statuses.OPERATION_NOT_FOUND)

    def _cancel(self, kind: type[Operation], container: str) -> bool:
        operation = self._session.operation(kind, container)
        if operation is not None:
            operation.cancel()
        return operation is not None

    def _begin_alone(
        self,
        kind: type[Operation],
        request: Any,
        context: grpc.aio.ServicerContext[Any, Any],
        problem: str,
    ) -> str:
        # Why it was not begun, or "". Unlike other operations these are not joined: another call
        # may name another file.
        name = request.container_name
        if not problem and self._session.operation(kind, name):
            problem = f"it is being {kind.verb}ed already"
        if problem:
            return cannot(kind.verb, name, problem)
        self._begin(kind, request, context)
        return ""

    def _begin(
        self,
        kind: type[OperationT],
        request: Any,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> OperationT:
        # Another call may have begun it while this one asked LXD something.
        begun = kind(self._session, request)
        operation = self._session.operation(kind, begun.container)
        if operation is not None:
            return operation

        def answered(_: object) -> None:
            begun.answered.set()

        context.add_done_callback(answered)  # type: ignore[arg-type]  # no Protocol in the stubs
        begun.start()
        return begun


def _create_failed(container: str, why: str | BaseException) -> pb.CreateContainerResponse:
    return pb.CreateContainerResponse(
        status=pb.CreateContainerResponse.FAILED, failure_reason=cannot("create", container, why)
    )
