"""What the host sends for a program's stdin, on its way there. A program that does not read slows
the host down.
"""

from __future__ import annotations

import asyncio
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_WRITE_MAX = 64 << 10
_WAITING_MAX = 64 << 10
"""Bytes kept for a program that does not read them, from which on the host has to wait."""
_END_OF_INPUT = b"\x04"  # what VEOF is set to in a new terminal


class ProgramInput:
    """The writing end of a program's stdin, not blocking."""

    def __init__(self, descriptor: int, *, is_terminal: bool, on_room: Callable[[], None]) -> None:
        """on_room: called when is_full has become false.

        The descriptor is closed at the end of the input; that of a terminal, which output is read
        from as well, is left to its owner.
        """
        self._descriptor = descriptor
        self._is_terminal = is_terminal
        self._on_room = on_room
        self._loop = asyncio.get_running_loop()
        self._new: list[bytes | memoryview] = []
        self._waiting = bytearray()
        self._ends = False
        self._is_writing = False
        self.is_full = False
        """Whether more shall not come before on_room()."""

    def put(self, data: bytes | memoryview) -> None:
        """Takes input, none for its end. It is read from data by the next write()."""
        if self._descriptor < 0 or self._ends:
            return
        if data:
            self._new.append(data)
        elif self._is_terminal:
            self._new.append(_END_OF_INPUT)
        else:
            self._ends = True

    def write(self) -> None:
        """Passes on what was put. To be called once for all that came together: a system call costs
        as much as a dozen messages.
        """
        if self._descriptor < 0 or not (self._new or self._ends):
            return
        written = 0
        if self._new and not self._is_writing:
            try:
                written = os.writev(self._descriptor, self._new)
            except (BlockingIOError, InterruptedError):
                pass
            except OSError:
                self._refused()
                return
        for piece in self._new:
            if written < len(piece):
                self._waiting += piece[written:]
            written = max(0, written - len(piece))
        self._new.clear()
        if not self._waiting:
            self._all_is_written()
            return
        self.is_full = len(self._waiting) > _WAITING_MAX
        if not self._is_writing:
            self._is_writing = True
            self._loop.add_writer(self._descriptor, self._write_waiting)

    def _write_waiting(self) -> None:
        try:
            del self._waiting[: os.write(self._descriptor, self._waiting[:_WRITE_MAX])]
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._refused()
            return
        if not self._waiting:
            self._all_is_written()

    def _refused(self) -> None:
        # The program does not read any more.
        self._new.clear()
        self._waiting.clear()
        self._ends = True
        self._all_is_written()

    def _all_is_written(self) -> None:
        if self._is_writing:
            self._is_writing = False
            self._loop.remove_writer(self._descriptor)
        if self._ends:
            self.close()
        if self.is_full:
            self.is_full = False
            self._on_room()

    def close(self) -> None:
        """Takes and writes nothing any more."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor < 0:
            return
        self._new.clear()
        self._waiting.clear()
        if self._is_writing:
            self._is_writing = False
            self._loop.remove_writer(descriptor)
        if not self._is_terminal:
            os.close(descriptor)
