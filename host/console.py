"""The VM's serial console: everything the guest writes there, as text that can be searched and
waited for, in a log file, and passed on live; and what is typed into it.
"""

from __future__ import annotations

import asyncio
import codecs
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_PANIC = "Kernel panic - not syncing"
_CHUNK = 1 << 16
_KEPT_MAX = 4 << 20  # characters; the log has everything

# What terminals do with colours and cursors is of no use in text that is searched.
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_c78=>])")


def _plain(text: str) -> str:
    return _ESCAPES.sub("", text).replace("\r", "")


class Console:
    """A serial console; the bytes come from a unix socket that QEMU connects to."""

    def __init__(self, log: Path) -> None:
        """log: the file that gets every byte."""
        self._log = log.open("wb", buffering=0)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._lines = ""
        self._unfinished = ""
        self._dropped = 0
        self._changed = asyncio.Condition()
        self._watchers: set[Callable[[bytes], None]] = set()
        self._writer: asyncio.StreamWriter | None = None
        self.panicked = asyncio.Event()
        self.log_path = log

    @property
    def text(self) -> str:
        """Everything so far, with line feeds only and without escape sequences; of very much, the
        last few megabytes.
        """
        return self._lines + _plain(self._unfinished)

    @property
    def position(self) -> int:
        """How many characters of text there have been."""
        return self._dropped + len(self.text)

    def since(self, position: int) -> str:
        """The text from a position on."""
        return self.text[max(0, position - self._dropped) :]

    def last_lines(self, count: int = 5) -> list[str]:
        """The last lines that are not blank; after a panic, those up to the line that says so, as
        what follows is registers and stack.
        """
        lines = [line for line in self.text.splitlines() if line.strip()]
        if self.panicked.is_set():
            at = max((n for n, line in enumerate(lines) if _PANIC in line), default=len(lines))
            lines = lines[: at + 1]
        return lines[-count:]

    def watch(self, watcher: Callable[[bytes], None]) -> Callable[[], None]:
        """Calls watcher(data) with whatever comes from now on; returns what ends that."""
        self._watchers.add(watcher)
        return lambda: self._watchers.discard(watcher)

    def write(self, data: bytes) -> None:
        """Types into the console; without a VM nothing happens."""
        if self._writer is not None:
            self._writer.write(data)

    async def wait_for(self, pattern: str, *, start: int = 0) -> re.Match[str]:
        """The first match of a regular expression in the text from a position on."""
        expression = re.compile(pattern, re.MULTILINE)
        async with self._changed:
            while not (match := expression.search(self.since(start))):
                await self._changed.wait()
            return match

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Takes what one boot of the VM writes, until it ends."""
        self._writer = writer
        try:
            while data := await reader.read(_CHUNK):
                await self.take(data)
        except ConnectionError:
            pass
        finally:
            if self._writer is writer:
                self._writer = None
            writer.close()

    async def take(self, data: bytes) -> None:
        """Takes a piece of what the VM writes."""
        self._log.write(data)
        for watcher in tuple(self._watchers):
            watcher(data)
        async with self._changed:
            # An escape sequence may be cut by the end of a read: only whole lines are final.
            lines, feed, rest = (self._unfinished + self._decoder.decode(data)).rpartition("\n")
            self._lines += _plain(lines + feed)
            if len(self._lines) > _KEPT_MAX:
                drop = len(self._lines) - _KEPT_MAX // 2
                self._lines = self._lines[drop:]
                self._dropped += drop
            self._unfinished = rest
            if _PANIC in lines or _PANIC in rest:
                self.panicked.set()
            self._changed.notify_all()

    def close(self) -> None:
        """Closes the log."""
        self._log.close()
