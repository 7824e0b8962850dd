"""Sends the records of one source to the host, in order and in batches; keeps them while the host
is away, and says how many it could not keep.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque

import grpc.aio

from agent.log_forwarder.records import Record
from agent.pb import vm_host_pb2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Call = grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]

_log = logging.getLogger(__name__)

BUFFER_BYTES = 8 << 20
"""What is kept of one source while the host is away."""

_BATCH_BYTES = 256 << 10
_BATCH_SECONDS = 0.5
_CALL_SECONDS = 120.0
"""So long that a slow host is not sent again what it is still busy with. A host that is gone is
noticed by the end of its connection."""
_AWAY = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.UNIMPLEMENTED,  # a host that has not come up yet
    }
)
_REFUSALS_MAX = 3
"""How often a batch is offered to a host that answers, but with an error."""
_RETRY_FIRST_SECONDS = 0.2
_RETRY_MAX_SECONDS = 5.0


class Sender:
    """One source's records on their way. Oldest records give way to newer ones."""

    def __init__(
        self,
        call: Call,
        *,
        delivered: Callable[[int], None] | None = None,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        """call: takes an encoded LogRequest; delivered: told the last sequence that arrived."""
        self._call = call
        self._delivered = delivered
        self._limit = buffer_bytes
        self._waiting: deque[tuple[bytes, int]] = deque()
        self._bytes = 0
        self._dropped = 0
        self._has_some = asyncio.Event()
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._hurry = False

    def put(self, record: Record) -> None:
        """Takes a record; never blocks."""
        encoded = record.encode()
        self._waiting.append((encoded, record.sequence))
        self._bytes += len(encoded)
        while self._bytes > self._limit:
            gone, _ = self._waiting.popleft()
            self._bytes -= len(gone)
            self._dropped += 1
        self._has_some.set()
        self._is_idle.clear()

    def lost(self, count: int) -> None:
        """Records that were gone before they could be taken."""
        self._dropped += count

    async def flush(self) -> None:
        """Returns when everything that was put has arrived; sends without waiting for more."""
        self._hurry = True
        await self._is_idle.wait()

    async def run(self) -> None:
        """Sends for ever."""
        while True:
            await self._has_some.wait()
            if self._bytes < _BATCH_BYTES and not self._hurry:
                await asyncio.sleep(_BATCH_SECONDS)
            batch, last, count = self._take()
            try:
                await self._send(batch)
            except grpc.aio.AioRpcError as error:
                # One batch that the host cannot stomach shall not hold up all that comes after it.
                _log.warning("the host refused %d records: %s", count, error.code().name)
                self._dropped += count
            if last and self._delivered is not None:
                self._delivered(last)
            if not self._waiting:
                self._has_some.clear()
                self._is_idle.set()

    def _take(self) -> tuple[bytes, int, int]:
        """A batch, the last sequence in it, and how many records it stands for."""
        parts = []
        size = last = 0
        count = self._dropped
        if self._dropped:
            text = f"log forwarder: {self._dropped} records are missing here"
            parts.append(Record(vm_host_pb2.WARNING, time.time_ns(), text.encode()).encode())
            self._dropped = 0
        while self._waiting and size < _BATCH_BYTES:
            encoded, sequence = self._waiting.popleft()
            self._bytes -= len(encoded)
            size += len(encoded)
            last = max(last, sequence)
            parts.append(encoded)
            count += 1
        return b"".join(parts), last, count

    async def _send(self, batch: bytes) -> None:
        """Tries until the host has answered, with the same bytes, by which a host can tell that a
        batch is one that it has already. Raises AioRpcError: it was refused again and again.
        """
        try:
            await self._call(batch, timeout=_CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            _log.debug("the host does not take logs: %s", error.code().name)
            refusals = int(error.code() not in _AWAY)
        else:
            return
        import tenacity

        def is_worth_a_try(error: BaseException) -> bool:
            nonlocal refusals
            if not isinstance(error, grpc.aio.AioRpcError):
                return False
            refusals += error.code() not in _AWAY
            return refusals < _REFUSALS_MAX

        async for attempt in tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(is_worth_a_try),
            wait=tenacity.wait_random_exponential(_RETRY_FIRST_SECONDS, _RETRY_MAX_SECONDS),
            reraise=True,
        ):
            with attempt:
                await self._call(batch, timeout=_CALL_SECONDS)
