"""Upgrade in place: PID 1 executes itself anew, and its table, its children, their output and its
clients with what they wait for go over. What is handed over lies in a memfd: a line of JSON, then
what the processes have printed.
"""

from __future__ import annotations

import binascii
import os
import sys

from agent.process_supervisor.control import Connection
from agent.process_supervisor.lean import dumps, loads, signal, socket
from agent.process_supervisor.output import RING, Ring

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, NoReturn

    from agent.process_supervisor.control import Control
    from agent.process_supervisor.output import Outputs
    from agent.process_supervisor.table import Table

VARIABLE = "PROCESS_SUPERVISOR_STATE"
"""The environment variable with the number of the memfd."""

_FORMAT = 1

_EVERYTHING = ["__main__", "confine", "machine", "power_off", "shutdown", "upgrade"]


def check_command() -> list[str]:
    """A command that succeeds when the program as it is on the disk now can be loaded."""
    modules = ", ".join(f"agent.process_supervisor.{name}" for name in _EVERYTHING)
    code = f"import sys; sys.path[:] = {sys.path!r}; import {modules}"
    return [sys.executable, "-I", "-c", code]


def execute_anew(
    table: Table,
    control: Control,
    outputs: Outputs,
    listeners: list[list[Any]],
    own: Mapping[str, Any],
) -> NoReturn:
    """Does not return, unless by OSError: then everything is as before.

    listeners: from Listeners.save(). own: what the Supervisor wants to find again.
    """
    descriptors = [control.server.fileno(), *outputs.pipes]
    descriptors += [client.fd for client in control.clients]
    descriptors += [fd for _address, _key, fd, _reserved in listeners]
    rings = [(process.key, process.ring) for process in table if process.ring]
    head = {
        "format": _FORMAT,
        "own": own,
        "processes": table.save(),
        "server": control.server.fileno(),
        "listeners": listeners,
        "clients": [_save_client(client) for client in control.clients],
        "pipes": [[pipe.fd, pipe.name, pipe.pid, pipe.logged] for pipe in outputs.pipes.values()],
        "rings": [[key, ring.end, len(ring.read(0, RING)[1])] for key, ring in rings],
    }
    state = os.memfd_create("process-supervisor", 0)
    handled = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGPWR, signal.SIGUSR2)
    try:
        with open(state, "wb", closefd=False) as file:
            file.write(dumps(head).encode() + b"\n")
            file.writelines(ring.read(0, RING)[1] for _key, ring in rings)
        for fd in descriptors:
            os.set_inheritable(fd, True)
        # They stay pending until the new program has its handlers.
        signal.pthread_sigmask(signal.SIG_BLOCK, handled)
        os.execve(
            sys.executable,
            [sys.executable, *sys.orig_argv[1:]],
            {**os.environ, VARIABLE: str(state)},
        )
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, handled)
        for fd in descriptors:
            os.set_inheritable(fd, False)
        os.close(state)


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


class State:
    """What the PID 1 before has handed over. Raises ValueError when it is of another format."""

    def __init__(self, fd: int) -> None:
        with open(fd, "rb") as file:
            file.seek(0)
            self._head: dict[str, Any] = loads(file.readline().decode())
            if self._head.get("format") != _FORMAT:
                raise ValueError(f"format {self._head.get('format')} is not {_FORMAT}")
            self._printed = {
                key: (file.read(length), end) for key, end, length in self._head["rings"]
            }
        self.own: dict[str, Any] = self._head["own"]
        self.listeners: list[list[Any]] = self._head.get("listeners", [])

    def server(self) -> socket.socket:
        """The listening control socket."""
        return _adopt(self._head["server"])

    def restore(self, table: Table, outputs: Outputs) -> None:
        """Fills the empty table and takes over the pipes."""
        table.restore(self._head["processes"])
        for process in table:
            if process.key in self._printed:
                process.ring = Ring()
                process.ring.restore(*self._printed[process.key])
        by_key = {process.key: process for process in table}
        for fd, key, pid, logged in self._head["pipes"]:
            os.set_inheritable(fd, False)
            writer = by_key.get(key)
            ring = (writer.ring if writer else None) or Ring()
            pipe = outputs.follow(fd, ring, key, pid, logged=logged)
            if writer and writer.pid == pid:
                writer.pipe = pipe

    def restore_clients(self, control: Control, table: Table) -> None:
        """Takes over the clients, and what they wait for."""
        for saved in self._head["clients"]:
            client = Connection(control, _adopt(saved["fd"]), saved["pid"])
            control.clients.add(client)
            client.following = dict(saved["following"])
            control.followed = control.followed or bool(client.following)
            for number, kind, key, fields in saved["waiting"]:
                client.subscribe(number, kind, table.get(key, "wait for"), fields)
            client.resume(binascii.a2b_base64(saved["input"]), binascii.a2b_base64(saved["output"]))


def _adopt(fd: int) -> socket.socket:
    os.set_inheritable(fd, False)
    adopted = socket.socket(fileno=fd)
    adopted.setblocking(False)
    return adopted
