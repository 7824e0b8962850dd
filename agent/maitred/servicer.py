"""The Maitred service: each method checks, delegates to the module of its subject, and maps what
comes back. Subjects are imported when they are first needed, as each costs the start of the VM.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
from typing import cast

import grpc.aio

from agent.maitred.errors import BadRequest, CallError, Failed, NotNow
from agent.maitred.unbroken import to_the_end
from agent.options import VsockAddress
from agent.pb import common_pb2, vm_guest_pb2, vm_guest_pb2_grpc
from agent.process_supervisor.client import SupervisorError, SupervisorGone

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import Any, TypeVar

    from agent.maitred.filesystem_size import FilesystemSize
    from agent.maitred.supervisor_connection import SupervisorConnection
    from agent.maitred.termina import Termina
    from agent.options import Options

    RequestT = TypeVar("RequestT")
    ResponseT = TypeVar("ResponseT")

_log = logging.getLogger(__name__)

_DETAILS_MAX = 1000
"""Characters; details travel as a header, whose length is limited."""

_STATUS: dict[type[Exception], grpc.StatusCode] = {
    BadRequest: grpc.StatusCode.INVALID_ARGUMENT,
    NotNow: grpc.StatusCode.FAILED_PRECONDITION,
    Failed: grpc.StatusCode.INTERNAL,
    SupervisorGone: grpc.StatusCode.UNAVAILABLE,
    SupervisorError: grpc.StatusCode.INTERNAL,
}


def _of_aio(context: object) -> grpc.aio.ServicerContext[Any, Any]:
    """The generated base class leaves open whose context it is; here it is asyncio's."""
    return cast("grpc.aio.ServicerContext[Any, Any]", context)


def _mapped(
    method: Callable[[Any, RequestT, object], Awaitable[ResponseT]],
) -> Callable[[Any, RequestT, object], Awaitable[ResponseT]]:
    """Gives each error its status code, and the reason as details."""

    @functools.wraps(method)
    async def call(self: Any, request: RequestT, context: object) -> ResponseT:
        try:
            return await method(self, request, context)
        except (CallError, SupervisorError) as error:
            code, details = _STATUS.get(type(error), grpc.StatusCode.INTERNAL), str(error)
            _log.warning("%s: %s", method.__name__, details)
        except Exception as error:  # noqa: BLE001  # the boundary of the service: logged below
            code = grpc.StatusCode.INTERNAL
            details = f"cannot serve {method.__name__}: {type(error).__name__}: {error}"
            _log.exception("cannot serve %s", method.__name__)
        await _of_aio(context).abort(code, details[:_DETAILS_MAX])
        raise AssertionError("abort() raises")

    return call


