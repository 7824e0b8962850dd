"""Upgrade in place: PID 1 executes itself anew, and its table, its children, their output and its
clients with what they wait for go over. Here is what the old program does; takeover.py is the new
one. What is handed over lies in a memfd: a line of JSON, then what the processes have printed.
"""

from __future__ import annotations

import binascii
import os
import sys

from agent.console import write_line
from agent.lean_stdlib import dumps, signal
from agent.process_supervisor import STATE_VARIABLE
from agent.process_supervisor.output import RING
from agent.process_supervisor.protocol import ProcessSpec, ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from agent.process_supervisor.control import Connection
    from agent.process_supervisor.supervisor import Supervisor
    from agent.process_supervisor.table import Process

FORMAT = 3

SAVED = (
    *("serial", "key", "state", "pid", "starts", "recent_starts", "started_at", "ended_at"),
    *("last_exit", "stop_reason", "failures", "spoke"),
)
"""What is handed over of a Process as it is."""

_CHECK = "upgrade-check"


def upgrade(supervisor: Supervisor, answer: Callable[[str], None]) -> None:
    """Executes the program as it is on the disk now, after a child has tried to take over with it.

    answer: told why it is not possible, or "" just before.
    """
    try:
        if any(process.key == _CHECK and process.pid is not None for process in supervisor.table):
            raise ProtocolError("EALREADY", "another upgrade is under way")
        state = _write_state(supervisor, printed=False)
    except (OSError, ProtocolError) as error:
        answer(str(error))
        return
    try:
        check, _ = supervisor.table.launch(ProcessSpec(_check_command(state), name=_CHECK))
    except ProtocolError as error:
        os.close(state)
        answer(str(error))
        return

    def checked() -> None:
        os.close(state)
        _execute_when_possible(supervisor, check, answer)

    supervisor.table.wait(check.key, answer, checked)


def _check_command(state: int) -> list[str]:
    """A command that succeeds when the program as it is on the disk now can go on with a state."""
    path = f"/proc/{os.getpid()}/fd/{state}"
    code = (
        f"import sys; sys.path[:] = {sys.path!r};"
        f"from agent.process_supervisor.takeover import rehearse; rehearse({path!r})"
    )
    return [sys.executable, "-I", "-c", code]


def _execute_when_possible(
    supervisor: Supervisor, check: Process, answer: Callable[[str], None]
) -> None:
    if supervisor.shutting_down:
        answer("shutting down")
        return
    if check.last_exit != ("exited", 0):
        printed = check.ring.read(0, RING)[1].decode(errors="replace") if check.ring else ""
        reason = (printed.splitlines() or ["no reason given"])[-1]
        answer(f"the new program cannot go on from here: {reason}")
        return
    answer("")
    write_line("init", "executing the program anew")
    try:
        _execute(supervisor)
    except OSError as error:
        write_line("init", f"cannot execute the program anew: {error.strerror}")


def _execute(supervisor: Supervisor) -> None:
    """Does not return, unless by OSError: then everything is as before."""
    control, outputs = supervisor.control, supervisor.outputs
    descriptors = [fd for _address, _key, fd, _reserved in supervisor.listeners.save()]
    descriptors += outputs.pipes
    if control:
        descriptors += [control.server.fileno(), *(client.fd for client in control.clients)]
    state = _write_state(supervisor, printed=True)
    handled = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGPWR, signal.SIGUSR2)
    try:
        for fd in (*descriptors, state):
            os.set_inheritable(fd, True)
        # They stay pending until the new program has its handlers.
        signal.pthread_sigmask(signal.SIG_BLOCK, handled)
        execute_with(state)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, handled)
        for fd in descriptors:
            os.set_inheritable(fd, False)
        os.close(state)


def execute_with(state: int) -> None:
    """Executes this program anew with a state; does not return, unless by OSError."""
    env = {**os.environ, STATE_VARIABLE: str(state)}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], env)


def _write_state(supervisor: Supervisor, *, printed: bool) -> int:
    """A memfd with everything, with or without what processes have printed. Raises OSError."""
    control = supervisor.control
    rings = [(process.key, process.ring) for process in supervisor.table if process.ring]
    head = {
        "format": FORMAT,
        "own": {
            "started_at": supervisor.started_at,
            "orphans": supervisor.orphans,
            "upgrades": supervisor.upgrades + 1,
        },
        "processes": [_save_process(process) for process in supervisor.table],
        "server": control.server.fileno() if control else None,
        "listeners": supervisor.listeners.save(),
        "clients": [_save_client(client) for client in control.clients] if control else [],
        "pipes": [
            [pipe.fd, pipe.name, pipe.pid, pipe.logged]
            for pipe in supervisor.outputs.pipes.values()
        ],
        "rings": [[key, ring.end, len(ring.read(0, RING)[1])] for key, ring in rings],
    }
    state = os.memfd_create("process-supervisor")
    try:
        with open(state, "wb", closefd=False) as file:
            file.write(dumps(head).encode() + b"\n")
            if printed:
                file.writelines(ring.read(0, RING)[1] for _key, ring in rings)
    except BaseException:
        os.close(state)
        raise
    return state


def _save_process(process: Process) -> dict[str, Any]:
    row = {name: getattr(process, name) for name in SAVED}
    row["spec"] = process.spec.to_wire()
    row["due"] = process.timer.due if process.timer else None
    return row


def _save_client(client: Connection) -> dict[str, Any]:
    return {
        "fd": client.fd,
        "pid": client.pid,
        "input": _text(client.input),
        "output": _text(client.output),
        "following": [[number, output] for number, output in client.following.items()],
        "waiting": [
            [number, kind, process.key, fields]
            for number, (kind, process, fields) in client.waiting.items()
        ],
    }


def _text(data: bytearray) -> str:
    return binascii.b2a_base64(data, newline=False).decode()
