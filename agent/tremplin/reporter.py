"""Reports to the host: in order for each container, never lost when final, bounded in memory.

What calls report() never waits: hosts call us back from inside their handlers, before they answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque

import grpc
import grpc.aio
import tenacity

from agent.pb.tremplin_pb2_grpc import TremplinListenerStub

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from google.protobuf.message import Message

_log = logging.getLogger(__name__)

_DELIVERED_SECONDS = 0.05
"""A call that the host has had for so long without answering no longer holds up the next one."""


def _host_is_away(error: BaseException) -> bool:
    return isinstance(error, grpc.aio.AioRpcError) and error.code() is grpc.StatusCode.UNAVAILABLE


class _Report:
    __slots__ = ("final", "held_until", "kind", "message", "method", "on_delivered", "sent_at")

    def __init__(
        self,
        method: str,
        message: Message,
        *,
        kind: object,
        final: bool,
        held_until: asyncio.Event | None,
        on_delivered: Callable[[], None] | None,
    ) -> None:
        self.method = method
        self.message = message
        self.kind = kind
        self.final = final
        self.held_until = held_until
        self.on_delivered = on_delivered
        self.sent_at: float | None = None
        """When the attempt that is under way began, in seconds of the loop's clock."""


class Reporter:
    """Everything that is still to be told to the host."""

    def __init__(self, channel: grpc.aio.Channel | None) -> None:
        """channel: to the host's TremplinListener; None when there is no host to tell."""
        self._channel = channel
        self._stub = None if channel is None else TremplinListenerStub(channel)
        self._queues: dict[str, deque[_Report]] = {}
        self._pumps: dict[str, asyncio.Task[None]] = {}
        self._in_flight: set[asyncio.Task[None]] = set()

    def report(
        self,
        method: str,
        message: Message,
        *,
        container: str,
        kind: object = None,
        final: bool = True,
        held_until: asyncio.Event | None = None,
        on_delivered: Callable[[], None] | None = None,
    ) -> None:
        """Sends message, as soon as the host can be reached, after what was reported before it.

        method: of TremplinListener; container: whose order it is part of, "" for LXD itself.
        kind: the operation it is about. With final=False a later report of the same operation may
            take its place while it waits.
        held_until: it is not sent, nor what follows it, before this is set.
        on_delivered: called when the host has answered.
        """
        if self._channel is None:
            if on_delivered is not None:
                on_delivered()
            return
        report = _Report(
            method,
            message,
            kind=kind,
            final=final,
            held_until=held_until,
            on_delivered=on_delivered,
        )
        queue = self._queues.setdefault(container, deque())
        if queue and not queue[-1].final and queue[-1].kind is kind:
            queue.pop()
        elif queue and _same(queue[-1], report):
            return
        queue.append(report)
        if container not in self._pumps:
            self._pumps[container] = asyncio.create_task(self._pump(container))

    async def _pump(self, container: str) -> None:
        queue = self._queues[container]
        while queue:
            held_until = queue[0].held_until
            if held_until is not None:
                await held_until.wait()
            report = queue.popleft()
            delivery = asyncio.create_task(self._deliver(report))
            self._in_flight.add(delivery)
            delivery.add_done_callback(self._in_flight.discard)
            await self._handed_over(report, delivery, queue)
        del self._queues[container], self._pumps[container]

    async def _handed_over(
        self, report: _Report, delivery: asyncio.Task[None], queue: deque[_Report]
    ) -> None:
        # While the host is away the delivery retries and what follows waits for it; while the host
        # works on its answer, what follows may be what it is waiting for. But the reports of one
        # operation could overtake each other inside the host.
        clock = asyncio.get_running_loop().time
        while not delivery.done():
            await asyncio.wait([delivery], timeout=_DELIVERED_SECONDS)
            if (
                queue
                and queue[0].kind is not report.kind
                and report.sent_at is not None
                and clock() - report.sent_at >= _DELIVERED_SECONDS
                and self._channel is not None
                and self._channel.get_state() is grpc.ChannelConnectivity.READY
            ):
                return

    async def _deliver(self, report: _Report) -> None:
        try:
            await self._call(report)
        except grpc.aio.AioRpcError as error:
            _log.warning("the host refuses %s: %s", report.method, error.details())
        if report.on_delivered is not None:
            report.on_delivered()

    async def _call(self, report: _Report) -> None:
        clock = asyncio.get_running_loop().time

        async def attempt() -> None:
            report.sent_at = clock()
            try:
                await getattr(self._stub, report.method)(report.message)
            finally:
                report.sent_at = None

        await tenacity.AsyncRetrying(
            wait=tenacity.wait_exponential(multiplier=0.05, max=1.0),
            retry=tenacity.retry_if_exception(_host_is_away),
            reraise=True,
        )(attempt)

    async def close(self, *, timeout: float) -> None:
        """Gives what is still to be told timeout seconds."""
        tasks = [*self._pumps.values(), *self._in_flight]
        if tasks:
            await asyncio.wait(tasks, timeout=timeout)
        for task in [*self._pumps.values(), *self._in_flight]:
            task.cancel()


def _same(one: _Report, other: _Report) -> bool:
    return one.method == other.method and bool(one.message == other.message)