class Maitred(vm_guest_pb2_grpc.MaitredServicer):
    """Served by grpc.aio; any number of calls at once."""

    def __init__(self, options: Options, supervisor: SupervisorConnection) -> None:
        self._options = options
        self._supervisor = supervisor
        self._network_change = asyncio.Lock()
        self._user_change = asyncio.Lock()
        self._shutting_down: asyncio.Future[None] | None = None

    @functools.cached_property
    def _termina(self) -> Termina:
        from agent.maitred.termina import Termina

        return Termina(self._options, self._supervisor)

    @functools.cached_property
    def _filesystem_size(self) -> FilesystemSize:
        from agent.maitred.filesystem_size import FilesystemSize

        return FilesystemSize(self._options["maitred.stateful_dir"])

    @_mapped
    async def ConfigureNetwork(
        self, request: vm_guest_pb2.NetworkConfigRequest, context: object
    ) -> common_pb2.EmptyMessage:
        from agent.maitred import ipv4, network, resolv_conf

        config = ipv4.check_config(request.ipv4_config)
        has_servers = request.HasField("resolv_config")
        servers = resolv_conf.content(request.resolv_config) if has_servers else None
        name = self._options["maitred.interface"]

        async def change() -> None:
            async with self._network_change:
                await network.configure(
                    name,
                    config,
                    resolv_conf_path=self._options["maitred.resolv_conf"],
                    name_servers=servers,
                )

        await to_the_end(change())
        _log.info("%s is %s", name, config)
        return common_pb2.EmptyMessage()

    @_mapped
    async def Mount(
        self, request: vm_guest_pb2.MountRequest, context: object
    ) -> vm_guest_pb2.MountResponse:
        from agent.maitred import mounts

        return vm_guest_pb2.MountResponse(error=await to_the_end(mounts.mount(request)))

    @_mapped
    async def LaunchProcess(
        self, request: vm_guest_pb2.LaunchProcessRequest, context: object
    ) -> vm_guest_pb2.LaunchProcessResponse:
        from agent.maitred import processes

        return await processes.launch(self._supervisor, request)

    @_mapped
    async def StartTermina(
        self, request: vm_guest_pb2.StartTerminaRequest, context: object
    ) -> vm_guest_pb2.StartTerminaResponse:
        return await to_the_end(self._termina.start(request))

    @_mapped
    async def SetResolvConfig(
        self, request: vm_guest_pb2.SetResolvConfigRequest, context: object
    ) -> common_pb2.EmptyMessage:
        from agent.maitred import resolv_conf

        if not request.HasField("resolv_config"):
            raise BadRequest("cannot set the name servers: resolv_config is missing")
        text = resolv_conf.content(request.resolv_config)
        resolv_conf.replace(self._options["maitred.resolv_conf"], text)
        return common_pb2.EmptyMessage()

    @_mapped
    async def OnHostNetworkChanged(
        self, request: common_pb2.EmptyMessage, context: object
    ) -> common_pb2.EmptyMessage:
        from agent.maitred import network_change

        client = await self._supervisor.client()

        async def change() -> None:
            async with self._network_change:
                interface = self._options["maitred.interface"]
                await network_change.forget_neighbours(interface)
                network_change.reset_ipv6(interface)
                await network_change.renew_leases(client)

        await to_the_end(change())
        return common_pb2.EmptyMessage()

    @_mapped
    async def ResetIPv6(
        self, request: common_pb2.EmptyMessage, context: object
    ) -> common_pb2.EmptyMessage:
        from agent.maitred import network_change

        async with self._network_change:
            network_change.reset_ipv6(self._options["maitred.interface"])
        return common_pb2.EmptyMessage()

    @_mapped
    async def Mount9P(
        self, request: vm_guest_pb2.Mount9PRequest, context: object
    ) -> vm_guest_pb2.MountResponse:
        from agent.maitred import mount_9p

        has_vsock = isinstance(self._options["maitred.listen"], VsockAddress)
        error = await to_the_end(mount_9p.mount(request, has_vsock=has_vsock))
        return vm_guest_pb2.MountResponse(error=error)

    @_mapped
    async def SetTime(
        self, request: vm_guest_pb2.SetTimeRequest, context: object
    ) -> common_pb2.EmptyMessage:
        from agent.maitred import clock

        clock.set_time(clock.check(request.time), is_own_machine=self._options["maitred.setup"])
        return common_pb2.EmptyMessage()

    @_mapped
    async def SetTimezone(
        self, request: vm_guest_pb2.SetTimezoneRequest, context: object
    ) -> common_pb2.EmptyMessage:
        from agent.maitred import timezone

        timezone.set_timezone(
            timezone.check(request.timezone_name), use_bind_mount=request.use_bind_mount
        )
        return common_pb2.EmptyMessage()

    @_mapped
    async def GetKernelVersion(
        self, request: common_pb2.EmptyMessage, context: object
    ) -> vm_guest_pb2.GetKernelVersionResponse:
        kernel = os.uname()
        return vm_guest_pb2.GetKernelVersionResponse(
            kernel_release=kernel.release, kernel_version=kernel.version
        )

    @_mapped
    async def ResizeFilesystem(
        self, request: vm_guest_pb2.ResizeFilesystemRequest, context: object
    ) -> vm_guest_pb2.ResizeFilesystemResponse:
        return vm_guest_pb2.ResizeFilesystemResponse(
            status=self._filesystem_size.resize(request.size)
        )

    @_mapped
    async def GetResizeStatus(
        self, request: common_pb2.EmptyMessage, context: object
    ) -> vm_guest_pb2.GetResizeStatusResponse:
        return self._filesystem_size.status()

    @_mapped
    async def GetResizeBounds(
        self, request: common_pb2.EmptyMessage, context: object
    ) -> vm_guest_pb2.GetResizeBoundsResponse:
        return vm_guest_pb2.GetResizeBoundsResponse(
            minimum_size=await self._filesystem_size.minimum()
        )

    @_mapped
    async def GetAvailableSpace(
        self, request: common_pb2.EmptyMessage, context: object
    ) -> vm_guest_pb2.GetAvailableSpaceResponse:
        return vm_guest_pb2.GetAvailableSpaceResponse(
            available_space=self._filesystem_size.available()
        )

    @_mapped
    async def PrepareToSuspend(
        self, request: common_pb2.EmptyMessage, context: object
    ) -> common_pb2.EmptyMessage:
        await asyncio.to_thread(os.sync)
        return common_pb2.EmptyMessage()

    @_mapped
    async def UpdateStorageBalloon(
        self, request: vm_guest_pb2.UpdateStorageBalloonRequest, context: object
    ) -> vm_guest_pb2.UpdateStorageBalloonResponse:
        if request.free_space_bytes < 0:
            raise BadRequest("cannot update the balloon: free_space_bytes is negative")
        if request.state == vm_guest_pb2.DISK_NONE:  # the host does not know
            return vm_guest_pb2.UpdateStorageBalloonResponse()
        done = await to_the_end(self._filesystem_size.adjust_balloon(request.free_space_bytes))
        return vm_guest_pb2.UpdateStorageBalloonResponse(
            result=vm_guest_pb2.SUCCESS if done else vm_guest_pb2.BALLOON_INFLATE_FAILED
        )

    @_mapped
    async def SetUpUser(
        self, request: vm_guest_pb2.SetUpUserRequest, context: object
    ) -> vm_guest_pb2.SetUpUserResponse:
        from agent.maitred import users

        async def change() -> vm_guest_pb2.SetUpUserResponse:
            async with self._user_change:
                return await users.set_up(request)

        return await to_the_end(change())

    @_mapped
    async def ConfigureContainerGuest(
        self, request: vm_guest_pb2.ConfigureContainerGuestRequest, context: object
    ) -> common_pb2.EmptyMessage:
        from agent.maitred import container_guest

        container_guest.check(request.container_token)
        container_guest.configure(request.container_token, request.vm_username)
        return common_pb2.EmptyMessage()

    @_mapped
    async def Shutdown(
        self, request: common_pb2.EmptyMessage, context: object
    ) -> common_pb2.EmptyMessage:
        client = await self._supervisor.client()  # known to be there before yes is said

        async def shut_down() -> None:
            try:
                await client.shutdown("the host asked for it")
            except SupervisorError as error:
                _log.error("cannot shut down: %s", error)

        def answered(*_: object) -> None:
            self._shutting_down = asyncio.ensure_future(shut_down())

        _of_aio(context).add_done_callback(answered)  # type: ignore[arg-type]  # stubs are wrong
        return common_pb2.EmptyMessage()
