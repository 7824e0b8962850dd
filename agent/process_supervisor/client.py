"""How maitred, tremplin and termina-ctl talk to PID 1: Client blocks, AsyncClient does not. Both
have the same methods. Nothing else of this package is for import by others.

    with Client.connect(run_dir) as client:
        client.launch(["lxcfs", "/var/lib/lxcfs"], name="lxcfs", respawn=True)

    async with await AsyncClient.connect(run_dir) as client:
        launched = await client.launch(["/bin/true"], wait=True)   # launched.exit.code == 0
        async for event in client.events():
            ...
"""

from __future__ import annotations

import binascii

from agent.lean_stdlib import socket
from agent.process_supervisor.protocol import (
    MAX_LINE,
    VERSION,
    ProcessSpec,
    ProtocolError,
    decode,
    encode,
    socket_path,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
    from typing import Any, Self


class SupervisorError(Exception):
    """PID 1 refused. code: the name of an errno; str(): one line, "cannot X: why"."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class SupervisorGone(SupervisorError):  # noqa: N818  # a state, like ConnectionResetError's
    """There is no connection to PID 1, or not any more; what was asked may have been done."""

    def __init__(self, text: str) -> None:
        super().__init__("ECONNRESET", text)


class Exit:
    """How a process ended: status "exited" with its exit code, or "signaled" with the signal."""

    __slots__ = ("code", "status")

    def __init__(self, status: str, code: int) -> None:
        self.status = status
        self.code = code

    def __repr__(self) -> str:
        return f"{self.status} {self.code}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Exit) and (other.status, other.code) == (self.status, self.code)

    def __hash__(self) -> int:
        return hash((self.status, self.code))


class Launched:
    """A process that was launched.

    key: its name in all other calls. pid: None when it does not run. state: see table.py.
    existing: it was there before. exit: how it ended, when that was waited for.
    """

    __slots__ = ("existing", "exit", "key", "pid", "state")

    def __init__(self, answer: Mapping[str, Any]) -> None:
        self.key: str = answer["key"]
        self.pid: int | None = answer["pid"]
        self.state: str = answer["state"]
        self.existing: bool = answer.get("existing", False)
        self.exit = Exit(answer["status"], answer["code"]) if "status" in answer else None


class Event:
    """What happened to a process: name, key and every field of it, as in docs/supervisor.md."""

    __slots__ = ("fields", "key", "name")

    def __init__(self, message: Mapping[str, Any]) -> None:
        self.name: str = message["event"]
        self.key: str = message.get("key", "")
        self.fields = message

    def output(self) -> bytes:
        """What was printed, of an event named output."""
        return binascii.a2b_base64(self.fields.get("data", ""))

    def __repr__(self) -> str:
        return f"<event {self.name} {self.key}>"


def _request(number: int, op: str, fields: Mapping[str, Any]) -> bytes:
    try:
        return encode({"v": VERSION, "id": number, "op": op, **fields})
    except ProtocolError as error:
        raise SupervisorError(error.code, f"cannot {op}: {error}") from None


def _result(answer: dict[str, Any]) -> dict[str, Any]:
    if answer.get("ok"):
        return answer
    raise SupervisorError(answer.get("code", "EPROTO"), answer.get("error", "no reason given"))


def _launch_fields(spec: ProcessSpec, *, wait: bool) -> dict[str, Any]:
    return {**spec.to_wire(), **({"wait": True} if wait else {})}


def check_options(options: Mapping[str, Any]) -> None:
    """Raises SupervisorError when no launch of a named, respawning process can have these options:
    fields of ProcessSpec as they stand in JSON.
    """
    try:
        ProcessSpec.from_wire({"argv": ["x"], "name": "x", "respawn": True, **options})
    except ProtocolError as error:
        raise SupervisorError(error.code, str(error)) from None


class Client:
    """A blocking connection to PID 1, one request at a time. Raises SupervisorError."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._buffer = b""
        self._number = 0

    @classmethod
    def connect(cls, run_dir: str, *, timeout: float | None = None) -> Self:
        """Connects to the PID 1 that has this run directory.

        timeout: seconds that any one call may take; None for no limit.
        Raises SupervisorGone.
        """
        path = socket_path(run_dir)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        connection.settimeout(timeout)
        try:
            connection.connect(path)
        except OSError as error:
            connection.close()
            raise SupervisorGone(f"cannot connect to {path}: {error.strerror or error}") from None
        return cls(connection)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection; nothing happens to the processes."""
        self._socket.close()

    def _read(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            data = self._socket.recv(MAX_LINE)
            if not data:
                raise SupervisorGone("cannot read from PID 1: it closed the connection")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return decode(line)

    def request(self, op: str, **fields: Any) -> dict[str, Any]:
        """Any request of the protocol; its answer. Raises SupervisorError."""
        self._number += 1
        line = _request(self._number, op, fields)
        try:
            self._socket.sendall(line)
            while True:
                answer = self._read()
                if answer.get("id") == self._number and "event" not in answer:
                    return _result(answer)
        except (OSError, ProtocolError) as error:
            raise SupervisorGone(f"cannot {op}: {error}") from None

    def launch(self, argv: Sequence[str], *, wait: bool = False, **options: Any) -> Launched:
        """Launches a process; with wait, returns when it has ended.

        argv, options: the fields of ProcessSpec.
        """
        return Launched(
            self.request("launch", **_launch_fields(ProcessSpec(argv, **options), wait=wait))
        )

    def wait(self, key: str) -> Exit:
        """How the process ended; returns when it has."""
        answer = self.request("wait", key=key)
        return Exit(answer["status"], answer["code"])

    def signal(self, key: str, name: str) -> int:
        """Sends a signal, SIGHUP or another name; the pid it went to."""
        pid: int = self.request("signal", key=key, signal=name)["pid"]
        return pid

    def stop(self, key: str) -> None:
        """Ends a process for good; returns when it has ended."""
        self.request("stop", key=key)

    def start(self, key: str) -> Launched:
        """Starts a process again that has ended."""
        return Launched(self.request("start", key=key))

    def list(self) -> list[dict[str, Any]]:
        """Every process PID 1 has, as docs/supervisor.md describes them."""
        processes: list[dict[str, Any]] = []
        more = True
        while more:
            answer = self.request("list", after=processes[-1]["serial"] if processes else 0)
            processes += answer["processes"]
            more = answer["more"]
        return processes

    def info(self, key: str) -> dict[str, Any]:
        """One process, as in list()."""
        process: dict[str, Any] = self.request("list", key=key)["processes"][0]
        return process

    def output(self, key: str, offset: int = 0) -> tuple[int, bytes]:
        """What a process has printed, from offset on, as far as it is kept; and where that ends."""
        output = b""
        while True:
            answer = self.request("output", key=key, offset=offset)
            output += binascii.a2b_base64(answer["data"])
            offset = answer["offset"] + len(binascii.a2b_base64(answer["data"]))
            if offset >= answer["end"]:
                return offset, output

    def events(self, *, output: bool = False) -> Iterator[Event]:
        """Every event from this call on. The connection is good for nothing else after it.

        output: with what processes print, as events named output.
        """
        self.request("events", output=output)
        return self._follow()

    def _follow(self) -> Iterator[Event]:
        try:
            while True:
                message = self._read()
                if "event" in message:
                    yield Event(message)
        except (OSError, ProtocolError) as error:
            raise SupervisorGone(f"cannot follow events: {error}") from None

    def shutdown(self, reason: str) -> None:
        """Begins the shutdown and the power-off; returns at once. reason: for the console."""
        self.request("shutdown", reason=reason)


class AsyncClient:
    """A connection to PID 1 for asyncio; any number of calls at once. Raises SupervisorError."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        import asyncio

        self._reader = reader
        self._writer = writer
        self._number = 0
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._streams: dict[int, asyncio.Queue[Event | None]] = {}
        self._gone: SupervisorGone | None = None
        self._task = asyncio.create_task(self._read_all(), name="supervisor client")

    @classmethod
    async def connect(cls, run_dir: str) -> Self:
        """Connects to the PID 1 that has this run directory. Raises SupervisorGone."""
        import asyncio

        path = socket_path(run_dir)
        try:
            reader, writer = await asyncio.open_unix_connection(path, limit=MAX_LINE)
        except OSError as error:
            raise SupervisorGone(f"cannot connect to {path}: {error.strerror or error}") from None
        return cls(reader, writer)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def connected(self) -> bool:
        """Whether the connection still stands, as far as is known."""
        return self._gone is None

    async def close(self) -> None:
        """Ends the connection; calls in flight raise SupervisorGone, processes stay as they are."""
        self._writer.close()
        await self._task

    async def _read_all(self) -> None:
        reason = "PID 1 closed the connection"
        try:
            while line := await self._reader.readline():
                message = decode(line)
                number = message.get("id", 0)
                if "event" in message:
                    if queue := self._streams.get(number):
                        queue.put_nowait(Event(message))
                elif (answer := self._answers.pop(number, None)) and not answer.done():
                    answer.set_result(message)
        except (OSError, ValueError, ProtocolError) as error:  # ValueError: line over the limit
            reason = str(error)
        self._gone = SupervisorGone(f"cannot talk to PID 1: {reason}")
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(SupervisorGone(str(self._gone)))
        self._answers.clear()
        for queue in self._streams.values():
            queue.put_nowait(None)
        self._writer.close()

    async def request(self, op: str, **fields: Any) -> dict[str, Any]:
        """Any request of the protocol; its answer. Raises SupervisorError."""
        self._number += 1
        return await self._request(self._number, op, fields)

    async def _request(self, number: int, op: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        import asyncio

        line = _request(number, op, fields)
        if self._gone:
            raise SupervisorGone(f"cannot {op}: {self._gone}")
        self._answers[number] = answer = asyncio.get_running_loop().create_future()
        self._writer.write(line)
        try:
            return _result(await answer)
        except asyncio.CancelledError:
            if self._answers.pop(number, None) and not self._gone and op in {"wait", "launch"}:
                self._number += 1
                self._writer.write(_request(self._number, "cancel", {"request": number}))
            raise

    async def launch(self, argv: Sequence[str], *, wait: bool = False, **options: Any) -> Launched:
        """Launches a process; with wait, returns when it has ended.

        argv, options: the fields of ProcessSpec. A launch that is cancelled while it waits leaves
        the process running.
        """
        return Launched(
            await self.request("launch", **_launch_fields(ProcessSpec(argv, **options), wait=wait))
        )

    async def wait(self, key: str) -> Exit:
        """How the process ended; returns when it has."""
        answer = await self.request("wait", key=key)
        return Exit(answer["status"], answer["code"])

    async def signal(self, key: str, name: str) -> int:
        """Sends a signal, SIGHUP or another name; the pid it went to."""
        pid: int = (await self.request("signal", key=key, signal=name))["pid"]
        return pid

    async def stop(self, key: str) -> None:
        """Ends a process for good; returns when it has ended."""
        await self.request("stop", key=key)

    async def start(self, key: str) -> Launched:
        """Starts a process again that has ended."""
        return Launched(await self.request("start", key=key))

    async def list(self) -> list[dict[str, Any]]:
        """Every process PID 1 has, as docs/supervisor.md describes them."""
        processes: list[dict[str, Any]] = []
        more = True
        while more:
            answer = await self.request("list", after=processes[-1]["serial"] if processes else 0)
            processes += answer["processes"]
            more = answer["more"]
        return processes

    async def info(self, key: str) -> dict[str, Any]:
        """One process, as in list()."""
        process: dict[str, Any] = (await self.request("list", key=key))["processes"][0]
        return process

    async def events(self, *, output: bool = False) -> AsyncIterator[Event]:
        """Every event from the first step of the iteration on. Raises SupervisorGone at the end.

        output: with what processes print, as events named output.
        """
        import asyncio

        self._number += 1
        number = self._number
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        self._streams[number] = queue
        try:
            await self._request(number, "events", {"output": output})
            while (event := await queue.get()) is not None:
                yield event
            raise SupervisorGone(f"cannot follow events: {self._gone}")
        finally:
            del self._streams[number]

    async def shutdown(self, reason: str) -> None:
        """Begins the shutdown and the power-off; returns at once. reason: for the console."""
        await self.request("shutdown", reason=reason)
