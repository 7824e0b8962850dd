"""What maitred does by itself once per boot: tells the host that the VM is ready, and launches the
startup files.
"""

from __future__ import annotations

import logging
import os

import grpc.aio

from agent.grpc_endpoint import HostChannel
from agent.options import HOST_CID, Address, VsockAddress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from agent.maitred.supervisor_connection import SupervisorConnection
    from agent.options import Options
    from agent.pb import vm_guest_pb2

    VmReadyCall = grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]

_log = logging.getLogger(__name__)

_VM_READY = "/vm_tools.StartupListener/VmReady"
_EMPTY_MESSAGE = b""

_MARKER = "vm-ready-sent"
_FIELDS_OF_THE_REQUEST = frozenset({"argv", "env", "name", "respawn", "console", "once"})
_RETRY_FIRST_SECONDS = 0.1
_RETRY_MAX_SECONDS = 2.0


def startup_listener(options: Options) -> Address | None:
    """Where the host is told; None when nobody is to be told."""
    address = options.host_address("maitred.startup_listener", listen="maitred.listen")
    port = options["maitred.listen_port"]
    if port is not None and (address is None or isinstance(address, VsockAddress)):
        if address is None:
            return None
        return VsockAddress(port, HOST_CID if address.cid is None else address.cid)
    return address


async def tell_host(address: Address, *, run_dir: str) -> None:
    """Calls VmReady, once per boot, until the host has answered.

    The call has no deadline: hosts do everything they want done from inside of it.
    """
    marker = f"{run_dir}/{_MARKER}"
    if os.path.exists(marker):
        return
    host = HostChannel(address, run_dir=run_dir, name="startup-listener")
    async with host as channel:
        # No protobuf yet: its import would make up a quarter of the time until here.
        vm_ready: VmReadyCall = channel.unary_unary(_VM_READY)
        try:
            await vm_ready(_EMPTY_MESSAGE)
        except grpc.aio.AioRpcError as error:
            _log.warning("the host at %s does not answer VmReady: %s", address, _reason(error))
            await _call_until_answered(vm_ready)
    os.close(os.open(marker, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
    _log.info("the host knows that the VM is ready")


async def _call_until_answered(vm_ready: VmReadyCall) -> None:
    import tenacity

    async for attempt in tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type(grpc.aio.AioRpcError),
        wait=tenacity.wait_random_exponential(_RETRY_FIRST_SECONDS, _RETRY_MAX_SECONDS),
    ):
        with attempt:
            await vm_ready(_EMPTY_MESSAGE)


def _reason(error: grpc.aio.AioRpcError) -> str:
    return f"{error.code().name} {error.details() or ''}".strip()


async def launch_startup_files(directory: str, supervisor: SupervisorConnection) -> None:
    """Launches the LaunchProcessRequest of each *.textproto in directory, in the order of names.

    FILE.json beside FILE.textproto holds what a request cannot say: the fields of ProcessSpec that
    confine a process (user, no_new_privs, capabilities, rlimits, memory_max ...), say how it is
    stopped, or make it back off. Each one is launched once per boot; one that waits for its exit
    holds up the next. A bad file is logged and passed over.
    """
    files = list(_startup_files(directory))
    if not files:
        return
    from agent.maitred import processes
    from agent.maitred.errors import CallError
    from agent.pb import vm_guest_pb2
    from agent.process_supervisor.client import SupervisorError

    for name, request, options in files:
        try:
            response = await processes.launch(
                supervisor, request, name=f"startup:{name}", once=True, options=options
            )
        except (CallError, SupervisorError) as error:
            _log.error("startup file %s: %s", name, error)
        else:
            status = vm_guest_pb2.ProcessStatus.Name(response.status)
            _log.info("startup file %s: %s", name, status.lower())


def _startup_files(
    directory: str,
) -> Iterator[tuple[str, vm_guest_pb2.LaunchProcessRequest, dict[str, Any]]]:
    try:
        names = sorted(name for name in os.listdir(directory) if name.endswith(".textproto"))
    except FileNotFoundError:
        return
    except OSError as error:
        _log.error("cannot read startup files: %s", error)
        return
    if not names:
        return
    from google.protobuf import text_format

    from agent.pb import vm_guest_pb2

    for name in names:
        request = vm_guest_pb2.LaunchProcessRequest()
        try:
            with open(f"{directory}/{name}", encoding="utf-8") as file:
                text_format.Parse(file.read(), request)
            options = _process_options(f"{directory}/{name.removesuffix('.textproto')}.json")
        except (OSError, ValueError, text_format.ParseError) as error:
            _log.error("startup file %s: cannot read it: %s", name, error)
            continue
        yield name, request, options


def _process_options(path: str) -> dict[str, Any]:
    """The options in a file, none when there is no such file.

    Raises OSError; ValueError: a process that was to be confined is not launched without.
    """
    import json

    from agent.process_supervisor.client import SupervisorError, check_options

    try:
        with open(path, encoding="utf-8") as file:
            options = json.load(file)
    except FileNotFoundError:
        return {}
    if not isinstance(options, dict):
        raise ValueError(f"{path} is not a JSON object")  # noqa: TRY004  # of the file, not ours
    if said_elsewhere := options.keys() & _FIELDS_OF_THE_REQUEST:
        raise ValueError(f"{path} is no place for {', '.join(sorted(said_elsewhere))}")
    try:
        check_options(options)
    except SupervisorError as error:
        raise ValueError(f"{path}: {error}") from None
    return options
