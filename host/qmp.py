"""A client of QEMU's monitor (QMP), enough to plug devices in and out of a running VM."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any, Self

from host.errors import HostError

if TYPE_CHECKING:
    from pathlib import Path


class Monitor:
    """One session with a VM's monitor; an async context manager."""

    def __init__(self, path: Path) -> None:
        """path: QEMU's QMP socket."""
        self._path = path
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_unix_connection(str(self._path))
        await self._reader.readline()
        await self.run("qmp_capabilities")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    async def _message(self) -> dict[str, Any]:
        line = await self._reader.readline()
        if not line:
            raise HostError("cannot reach QEMU's monitor: it hung up")
        message: dict[str, Any] = json.loads(line)
        return message

    async def run(self, command: str, **arguments: Any) -> Any:
        """Runs a QMP command (QEMU QMP Reference Manual).

        Returns what it returns. Raises HostError with QEMU's reason.
        """
        request = {"execute": command, "arguments": arguments}
        self._writer.write(json.dumps(request).encode() + b"\n")
        while True:
            answer = await self._message()
            if "error" in answer:
                raise HostError(f"cannot {command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    async def wait_for_event(self, name: str) -> dict[str, Any]:
        """The data of the next event of this name."""
        while True:
            message = await self._message()
            if message.get("event") == name:
                data: dict[str, Any] = message.get("data", {})
                return data
