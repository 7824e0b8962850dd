"""What processes without console print: the last 64 KiB of each are kept, and every line goes to
the guest's log with the name of the process. One that prints without end is slowed down, not PID 1.
"""

from __future__ import annotations

import os
import time

from agent.lean_stdlib import socket
from agent.process_supervisor.loop import READABLE, read

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from agent.process_supervisor.loop import Loop

RING = 65536
"""Bytes of its output that a process is remembered by."""

_LINE_MAX = 2048
"""Bytes after which a line in the log is broken."""

_BURST = 1024 * 1024
_PAUSE = 0.1
"""A process may print _BURST bytes, then nothing is read from it for _PAUSE seconds."""


class Ring:
    """The last bytes of a stream. end: how many there were in all."""

    __slots__ = ("_data", "end")

    def __init__(self) -> None:
        self._data = bytearray()
        self.end = 0

    def append(self, data: bytes, limit: int = RING) -> None:
        """Adds data and forgets all but the last `limit` bytes."""
        self._data += data
        self.end += len(data)
        del self._data[:-limit]

    def restore(self, data: bytes, end: int) -> None:
        """As it was: its bytes, and how many there had been in all."""
        self._data = bytearray(data)
        self.end = end

    def read(self, offset: int, size: int) -> tuple[int, bytes]:
        """At most size bytes from offset on, or from where it still remembers; and that place."""
        start = self.end - len(self._data)
        offset = min(max(offset, start), self.end)
        return offset, bytes(self._data[offset - start : offset - start + size])


class SystemLog:
    """Sends lines to syslog's socket, RFC 3164; a log that is not there or full loses them."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._socket = socket.socket(
            socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        )

    def close(self) -> None:
        """Sends nothing any more."""
        self._socket.close()

    def write(self, name: str, pid: int, line: bytes) -> None:
        """One line of a process's output. Facility daemon, severity info."""
        head = f"<30>{time.strftime('%b %e %H:%M:%S')} {name}[{pid}]: "
        try:
            self._socket.sendto(head.encode() + line, self._path)
        except OSError:
            pass


class Outputs:
    """The pipes from which the output of processes is read.

    log: told (name, pid, line) of every line; None to forward nothing. follower: told (pipe, data)
    of everything. spare: descriptors that must stay free for everything else.
    """

    def __init__(
        self,
        loop: Loop,
        *,
        log: Callable[[str, int, bytes], None] | None,
        follower: Callable[[Pipe, bytes], None],
        spare: int = 64,
    ) -> None:
        import resource

        self.loop = loop
        self.log = log
        self.follower = follower
        self._highest = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - spare
        self.pipes: dict[int, Pipe] = {}

    def open(self) -> tuple[int, int] | None:
        """A pipe for a process about to be started: (to read, to write).

        None when descriptors are running out: the process goes without.
        """
        try:
            reader, writer = os.pipe2(os.O_CLOEXEC)
        except OSError:
            return None
        if reader >= self._highest:
            os.close(reader)
            os.close(writer)
            return None
        os.set_blocking(reader, False)
        return reader, writer

    def follow(self, reader: int, ring: Ring, name: str, pid: int, *, logged: bool = True) -> Pipe:
        """Reads from a pipe into ring, and the log when logged, until all its writers are gone."""
        pipe = self.pipes[reader] = Pipe(self, reader, ring, name, pid, logged=logged)
        return pipe


class Pipe:
    """The output of one run of one process, and of what it leaves running."""

    __slots__ = ("_budget", "_line", "_outputs", "fd", "logged", "name", "pid", "ring")

    def __init__(
        self, outputs: Outputs, fd: int, ring: Ring, name: str, pid: int, *, logged: bool
    ) -> None:
        self._outputs = outputs
        self._budget = _BURST
        self._line = b""
        self.fd = fd
        self.ring = ring
        self.name = name
        self.pid = pid
        self.logged = logged and outputs.log is not None
        outputs.loop.watch(fd, READABLE, self.ready)

    def ready(self, _mask: int = READABLE) -> None:
        """Reads what is there, no more than once. Harmless after the end."""
        if self.fd not in self._outputs.pipes:
            return
        try:
            data = read(self.fd)
        except BlockingIOError:
            return
        if not data:
            self._close()
            return
        self.ring.append(data)
        if self.logged:
            self._log_lines(data)
        self._outputs.follower(self, data)
        self._budget -= len(data)
        if self._budget <= 0:
            self._pause()

    def _log_lines(self, data: bytes) -> None:
        *lines, self._line = (self._line + data).split(b"\n")
        while len(self._line) > _LINE_MAX:
            lines.append(self._line[:_LINE_MAX])
            self._line = self._line[_LINE_MAX:]
        if self._outputs.log:
            for line in lines:
                for start in range(0, len(line), _LINE_MAX):
                    self._outputs.log(self.name, self.pid, line[start : start + _LINE_MAX])

    def _pause(self) -> None:
        self._budget = _BURST
        self._outputs.loop.change(self.fd, 0)
        self._outputs.loop.call_later(_PAUSE, self._resume)

    def _resume(self) -> None:
        if self._outputs.pipes.get(self.fd) is self:
            self._outputs.loop.change(self.fd, READABLE)

    def _close(self) -> None:
        if self._line and self._outputs.log:  # there is none unless logged
            self._outputs.log(self.name, self.pid, self._line)
        self._outputs.loop.forget(self.fd)
        del self._outputs.pipes[self.fd]
        os.close(self.fd)
