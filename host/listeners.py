"""The services a host offers to the guest: StartupListener, TremplinListener, CrashListener and
LogCollector, each on its own port. Every call is recorded as an event that can be waited for; a
handler may do the work of a host inside a call, before it is answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from google.protobuf.message_factory import GetMessageClass

from agent.pb import tremplin_pb2, vm_crash_pb2, vm_host_pb2

if TYPE_CHECKING:
    from google.protobuf.descriptor import ServiceDescriptor
    from google.protobuf.message import Message

    from host.vsock import Vsock

_LOG_COLLECTOR = vm_host_pb2.DESCRIPTOR.services_by_name["LogCollector"]
_SERVICES = {
    7777: vm_host_pb2.DESCRIPTOR.services_by_name["StartupListener"],
    7778: tremplin_pb2.DESCRIPTOR.services_by_name["TremplinListener"],
    7779: vm_crash_pb2.DESCRIPTOR.services_by_name["CrashListener"],
    9999: _LOG_COLLECTOR,
}

_LOG_RECORDS_KEPT = 100_000

Handler = Callable[[Any], Awaitable[None]]


@dataclass(frozen=True)
class Event:
    """A call of the guest: its method's name, its message, and when it came (monotonic seconds)."""

    call: str
    message: Any
    at: float


class Recorder:
    """Every call of the guest in order; waits for calls and runs the handlers of them."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.logs: deque[Any] = deque(maxlen=_LOG_RECORDS_KEPT)
        """LogRecords of the LogCollector, kernel and user ones mixed, oldest first."""
        self._last_logs: dict[str, Any] = {}
        self._handlers: dict[str, Handler] = {}
        self._arrived = asyncio.Condition()

    def handle(self, call: str, handler: Handler | None) -> None:
        """Runs handler(message) inside each call of this name, before the call is answered; None
        removes it.
        """
        if handler is None:
            self._handlers.pop(call, None)
        else:
            self._handlers[call] = handler

    def of(self, call: str) -> list[Any]:
        """The messages of all calls of this name, in order."""
        return [event.message for event in self.events if event.call == call]

    async def record(self, call: str, message: Message) -> None:
        """Takes note of a call and runs its handler; returns when the call may be answered."""
        async with self._arrived:
            self.events.append(Event(call, message, time.monotonic()))
            self._arrived.notify_all()
        if handler := self._handlers.get(call):
            await handler(message)

    async def take_logs(self, call: str, request: Any) -> None:
        """Keeps the records of a call, unless it is the one before once more: the guest repeats a
        call, word for word, whose answer it has not got.
        """
        if request == self._last_logs.get(call):
            return
        self._last_logs[call] = request
        async with self._arrived:
            self.logs.extend(request.records)
            self._arrived.notify_all()

    async def wait_for(
        self, call: str, matches: Callable[[Any], bool] = lambda _: True, *, since: int = 0
    ) -> Any:
        """The message of the first call of this name that matches.

        since: how many events, from the start of `events`, are not looked at.
        """
        looked_at = since
        async with self._arrived:
            while True:
                for event in itertools.islice(self.events, looked_at, None):
                    looked_at += 1
                    if event.call == call and matches(event.message):
                        return event.message
                await self._arrived.wait()

    async def wait_for_log(self, matches: Callable[[Any], bool]) -> Any:
        """The oldest LogRecord that matches."""
        async with self._arrived:
            while (found := next(filter(matches, self.logs), None)) is None:
                await self._arrived.wait()
        return found


def _service(descriptor: ServiceDescriptor, recorder: Recorder) -> grpc.GenericRpcHandler:
    """A service every method of which records its call and answers with an empty message."""

    def method(call: str, answer: type[Message]) -> Callable[[Any, Any], Awaitable[Message]]:
        async def answer_call(request: Any, _context: Any) -> Message:
            if descriptor is _LOG_COLLECTOR:
                await recorder.take_logs(call, request)
            else:
                await recorder.record(call, request)
            return answer()

        return answer_call

    handlers = {}
    for each in descriptor.methods:
        answer = GetMessageClass(each.output_type)
        handlers[each.name] = grpc.unary_unary_rpc_method_handler(
            method(each.name, answer),
            request_deserializer=GetMessageClass(each.input_type).FromString,
            response_serializer=answer.SerializeToString,
        )
    return grpc.method_handlers_generic_handler(descriptor.full_name, handlers)


class Listeners:
    """Serves all four services for one VM; an async context manager that yields the Recorder."""

    def __init__(self, vsock: Vsock) -> None:
        self._vsock = vsock
        self._servers: list[grpc.aio.Server] = []
        self.recorder = Recorder()

    async def __aenter__(self) -> Recorder:
        try:
            for port, descriptor in _SERVICES.items():
                path = await self._vsock.listen(port)
                path.unlink(missing_ok=True)
                server = grpc.aio.server()
                server.add_generic_rpc_handlers((_service(descriptor, self.recorder),))
                server.add_insecure_port(f"unix:{path}")
                await server.start()
                self._servers.append(server)
        except BaseException:
            await self.__aexit__()
            raise
        return self.recorder

    async def __aexit__(self, *_: object) -> None:
        for server in self._servers:
            with contextlib.suppress(asyncio.CancelledError):
                await server.stop(grace=None)
        self._servers.clear()
        await self._vsock.close()
