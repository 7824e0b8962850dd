"""The RPCs of Tremplin: each one checks what it was given, hands it on, and says what came of it.

Failures go into the status and the failure_reason, with gRPC's own status OK.
"""

from __future__ import annotations

import asyncio
import functools
import logging

from agent.pb import tremplin_pb2 as pb
from agent.pb.tremplin_pb2_grpc import TremplinServicer
from agent.tremplin import markers
from agent.tremplin.accounts import AccountError, without_name
from agent.tremplin.create import Create, image_source, source_problem
from agent.tremplin.debug_info import debug_info
from agent.tremplin.devices import DeviceError, attach_usb, detach_usb, update_devices
from agent.tremplin.export import Export, export_problem
from agent.tremplin.imports import Import, import_problem
from agent.tremplin.info import container_info
from agent.tremplin.lxd_client import LxdError
from agent.tremplin.lxd_recovery import RecoveryError, reset_database
from agent.tremplin.lxd_setup import set_up_lxd
from agent.tremplin.name_server import forget_names
from agent.tremplin.names import name_problem
from agent.tremplin.operation import Operation, Outcome, one_line
from agent.tremplin.os_release import read_os_release
from agent.tremplin.remove import Delete
from agent.tremplin.set_up_user import read_primary_user, set_up_user
from agent.tremplin.start import ANSWER_SECONDS, Start
from agent.tremplin.stop import Stop
from agent.tremplin.timezone import set_timezone, timezone_problem

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeVar

    import grpc.aio
    from google.protobuf.message import Message

    from agent.tremplin.session import Session

    OperationT = TypeVar("OperationT", bound=Operation)

_LXD_SECONDS = 120.0
"""How long an LXD that died has to come back, once the host asks for it."""

_log = logging.getLogger(__name__)


