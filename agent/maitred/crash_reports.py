"""Tells the host's CrashListener when a process that is respawned has ended; best effort."""

from __future__ import annotations

import logging

import grpc

from agent.grpc_endpoint import HostChannel
from agent.maitred.processes import program_name
from agent.pb import vm_crash_pb2, vm_crash_pb2_grpc
from agent.process_supervisor.client import AsyncClient, SupervisorError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agent.options import Address

_log = logging.getLogger(__name__)

_CALL_SECONDS = 5.0


async def follow(address: Address, *, run_dir: str) -> None:
    """Reports until PID 1 is gone. A report that the host does not take is lost."""
    host = HostChannel(address, run_dir=run_dir, name="crash-listener")
    async with host as channel:
        stub = vm_crash_pb2_grpc.CrashListenerStub(channel)
        try:
            # Events have a connection of their own, so that a burst of them delays no call.
            async with (
                await AsyncClient.connect(run_dir) as follower,
                await AsyncClient.connect(run_dir) as asker,
            ):
                async for event in follower.events():
                    if event.name == "exited" and event.fields.get("respawn"):
                        await _report(stub, await _failed_process(asker, event.key))
        except SupervisorError as error:
            _log.warning("cannot report crashes any more: %s", error)


async def _failed_process(client: AsyncClient, key: str) -> str:
    try:
        return program_name((await client.info(key))["argv"][0])
    except (SupervisorError, LookupError):
        return key


async def _report(stub: vm_crash_pb2_grpc.CrashListenerAsyncStub, program: str) -> None:
    try:
        await stub.SendFailureReport(
            vm_crash_pb2.FailureReport(failed_process=program), timeout=_CALL_SECONDS
        )
    except grpc.aio.AioRpcError as error:
        _log.debug("the host does not take the report on %s: %s", program, error.code().name)
