"""The control socket: serves protocol.py to any number of clients. Whatever a client sends, or does
not send or read, it never blocks and its memory is bounded.
"""

from __future__ import annotations

import binascii
import os

from agent.console import write_line
from agent.lean_stdlib import socket
from agent.process_supervisor.loop import BROKEN, READABLE, WRITABLE, read, report
from agent.process_supervisor.protocol import (
    MAX_LINE,
    SIGNALS,
    VERSION,
    ProcessSpec,
    ProtocolError,
    decode,
    encode,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from agent.process_supervisor.loop import Loop
    from agent.process_supervisor.table import Process, Table

_PAUSE_AT = 256 * 1024
"""Bytes waiting for a client to read them, from which on its requests are left alone."""

_DROP_AT = 1024 * 1024
"""Bytes from which on a client that follows events but does not read them is dropped."""

_MAX_PENDING = 16384
"""Waits that one client can have open."""

_MAX_FOLLOWING = 8
"""`events` requests that one client can have open."""

_PAGE = 32 * 1024
"""Bytes of output in one message."""

_ACCEPT_PAUSE = 0.5
"""Seconds until accepting is tried again when there was no descriptor or memory left for it."""


class Control:
    """The server and its clients.

    describe: what `list` says of PID 1 itself. shut_down: begins the shutdown, for a reason.
    upgrade: executes PID 1 anew; told whom to tell why it is not possible, or "" just before.
    """

    def __init__(
        self,
        *,
        loop: Loop,
        table: Table,
        server: socket.socket,
        describe: Callable[[], dict[str, Any]],
        shut_down: Callable[[str], None],
        upgrade: Callable[[Callable[[str], None]], None],
    ) -> None:
        self.loop = loop
        self.table = table
        self.describe = describe
        self.shut_down = shut_down
        self.upgrade = upgrade
        self.clients: set[Connection] = set()
        self.followed = False
        """Some client follows events; or did, as the last one to do so comes back anyway."""
        self.server = server
        loop.watch(server.fileno(), READABLE, lambda _mask: self._accept())

    def _accept(self) -> None:
        try:
            fd, _address = self.server._accept()  # type: ignore[attr-defined]  # C half
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:
            # No descriptor or no memory: the queue stays readable, so look away for a while.
            write_line("init", f"cannot accept a control connection: {error.strerror}")
            server = self.server.fileno()
            self.loop.change(server, 0)
            self.loop.call_later(_ACCEPT_PAUSE, lambda: self.loop.change(server, READABLE))
            return
        connection = socket.socket(fileno=fd)
        # struct ucred: pid, uid, gid as 32-bit integers, unix(7).
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, uid = memoryview(credentials).cast("i")[:2]
        if uid not in {0, os.geteuid()}:
            connection.close()
            return
        connection.setblocking(False)
        self.clients.add(Connection(self, connection, pid))

    def close(self) -> None:
        """Stops listening and drops every client."""
        for client in list(self.clients):
            client.close()
        self.loop.forget(self.server.fileno())
        self.server.close()

    def emit(self, event: str, key: str, fields: dict[str, Any]) -> None:
        """Tells every client that follows events."""
        if not self.followed:
            return
        for client in list(self.clients):
            for number in client.following:
                client.say({"id": number, "event": event, "key": key, **fields})

    def emit_output(self, key: str, pid: int, data: bytes) -> None:
        """Tells every client that follows output what a process has printed."""
        if not self.followed:
            return
        for client in list(self.clients):
            for number, output in client.following.items():
                for start in range(0, len(data) if output else 0, _PAGE):
                    piece = {"pid": pid, "data": _base64(data[start : start + _PAGE])}
                    client.say({"id": number, "event": "output", "key": key, **piece})


class Connection:
    """One client."""

    def __init__(self, control: Control, connection: socket.socket, pid: int) -> None:
        self._control = control
        self._socket = connection
        self.fd = connection.fileno()
        self.pid = pid
        self.input = bytearray()
        self.output = bytearray()
        self._mask = READABLE
        self.waiting: dict[int, tuple[str, Process, dict[str, Any]]] = {}
        self.following: dict[int, bool] = {}
        control.loop.watch(self.fd, READABLE, self._ready)

    def resume(self, unread: bytes, unsent: bytes) -> None:
        """Goes on where the PID 1 before has stopped."""
        self.input += unread
        self.output[:0] = unsent
        self._ready(WRITABLE)

    def close(self) -> None:
        """Forgets the client, and what it waited for."""
        if self not in self._control.clients:
            return
        self._control.clients.discard(self)
        for number, (_kind, process, _fields) in self.waiting.items():
            self._control.table.forget_waiter(process, (self, number))
        self.waiting.clear()
        self._control.loop.forget(self.fd)
        self._socket.close()

    def _ready(self, mask: int) -> None:
        try:
            if mask & WRITABLE:
                self._flush()
            if mask & READABLE:
                self._receive()
            elif mask & BROKEN:
                self.close()
            self._serve()
        except OSError:
            self.close()
        except Exception as error:  # noqa: BLE001  # one client's trouble is nobody else's
            report(error, "serve a control client")
            self.close()

    def _receive(self) -> None:
        try:
            data = read(self.fd)
        except BlockingIOError:
            return
        if not data:
            self.close()
        self.input += data

    def _serve(self) -> None:
        """Answers the requests that are there, while the client reads its answers."""
        start = 0
        while len(self.output) < _PAUSE_AT and self in self._control.clients:
            end = self.input.find(b"\n", start)
            if (end if end >= 0 else len(self.input)) - start >= MAX_LINE:
                self.say(_refusal(None, "E2BIG", f"cannot read a line over {MAX_LINE} bytes"))
                self.close()
                return
            if end < 0:
                break
            self._answer(bytes(self.input[start:end]))
            start = end + 1
        del self.input[:start]
        self._update_mask()

    def say(self, message: dict[str, Any]) -> None:
        """Sends a message, or keeps it until the client reads; drops a client that never does."""
        if self not in self._control.clients:
            return
        idle = not self.output
        self.output += encode(message)
        if idle:
            try:
                self._flush()
            except OSError:
                self.close()
                return
        if len(self.output) > _DROP_AT:
            write_line("init", f"dropped a control client (pid {self.pid}) that does not read")
            self.close()
            return
        self._update_mask()

    def _flush(self) -> None:
        try:
            while self.output:
                del self.output[: self._socket.send(self.output)]
        except BlockingIOError:
            pass

    def _update_mask(self) -> None:
        if self not in self._control.clients:
            return
        mask = (READABLE if len(self.output) < _PAUSE_AT else 0) | (WRITABLE if self.output else 0)
        if mask != self._mask:
            self._control.loop.change(self.fd, mask)
            self._mask = mask

    # ---- requests ----------------------------------------------------------------------------

    def _answer(self, line: bytes) -> None:
        number = None
        try:
            request = decode(line)
            number = request.pop("id", None)
            if type(number) is not int:
                raise ProtocolError("EINVAL", "cannot answer a request without a number as id")
            if request.pop("v", None) != VERSION:
                raise ProtocolError("EPROTO", f"cannot answer: this is version {VERSION}")
            op = request.pop("op", None)
            operation = _OPERATIONS.get(op) if isinstance(op, str) else None
            if operation is None:
                raise ProtocolError("ENOSYS", "cannot answer: there is no such op")
            if process := self._control.table.by_pid(self.pid):
                process.spoke = True
            operation(self, number, request)
        except ProtocolError as error:
            self.say(_refusal(number, error.code, str(error)))

    def _accepted(self, number: int, **fields: Any) -> None:
        self.say({"id": number, "ok": True, **fields})

    def _expect(self, number: int) -> None:
        if len(self.waiting) >= _MAX_PENDING:
            raise ProtocolError("EAGAIN", "cannot wait: too many waits on this connection")
        if number in self.waiting:
            raise ProtocolError("EINVAL", "cannot wait: that id is in use")

    def _do_launch(self, number: int, request: dict[str, Any]) -> None:
        wait = request.pop("wait", False)
        self._expect(number)
        try:
            spec = ProcessSpec.from_wire(request)
        except ProtocolError as error:
            raise ProtocolError(error.code, f"cannot launch: {error}") from None
        process, existing = self._control.table.launch(spec)
        pid = process.pid
        if wait is True:
            self.subscribe(number, "wait", process, {"pid": pid, "existing": existing})
        else:
            self._accepted(number, key=process.key, pid=pid, state=process.state, existing=existing)

    def _do_wait(self, number: int, request: dict[str, Any]) -> None:
        self._expect(number)
        process = self._control.table.get(_text(request, "key", "wait"), "wait for")
        self.subscribe(number, "wait", process, {})

    def _do_stop(self, number: int, request: dict[str, Any]) -> None:
        self._expect(number)
        process = self._control.table.get(_text(request, "key", "stop"), "stop")
        self.subscribe(number, "stop", process, {})

    def subscribe(self, number: int, kind: str, process: Process, fields: dict[str, Any]) -> None:
        """Answers request `number` when process has exited (kind wait) or is stopped (kind stop).

        fields: to put into the answer.
        """

        def done() -> None:
            self.waiting.pop(number, None)
            status, code = process.last_exit or ("unknown", 0)
            exit_fields = {"status": status, "code": code} if kind == "wait" else {}
            self._accepted(number, key=process.key, state=process.state, **exit_fields, **fields)

        self.waiting[number] = (kind, process, fields)
        ask = self._control.table.stop if kind == "stop" else self._control.table.wait
        ask(process.key, (self, number), done)

    def _do_cancel(self, number: int, request: dict[str, Any]) -> None:
        target = request.get("request")
        if type(target) is int and target in self.waiting:
            _kind, process, _fields = self.waiting.pop(target)
            self._control.table.forget_waiter(process, (self, target))
        self._accepted(number)

    def _do_start(self, number: int, request: dict[str, Any]) -> None:
        process = self._control.table.start(_text(request, "key", "start"))
        self._accepted(number, key=process.key, pid=process.pid, state=process.state)

    def _do_signal(self, number: int, request: dict[str, Any]) -> None:
        key, name = _text(request, "key", "signal"), _text(request, "signal", "signal")
        if name not in SIGNALS:
            raise ProtocolError("EINVAL", f"cannot signal {key}: there is no signal {name}")
        self._accepted(number, pid=self._control.table.signal(key, name))

    def _do_list(self, number: int, request: dict[str, Any]) -> None:
        from agent.process_supervisor.listing import describe, page

        table, now = self._control.table, self._control.loop.now()
        if "key" in request:
            process = table.get(_text(request, "key", "list"), "list")
            self._accepted(number, processes=[describe(process, now)], more=False)
            return
        after = request.get("after", 0)
        if type(after) is not int:
            raise ProtocolError("EINVAL", "cannot list: after is not a number")
        rows, more = page(table, after, now)
        self._accepted(number, processes=rows, more=more, supervisor=self._control.describe())

    def _do_events(self, number: int, request: dict[str, Any]) -> None:
        if len(self.following) >= _MAX_FOLLOWING:
            raise ProtocolError("EAGAIN", "cannot follow events: too many of them already")
        self._accepted(number)
        self.following[number] = request.get("output") is True
        self._control.followed = True

    def _do_output(self, number: int, request: dict[str, Any]) -> None:
        process = self._control.table.get(_text(request, "key", "output"), "show the output of")
        offset = request.get("offset", 0)
        if type(offset) is not int:
            raise ProtocolError("EINVAL", "cannot show the output: offset is not a number")
        ring = process.ring
        offset, data = ring.read(offset, _PAGE) if ring else (0, b"")
        end = ring.end if ring else 0
        self._accepted(number, offset=offset, end=end, data=_base64(data))

    def _do_shutdown(self, number: int, request: dict[str, Any]) -> None:
        reason = _text(request, "reason", "shutdown") if "reason" in request else "requested"
        self._accepted(number)
        self._control.shut_down(" ".join(reason.split())[:200])

    def _do_upgrade(self, number: int, _request: dict[str, Any]) -> None:
        def answer(refusal: str) -> None:
            if refusal:
                self.say(_refusal(number, "ECANCELED", f"cannot upgrade: {refusal}"))
            else:
                self._accepted(number)

        self._control.upgrade(answer)


_OPERATIONS = {
    "cancel": Connection._do_cancel,
    "events": Connection._do_events,
    "launch": Connection._do_launch,
    "list": Connection._do_list,
    "output": Connection._do_output,
    "shutdown": Connection._do_shutdown,
    "signal": Connection._do_signal,
    "start": Connection._do_start,
    "stop": Connection._do_stop,
    "upgrade": Connection._do_upgrade,
    "wait": Connection._do_wait,
}


def _text(request: dict[str, Any], field: str, op: str) -> str:
    value = request.get(field)
    if not isinstance(value, str):
        raise ProtocolError("EINVAL", f"cannot {op}: {field} is not a text")
    return value


def _base64(data: bytes) -> str:
    return binascii.b2a_base64(data, newline=False).decode()


def _refusal(number: int | None, code: str, text: str) -> dict[str, Any]:
    return {"id": number, "ok": False, "code": code, "error": text[:1000]}
