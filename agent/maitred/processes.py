"""LaunchProcess: what the host wants run becomes a request to PID 1, which spawns it."""

from __future__ import annotations

import logging
import os

from agent.maitred.errors import BadRequest
from agent.pb import vm_guest_pb2
from agent.process_supervisor.client import SupervisorError, SupervisorGone

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from agent.maitred.supervisor_connection import SupervisorConnection
    from agent.process_supervisor.client import Exit

_log = logging.getLogger(__name__)

# What PID 1 answers when the request, and not the program, is at fault.
_BAD_REQUEST_CODES = frozenset({"EINVAL", "E2BIG", "EMSGSIZE"})


def check_launch(request: vm_guest_pb2.LaunchProcessRequest) -> None:
    """Raises BadRequest: the request contradicts itself, or no process can have these words."""
    if not request.argv or not request.argv[0]:
        raise BadRequest("cannot launch a process: argv is empty")
    if request.respawn and request.wait_for_exit:
        raise BadRequest(
            "cannot launch a process: respawn and wait_for_exit exclude each other, as a process "
            "that is started again and again has no one exit to wait for"
        )
    if any("\0" in word for word in request.argv):
        raise BadRequest("cannot launch a process: argv has a NUL character in it")
    for key, value in request.env.items():
        if not key or "=" in key or "\0" in key or "\0" in value:
            raise BadRequest("cannot launch a process: env has a key or value that no process has")


async def launch(
    supervisor: SupervisorConnection,
    request: vm_guest_pb2.LaunchProcessRequest,
    *,
    name: str = "",
    once: bool = False,
    options: Mapping[str, Any] | None = None,
) -> vm_guest_pb2.LaunchProcessResponse:
    """Has PID 1 spawn the process; with wait_for_exit, returns when it has ended.

    name, once, options: as for ProcessSpec; options are what a request cannot say.
    The result says FAILED when the program cannot be executed. When the caller is cancelled, the
    process goes on.
    Raises BadRequest; SupervisorGone: PID 1 is not there, or went away during the wait.
    """
    check_launch(request)
    client = await supervisor.client()
    try:
        launched = await client.launch(
            list(request.argv),
            env=dict(request.env),
            respawn=request.respawn,
            console=request.use_console,
            wait=request.wait_for_exit,
            name=name,
            once=once,
            **(options or {}),
        )
    except SupervisorGone:
        raise
    except SupervisorError as error:
        if error.code in _BAD_REQUEST_CODES:
            raise BadRequest(str(error)) from None
        _log.warning("cannot launch %s: %s", program_name(request.argv[0]), error.code)
        return vm_guest_pb2.LaunchProcessResponse(status=vm_guest_pb2.FAILED)
    if launched.exit is None:
        return vm_guest_pb2.LaunchProcessResponse(status=vm_guest_pb2.LAUNCHED)
    return _exit_response(launched.exit)


def _exit_response(ended: Exit) -> vm_guest_pb2.LaunchProcessResponse:
    status = vm_guest_pb2.EXITED if ended.status == "exited" else vm_guest_pb2.SIGNALED
    return vm_guest_pb2.LaunchProcessResponse(status=status, code=ended.code)


def program_name(argv0: str) -> str:
    """What may be said about a process in a log: its program, never its arguments, among which
    names of people are.
    """
    return os.path.basename(argv0) or argv0
