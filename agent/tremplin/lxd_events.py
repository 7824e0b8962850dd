"""LXD's event stream: one websocket, read as it comes, nothing kept, connected again when lost.
What events mean is for lxd_operations.py and lifecycle.py.

Sources: LXD's doc/events.md; RFC 6455 (websocket) of which a client of LXD needs very little.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import Any

_log = logging.getLogger(__name__)

_RECONNECT_SECONDS = (0.05, 1.0)
"""The first and the longest delay between two attempts to connect."""
_LARGEST_MESSAGE = 16 * 1024 * 1024

_TEXT, _BINARY, _CLOSE, _PING, _PONG = 1, 2, 8, 9, 10


class EventStream:
    """Tells what happens in LXD for as long as run() runs."""

    def __init__(
        self,
        socket_path: str,
        *,
        on_event: Callable[[dict[str, Any]], None],
        on_connected: Callable[[], Awaitable[None]],
        on_lost: Callable[[], None],
    ) -> None:
        """socket_path: LXD's unix socket.

        on_event: is given each event, as LXD wrote it.
        on_connected: called when events flow, before the first one is given out: what happened
            while nobody listened can be caught up with here. It may raise OSError.
        on_lost: called when they flow no more.
        """
        self._socket_path = socket_path
        self._on_event = on_event
        self._on_connected = on_connected
        self._on_lost = on_lost
        self.connected = asyncio.Event()

    async def run(self) -> None:
        """Reads events until cancelled."""
        delay = _RECONNECT_SECONDS[0]
        while True:
            try:
                reader, writer = await self._connect()
            except (OSError, EOFError, ValueError):
                await asyncio.sleep(delay)
                delay = min(delay * 2, _RECONNECT_SECONDS[1])
                continue
            delay = _RECONNECT_SECONDS[0]
            try:
                await self._on_connected()
                self.connected.set()
                await self._read(reader, writer)
            except (OSError, EOFError, ValueError) as error:
                _log.warning("lost LXD's events: %s", error)
            finally:
                self.connected.clear()
                writer.close()
                self._on_lost()
            await asyncio.sleep(delay)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_unix_connection(
            self._socket_path, limit=_LARGEST_MESSAGE
        )
        try:
            key = base64.b64encode(os.urandom(16)).decode()
            writer.write(
                "GET /1.0/events?type=operation,lifecycle HTTP/1.1\r\n"
                "Host: lxd\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n".encode()
            )
            head = await reader.readuntil(b"\r\n\r\n")
            status = head.split(b"\r\n", 1)[0]
            if b" 101 " not in status:
                raise ConnectionError(f"LXD refuses its events: {status.decode(errors='replace')}")
        except BaseException:
            writer.close()
            raise
        return reader, writer

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        message = b""
        while True:
            first, second = await reader.readexactly(2)
            length = second & 0x7F
            if length == 126:
                length = int.from_bytes(await reader.readexactly(2), "big")
            elif length == 127:
                length = int.from_bytes(await reader.readexactly(8), "big")
            if second & 0x80 or length + len(message) > _LARGEST_MESSAGE:
                raise ValueError("a websocket frame that no server may send")
            payload = await reader.readexactly(length)
            opcode = first & 0x0F
            if opcode == _CLOSE:
                raise EOFError("LXD closed the stream")
            if opcode == _PING:
                writer.write(_masked(_PONG, payload))
            elif opcode in {0, _TEXT, _BINARY}:
                message += payload
                if first & 0x80:
                    self._dispatch(message)
                    message = b""

    def _dispatch(self, message: bytes) -> None:
        event = json.loads(message)
        if isinstance(event, dict):
            self._on_event(event)


def _masked(opcode: int, payload: bytes) -> bytes:
    # Frames of a client are masked (RFC 6455, 5.3); those answered here are at most 125 bytes.
    mask = os.urandom(4)
    body = bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))
    return bytes([0x80 | opcode, 0x80 | len(payload)]) + mask + body