class Servicer(TremplinServicer):
    """Tremplin, for one session."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._resetting: asyncio.Task[None] | None = None
        self._account_locks: dict[str, asyncio.Lock] = {}

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

    async def CreateContainer(
        self,
        request: pb.CreateContainerRequest,
        context: grpc.aio.ServicerContext[pb.CreateContainerRequest, pb.CreateContainerResponse],
    ) -> pb.CreateContainerResponse:
        """Begins to make a container, unless it is there and whole."""
        name = request.container_name
        try:
            problem = name_problem(name) or await asyncio.to_thread(
                source_problem, image_source(request)
            )
            if problem:
                return _create_failed(name, problem)
            if self._session.operation(Create, name):
                return pb.CreateContainerResponse(status=pb.CreateContainerResponse.CREATING)
            instance = await self._session.instance(name)
            if instance is not None and await self._is_whole(instance):
                return pb.CreateContainerResponse(status=pb.CreateContainerResponse.EXISTS)
        except LxdError as error:
            return _create_failed(name, one_line(error))
        self._begin(Create, request, context).name_is_free = instance is None
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
            return statuses(status=statuses.FAILED, failure_reason=_cannot("delete", name, problem))
        if self._session.operation(Delete, name):
            return statuses(status=statuses.DELETING)
        try:
            there = self._session.operation(Create, name) or await self._session.instance(name)
        except LxdError as error:
            return statuses(
                status=statuses.FAILED, failure_reason=_cannot("delete", name, one_line(error))
            )
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
                    status=statuses.FAILED, failure_reason=_cannot("start", name, problem)
                )
            if running:
                return statuses(
                    status=statuses.RUNNING,
                    os_release=await asyncio.to_thread(
                        read_os_release, self._session.settings.lxd_dir, name
                    ),
                )
            start = self._begin(Start, request, context)
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await start.ended.wait()
        except TimeoutError:
            return statuses(status=statuses.STARTING, os_release=start.os_release)
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
            return statuses(status=statuses.FAILED, failure_reason=_cannot("stop", name, problem))
        if self._session.operation(Stop, name):
            return statuses(status=statuses.STOPPING)
        try:
            instance = await self._session.instance(name)
        except LxdError as error:
            return statuses(
                status=statuses.FAILED, failure_reason=_cannot("stop", name, one_line(error))
            )
        if instance is None:
            return statuses(status=statuses.DOES_NOT_EXIST)
        if instance["status"] == "Stopped" and not self._session.operation(Start, name):
            return statuses(status=statuses.STOPPED)
        self._begin(Stop, request, context)
        return statuses(status=statuses.STOPPING)

    async def GetContainerUsername(
        self,
        request: pb.GetContainerUsernameRequest,
        context: grpc.aio.ServicerContext[
            pb.GetContainerUsernameRequest, pb.GetContainerUsernameResponse
        ],
    ) -> pb.GetContainerUsernameResponse:
        """The name and home of the user with uid 1000."""
        del context
        name = request.container_name
        statuses = pb.GetContainerUsernameResponse
        what = "find the user of"
        try:
            instance = None if name_problem(name) else await self._session.instance(name)
            if instance is None:
                return statuses(
                    status=statuses.CONTAINER_NOT_FOUND,
                    failure_reason=_cannot(what, name, "there is no such container"),
                )
            if instance["status"] != "Running":
                return statuses(
                    status=statuses.CONTAINER_NOT_RUNNING,
                    failure_reason=_cannot(what, name, "it is not running"),
                )
            lxd = self._session.lxd
            user = await lxd.in_thread(read_primary_user, lxd.socket_path, name)
        except (LxdError, OSError) as error:
            return statuses(
                status=statuses.FAILED, failure_reason=_cannot(what, name, one_line(error))
            )
        if user is None:
            return statuses(
                status=statuses.USER_NOT_FOUND,
                failure_reason=_cannot(what, name, "nobody has uid 1000"),
            )
        return statuses(status=statuses.SUCCESS, username=user.name, homedir=user.home)

    async def SetUpUser(
        self,
        request: pb.SetUpUserRequest,
        context: grpc.aio.ServicerContext[pb.SetUpUserRequest, pb.SetUpUserResponse],
    ) -> pb.SetUpUserResponse:
        """Makes the primary user of a container, running or not."""
        del context
        name = request.container_name
        statuses = pb.SetUpUserResponse
        problem = name_problem(name)
        if not problem:
            lock = self._account_locks.setdefault(name, asyncio.Lock())
            try:
                async with lock:
                    plan = await self._session.lxd.in_thread(
                        functools.partial(
                            set_up_user,
                            self._session.lxd.socket_path,
                            name,
                            request.container_username,
                            flush=self._session.flush,
                        )
                    )
            except FileNotFoundError as error:
                problem = str(error.strerror or error)
            except (AccountError, LxdError, OSError) as error:
                problem = one_line(error)
            finally:
                if not lock.locked():
                    self._account_locks.pop(name, None)
        if problem:
            problem = without_name(problem, request.container_username)
            reason = _cannot("set up the user of", name, problem)
            _log.warning("%s", reason)
            return statuses(status=statuses.FAILED, failure_reason=reason)
        _log.info("container %s has its user", name)
        return statuses(
            status=statuses.EXISTS if plan.existed else statuses.SUCCESS, username=plan.user.name
        )

    async def GetContainerInfo(
        self,
        request: pb.GetContainerInfoRequest,
        context: grpc.aio.ServicerContext[pb.GetContainerInfoRequest, pb.GetContainerInfoResponse],
    ) -> pb.GetContainerInfoResponse:
        """Whether a container runs, and its address."""
        del context
        name = request.container_name
        statuses = pb.GetContainerInfoResponse
        if problem := name_problem(name):
            return statuses(
                status=statuses.NOT_FOUND, failure_reason=_cannot("look at", name, problem)
            )
        try:
            return await container_info(self._session, name)
        except LxdError as error:
            return statuses(
                status=statuses.FAILED, failure_reason=_cannot("look at", name, one_line(error))
            )

    async def SetTimezone(
        self,
        request: pb.SetTimezoneRequest,
        context: grpc.aio.ServicerContext[pb.SetTimezoneRequest, pb.SetTimezoneResponse],
    ) -> pb.SetTimezoneResponse:
        """Sets the local time of the containers that are named."""
        del context
        problem = timezone_problem(request.timezone_name, request.posix_tz_string)
        response = pb.SetTimezoneResponse()
        for name in request.container_names:
            try:
                why = problem or name_problem(name) or await self._set_timezone(name, request)
            except (LxdError, OSError) as error:
                why = one_line(error)
            if why:
                response.failure_reasons.append(_cannot("set the time zone of", name, why))
            else:
                response.successes += 1
        return response

    async def _set_timezone(self, name: str, request: pb.SetTimezoneRequest) -> str:
        lxd = self._session.lxd
        known = await lxd.in_thread(set_timezone, lxd.socket_path, name, request.timezone_name)
        if not known and not request.posix_tz_string:
            return "it does not know the zone, and there is no POSIX string"
        # Programs that are started in the container go by TZ where there are no zone files.
        wanted = "" if known else request.posix_tz_string
        instance = await self._session.instance(name)
        if instance is None:
            return "there is no such container"
        if instance["config"].get("environment.TZ", "") != wanted:
            await lxd.request(
                "patch", "instances", name, json={"config": {"environment.TZ": wanted}}
            )
        return ""

    async def HostNetworkChanged(
        self,
        request: pb.HostNetworkChangedRequest,
        context: grpc.aio.ServicerContext[
            pb.HostNetworkChangedRequest, pb.HostNetworkChangedResponse
        ],
    ) -> pb.HostNetworkChangedResponse:
        """The containers' name server forgets what it learned on the old network."""
        del request, context
        await asyncio.to_thread(forget_names, self._session.settings.lxd_dir)
        return pb.HostNetworkChangedResponse()

    async def GetDebugInfo(
        self,
        request: pb.GetDebugInfoRequest,
        context: grpc.aio.ServicerContext[pb.GetDebugInfoRequest, pb.GetDebugInfoResponse],
    ) -> pb.GetDebugInfoResponse:
        """What a person who looks for a fault wants to know first."""
        del request, context
        return pb.GetDebugInfoResponse(debug_information=await debug_info(self._session))

    async def AttachUsbToContainer(
        self,
        request: pb.AttachUsbToContainerRequest,
        context: grpc.aio.ServicerContext[
            pb.AttachUsbToContainerRequest, pb.AttachUsbToContainerResponse
        ],
    ) -> pb.AttachUsbToContainerResponse:
        """Gives a container the USB device at a port."""
        del context
        name = request.container_name
        statuses = pb.AttachUsbToContainerResponse
        what = f"attach the USB device at port {request.port_num} to"
        try:
            if name_problem(name) or await self._session.instance(name) is None:
                return statuses(
                    status=statuses.NO_SUCH_CONTAINER,
                    failure_reason=_cannot(what, name, "there is no such container"),
                )
            await attach_usb(self._session, name, request.port_num)
        except (DeviceError, LxdError) as error:
            return statuses(
                status=statuses.FAILED, failure_reason=_cannot(what, name, one_line(error))
            )
        return statuses(status=statuses.OK)

    async def DetachUsbFromContainer(
        self,
        request: pb.DetachUsbFromContainerRequest,
        context: grpc.aio.ServicerContext[
            pb.DetachUsbFromContainerRequest, pb.DetachUsbFromContainerResponse
        ],
    ) -> pb.DetachUsbFromContainerResponse:
        """Takes the USB device at a port away from the container that has it."""
        del context
        statuses = pb.DetachUsbFromContainerResponse
        try:
            await detach_usb(self._session, request.port_num)
        except (DeviceError, LxdError) as error:
            return statuses(
                status=statuses.FAILED,
                failure_reason=f"cannot detach the USB device at port {request.port_num}: "
                f"{one_line(error)}",
            )
        return statuses(status=statuses.OK)

    async def UpdateContainerDevices(
        self,
        request: pb.UpdateContainerDevicesRequest,
        context: grpc.aio.ServicerContext[
            pb.UpdateContainerDevicesRequest, pb.UpdateContainerDevicesResponse
        ],
    ) -> pb.UpdateContainerDevicesResponse:
        """Gives a container devices of the VM, or takes them away."""
        del context
        name = request.container_name
        statuses = pb.UpdateContainerDevicesResponse
        what = "update the devices of"
        try:
            if name_problem(name) or await self._session.instance(name) is None:
                return statuses(
                    status=statuses.NO_SUCH_CONTAINER,
                    failure_reason=_cannot(what, name, "there is no such container"),
                )
            results = await update_devices(self._session, name, dict(request.updates))
        except LxdError as error:
            return statuses(
                status=statuses.FAILED, failure_reason=_cannot(what, name, one_line(error))
            )
        return statuses(status=statuses.OK, results=results)

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
        if not problem and self._session.operation(Export, name):
            problem = "it is being exported already"
        if problem:
            return statuses(status=statuses.FAILED, failure_reason=_cannot("export", name, problem))
        self._begin(Export, request, context)
        return statuses(status=statuses.EXPORTING)

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
        name = request.container_name
        statuses = pb.ImportContainerResponse
        problem = name_problem(name) or await asyncio.to_thread(import_problem, request.import_path)
        if not problem and self._session.operation(Import, name):
            problem = "it is being imported already"
        if problem:
            return statuses(status=statuses.FAILED, failure_reason=_cannot("import", name, problem))
        self._begin(Import, request, context)
        return statuses(status=statuses.IMPORTING)

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

    def _begin(
        self,
        kind: type[OperationT],
        request: Any,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> OperationT:
        # Another call may have begun it while this one asked LXD something.
        operation = self._session.operation(kind, request.container_name)
        if operation is not None:
            return operation
        begun = kind(self._session, request)

        def answered(_: object) -> None:
            begun.answered.set()

        context.add_done_callback(answered)  # type: ignore[arg-type]  # no Protocol in the stubs
        begun.start()
        return begun


def resume(session: Session) -> None:
    """Carries on what a tremplin that was killed had begun."""
    kinds: dict[str, tuple[type[Operation], type[Message]]] = {
        Create.method: (Create, pb.CreateContainerRequest),
        Delete.method: (Delete, pb.DeleteContainerRequest),
        Export.method: (Export, pb.ExportContainerRequest),
        Import.method: (Import, pb.ImportContainerRequest),
        Start.method: (Start, pb.StartContainerRequest),
        Stop.method: (Stop, pb.StopContainerRequest),
    }
    for method, request, notes in session.journal.left_over():
        if method in kinds:
            operation, message = kinds[method]
            begun = operation(session, message.FromString(request))
            _log.info("carrying on to %s container %s", begun.verb, begun.container)
            begun.resume(notes)


def _cannot(verb: str, container: str, why: str) -> str:
    return f"cannot {verb} container {container}: {why}"


def _create_failed(container: str, why: str) -> pb.CreateContainerResponse:
    return pb.CreateContainerResponse(
        status=pb.CreateContainerResponse.FAILED, failure_reason=_cannot("create", container, why)
    )
