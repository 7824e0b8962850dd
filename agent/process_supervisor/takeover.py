"""The new program after an upgrade: goes on with what upgrade.py has handed over. Loaded only then.

The new program has tried this before it was executed (rehearse), so it works. Should it not all the
same, whatever cannot be taken over harms nothing else, and salvage.py looks for the rest.
"""

from __future__ import annotations

import binascii
import os

from agent.console import write_line
from agent.lean_stdlib import loads, socket
from agent.process_supervisor.control import Connection
from agent.process_supervisor.output import Ring
from agent.process_supervisor.protocol import ProcessSpec
from agent.process_supervisor.table import Process
from agent.process_supervisor.upgrade import FORMAT, SAVED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from agent.process_supervisor.supervisor import Supervisor


def take_over(
    supervisor: Supervisor, fd: int, maitred: ProcessSpec, ports: Mapping[str, str]
) -> None:
    """Fills a new Supervisor with what is in a memfd, and closes that; says so in one line.

    maitred: as it would be started now. ports: what is reserved, address by name.
    """
    problems: list[str] = []

    def attempt(call: Callable[..., object], *args: object) -> None:
        try:
            call(*args)
        except Exception as error:  # noqa: BLE001  # PID 1 goes on, with what it has
            problems.append(f"{type(error).__name__}: {error}")

    attempt(_TakeOver(supervisor, attempt).run, fd)
    found = ""
    if problems:
        from agent.process_supervisor.salvage import salvage

        adopted: list[str] = []
        attempt(salvage, supervisor, maitred, ports, adopted)
        names = ", ".join(adopted) or "none"
        found = f"; cannot take over everything: {'; '.join(problems)}; adopted as found: {names}"
    write_line("init", f"upgraded, with {len(supervisor.table)} processes{found}"[:1000])


def rehearse(path: str) -> None:
    """Raises when this program could not go on with the state in a file.

    Run by the program before, in a process of its own.
    """
    from agent.options import parse_listen_address
    from agent.process_supervisor import (  # noqa: F401  # everything that is loaded later, too
        __main__,
        confine,
        machine,
        power_off,
        salvage,
        shutdown,
    )

    with open(path, "rb") as file:
        head = _read(file.readline())
    for row in head["processes"]:
        _process(row)
    for address, _key, _fd, _reserved in head["listeners"]:
        parse_listen_address(address)


def _read(line: bytes) -> dict[str, Any]:
    head: dict[str, Any] = loads(line.decode())
    if head.get("format") != FORMAT:
        raise ValueError(f"the state is of format {head.get('format')}, not {FORMAT}")
    return head


def _process(row: dict[str, Any]) -> Process:
    process = Process(row["serial"], row["key"], ProcessSpec.from_wire(row["spec"]))
    for name in SAVED:
        setattr(process, name, row[name])
    if row["last_exit"]:
        status, code = row["last_exit"]
        process.last_exit = (status, code)
    return process


class _TakeOver:
    """attempt: calls what it is given, and remembers what that raises."""

    def __init__(self, supervisor: Supervisor, attempt: Callable[..., None]) -> None:
        self._supervisor = supervisor
        self._attempt = attempt
        self._printed: dict[str, tuple[bytes, int]] = {}

    def run(self, fd: int) -> None:
        with open(fd, "rb") as file:
            file.seek(0)
            head = _read(file.readline())
            for key, end, length in head["rings"]:
                self._printed[key] = file.read(length), end
        supervisor = self._supervisor
        for saved in head["listeners"]:
            self._attempt(supervisor.listeners.restore, saved)
        for row in head["processes"]:
            self._attempt(self._restore_process, row)
        for saved in head["pipes"]:
            self._attempt(self._restore_pipe, *saved)
        if head["server"] is not None:
            supervisor.serve(_adopt(head["server"]))
        for saved in head["clients"]:
            self._attempt(self._restore_client, saved)
        for name in ("started_at", "orphans", "upgrades"):
            setattr(supervisor, name, head["own"][name])

    def _restore_process(self, row: dict[str, Any]) -> None:
        process = _process(row)
        if process.key in self._printed:
            process.ring = Ring()
            process.ring.restore(*self._printed[process.key])
        self._supervisor.table.adopt(process, row["due"])

    def _restore_pipe(self, fd: int, key: str, pid: int, logged: bool) -> None:
        writer = next((process for process in self._supervisor.table if process.key == key), None)
        ring = (writer.ring if writer else None) or Ring()
        os.set_inheritable(fd, False)
        pipe = self._supervisor.outputs.follow(fd, ring, key, pid, logged=logged)
        if writer and writer.pid == pid:
            writer.pipe = pipe

    def _restore_client(self, saved: dict[str, Any]) -> None:
        control, table = self._supervisor.control, self._supervisor.table
        assert control
        client = Connection(control, _adopt(saved["fd"]), saved["pid"])
        control.clients.add(client)
        client.following = dict(saved["following"])
        control.followed = control.followed or bool(client.following)
        try:
            for number, kind, key, fields in saved["waiting"]:
                client.subscribe(number, kind, table.get(key, "wait for"), fields)
        except BaseException:
            client.close()  # it would wait for ever
            raise
        client.resume(binascii.a2b_base64(saved["input"]), binascii.a2b_base64(saved["output"]))


def _adopt(fd: int) -> socket.socket:
    os.set_inheritable(fd, False)
    adopted = socket.socket(fileno=fd)
    adopted.setblocking(False)
    return adopted
