"""Tells the host's CrashListener when a process that is respawned has ended; best effort."""

from __future__ import annotations

import logging

import grpc

from agent.grpc_endpoint import HostChannel
from agent.pb import vm_crash_pb2, vm_crash_pb2_grpc
from agent.process_supervisor.client import AsyncClient, SupervisorError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agent.options import Address
    from agent.process_supervisor.client import Event

_log = logging.getLogger(__name__)

_CALL_SECONDS = 5.0
_RETRY_FIRST_SECONDS = 0.1
_RETRY_MAX_SECONDS = 5.0

_OWN = frozenset({"tremplin", "log-forwarder", "shell"})
"""Keys of this agent's own, whose program is the Python interpreter."""


async def follow(address: Address, *, run_dir: str) -> None:
    """Reports until it is cancelled. A report that the host does not take is lost, and so is what
    ends while there is no connection to PID 1.
    """
    host = HostChannel(address, run_dir=run_dir, name="crash-listener")
    async with host as channel:
        stub = vm_crash_pb2_grpc.CrashListenerStub(channel)
        try:
            await _report_all(stub, run_dir=run_dir)
        except SupervisorError as error:
            _log.warning("cannot report crashes for the moment: %s", error)
            await _report_again_and_again(stub, run_dir=run_dir)


async def _report_again_and_again(
    stub: vm_crash_pb2_grpc.CrashListenerAsyncStub, *, run_dir: str
) -> None:
    import tenacity

    async for attempt in tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type(SupervisorError),
        wait=tenacity.wait_random_exponential(_RETRY_FIRST_SECONDS, _RETRY_MAX_SECONDS),
    ):
        with attempt:
            await _report_all(stub, run_dir=run_dir)


async def _report_all(stub: vm_crash_pb2_grpc.CrashListenerAsyncStub, *, run_dir: str) -> None:
    """Reports until the connection to PID 1 is lost: raises SupervisorGone."""
    # Events have a connection of their own, so that a burst of them delays no call.
    async with await AsyncClient.connect(run_dir) as client:
        async for event in client.events():
            if event.name == "exited" and event.fields.get("respawn"):
                await _report(stub, _failed_process(event))


def _failed_process(event: Event) -> str:
    return event.key if event.key in _OWN else str(event.fields["program"])


async def _report(stub: vm_crash_pb2_grpc.CrashListenerAsyncStub, program: str) -> None:
    try:
        await stub.SendFailureReport(
            vm_crash_pb2.FailureReport(failed_process=program), timeout=_CALL_SECONDS
        )
    except grpc.aio.AioRpcError as error:
        _log.debug("the host does not take the report on %s: %s", program, error.code().name)
