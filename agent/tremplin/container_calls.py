"""The RPCs about a container that are answered when what they ask for is done: each one checks what
it was given, hands it on, and says what came of it.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from concurrent.futures import ThreadPoolExecutor
from weakref import WeakValueDictionary

from agent.pb import tremplin_pb2 as pb
from agent.pb.tremplin_pb2_grpc import TremplinServicer
from agent.tremplin.accounts import AccountError, without_name
from agent.tremplin.debug_info import debug_info
from agent.tremplin.devices import DeviceError, attach_usb, detach_usb, update_devices
from agent.tremplin.info import container_info
from agent.tremplin.lxd_client import LxdError
from agent.tremplin.name_server import forget_names
from agent.tremplin.names import name_problem
from agent.tremplin.operation import cannot, one_line
from agent.tremplin.set_up_user import read_primary_user, set_up_user
from agent.tremplin.timezone import set_timezone, timezone_problem

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    import grpc.aio

    from agent.tremplin.session import Session

    T = TypeVar("T")

_log = logging.getLogger(__name__)

_THREADS = 8
"""Containers whose files are looked at at once."""


class ContainerCalls(TremplinServicer):
    """Users, addresses, time zones, devices, and what a person who looks for a fault wants."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="files")
        self._in_hand: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def _with_files_of(
        self, container: str, function: Callable[..., T], *args: Any, **named: Any
    ) -> T:
        # A container may let whoever looks at its files wait: not those who look at others, nor
        # those who ask LXD. So one at a time, to the end, also when the host has hung up.
        lock = self._in_hand.setdefault(container, asyncio.Lock())
        await lock.acquire()
        work = functools.partial(function, self._session.lxd.socket_path, container, *args, **named)
        future = asyncio.get_running_loop().run_in_executor(self._threads, work)

        def ended(_: asyncio.Future[T]) -> None:
            if not future.cancelled():
                future.exception()  # the host may have hung up, and nobody wants to know it
            lock.release()

        future.add_done_callback(ended)
        return await asyncio.shield(future)

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
                    failure_reason=cannot(what, name, "there is no such container"),
                )
            if instance["status"] != "Running":
                return statuses(
                    status=statuses.CONTAINER_NOT_RUNNING,
                    failure_reason=cannot(what, name, "it is not running"),
                )
            user = await self._with_files_of(name, read_primary_user)
        except (AccountError, LxdError, OSError) as error:
            return statuses(status=statuses.FAILED, failure_reason=cannot(what, name, error))
        if user is None:
            return statuses(
                status=statuses.USER_NOT_FOUND,
                failure_reason=cannot(what, name, "nobody has uid 1000"),
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
            try:
                plan = await self._with_files_of(
                    name, set_up_user, request.container_username, flush=self._session.flush
                )
            except FileNotFoundError as error:
                problem = str(error.strerror or error)
            except (AccountError, LxdError, OSError) as error:
                problem = one_line(error)
        if problem:
            problem = without_name(problem, request.container_username)
            reason = cannot("set up the user of", name, problem)
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
                status=statuses.NOT_FOUND, failure_reason=cannot("look at", name, problem)
            )
        try:
            return await container_info(self._session, name)
        except LxdError as error:
            return statuses(status=statuses.FAILED, failure_reason=cannot("look at", name, error))

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
                response.failure_reasons.append(cannot("set the time zone of", name, why))
            else:
                response.successes += 1
        return response

    async def _set_timezone(self, name: str, request: pb.SetTimezoneRequest) -> str:
        known = await self._with_files_of(name, set_timezone, request.timezone_name)
        if not known and not request.posix_tz_string:
            return "it does not know the zone, and there is no POSIX string"
        # Programs that are started in the container go by TZ where there are no zone files.
        wanted = "" if known else request.posix_tz_string
        instance = await self._session.instance(name)
        if instance is None:
            return "there is no such container"
        if instance["config"].get("environment.TZ", "") != wanted:
            await self._session.lxd.request(
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
            if await self._is_missing(name):
                return statuses(
                    status=statuses.NO_SUCH_CONTAINER,
                    failure_reason=cannot(what, name, "there is no such container"),
                )
            await attach_usb(self._session, name, request.port_num)
        except (DeviceError, LxdError) as error:
            return statuses(status=statuses.FAILED, failure_reason=cannot(what, name, error))
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

    async def _is_missing(self, name: str) -> bool:
        return bool(name_problem(name)) or await self._session.instance(name) is None

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
            if await self._is_missing(name):
                return statuses(
                    status=statuses.NO_SUCH_CONTAINER,
                    failure_reason=cannot(what, name, "there is no such container"),
                )
            results = await update_devices(self._session, name, dict(request.updates))
        except LxdError as error:
            return statuses(status=statuses.FAILED, failure_reason=cannot(what, name, error))
        return statuses(status=statuses.OK, results=results)
