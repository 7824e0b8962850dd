"""The one event loop of PID 1: file descriptors, timers and signals. What a callback raises is
written to the console and goes no further.
"""

from __future__ import annotations

import os
import select
import time

from agent.console import write_line
from agent.lean_stdlib import heapq, signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

READABLE = select.EPOLLIN
WRITABLE = select.EPOLLOUT
BROKEN = select.EPOLLERR | select.EPOLLHUP
"""Comes unasked."""

_SWEEP_AT = 256
"""Timers, cancelled ones among them, from which on it is worth looking for those."""

_BUFFER = memoryview(bytearray(65536))


def read(fd: int) -> bytes:
    """What there is to read from a descriptor, at most 64 KiB; nothing at its end.

    Raises OSError, BlockingIOError when there is nothing yet.
    """
    # os.read() would get 64 KiB from malloc(3) for each call. What is allocated meanwhile lies
    # behind them, and the heap grows, by 0.3 MB in 100,000 launches.
    return bytes(_BUFFER[: os.readv(fd, (_BUFFER,))])


def report(error: BaseException, doing: str) -> None:
    """One console line about an exception that nobody expected, with the place it came from."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code if trace else None
    where = f" at {code.co_filename}:{trace.tb_lineno}" if code and trace else ""
    write_line("init", f"cannot {doing}: {type(error).__name__}: {error}{where}")


class Timer:
    """A call that is due once."""

    __slots__ = ("_callback", "due")

    def __init__(self, due: float, callback: Callable[[], object]) -> None:
        self.due = due
        self._callback: Callable[[], object] | None = callback

    def __lt__(self, other: Timer) -> bool:
        return self.due < other.due

    def cancel(self) -> None:
        """It will not be called. Harmless when it was."""
        self._callback = None

    def fire(self) -> None:
        """Calls it, unless it was cancelled."""
        callback, self._callback = self._callback, None
        if callback:
            callback()


class Timers:
    """Timers in the order in which they are due. clock: seconds that never go back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.now = clock
        self._heap: list[Timer] = []
        self._sweep_at = _SWEEP_AT

    def call_later(self, delay: float, callback: Callable[[], object]) -> Timer:
        """Calls callback in delay seconds."""
        if len(self._heap) >= self._sweep_at:
            # Cancelled ones stay until they would be due, which may be an hour.
            self._heap = [timer for timer in self._heap if timer._callback]
            heapq.heapify(self._heap)
            self._sweep_at = max(_SWEEP_AT, 2 * len(self._heap))
        timer = Timer(self.now() + delay, callback)
        heapq.heappush(self._heap, timer)
        return timer

    def wait(self) -> float | None:
        """Seconds until the next one is due; None when there is none."""
        heap = self._heap
        while heap and heap[0]._callback is None:
            heapq.heappop(heap)
        return max(0.0, heap[0].due - self.now()) if heap else None

    def due(self) -> list[Timer]:
        """Takes out those that are due."""
        now, taken = self.now(), []
        while self._heap and self._heap[0].due <= now:
            taken.append(heapq.heappop(self._heap))
        return taken


class Loop(Timers):
    """Waits for whatever comes next and calls who asked for it."""

    def __init__(self) -> None:
        super().__init__()
        self._poll = select.epoll()
        self._callbacks: dict[int, Callable[[int], object]] = {}
        self._wake_up = -1
        self._arrived: set[int] = set()
        self._handlers: dict[int, Callable[[], object]] = {}

    def watch(self, fd: int, mask: int, callback: Callable[[int], object]) -> None:
        """Calls callback with the ready part of mask, or BROKEN, for as long as fd is ready."""
        self._poll.register(fd, mask)
        self._callbacks[fd] = callback

    def change(self, fd: int, mask: int) -> None:
        """Waits for something else on a watched fd; for BROKEN only when mask is 0."""
        self._poll.modify(fd, mask)

    def forget(self, fd: int) -> None:
        """No longer watches fd; to be called before fd is closed."""
        del self._callbacks[fd]
        self._poll.unregister(fd)

    def on_signals(self, handlers: dict[int, Callable[[], object]]) -> None:
        """Calls a handler, from the loop, some time after its signal came; many become one."""
        receiver, self._wake_up = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._handlers = handlers
        signal.set_wakeup_fd(self._wake_up, warn_on_full_buffer=False)
        for number in handlers:
            signal.signal(number, lambda number, _frame: self._arrived.add(number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, handlers)  # blocked over an upgrade
        self.watch(receiver, READABLE, lambda _mask: self._signals(receiver))

    def _signals(self, receiver: int) -> None:
        # The pipe only wakes: when it is full, which signals came is still in the set.
        read(receiver)
        while self._arrived:
            self._contain(self._handlers[self._arrived.pop()])

    def _contain(self, callback: Callable[..., object], *args: Any) -> None:
        try:
            callback(*args)
        except Exception as error:  # noqa: BLE001  # PID 1 goes on whatever happens
            report(error, f"run {getattr(callback, '__qualname__', callback)}")

    def turn(self) -> None:
        """Waits for the next thing and handles what is there."""
        wait = self.wait()
        # epoll counts in whole milliseconds: round up, or it spins through the last one.
        ready = self._poll.poll(-1 if wait is None else wait + 0.001)
        asked = [self._callbacks.get(fd) for fd, _mask in ready]
        for (fd, mask), callback in zip(ready, asked, strict=True):
            # An earlier one may have closed fd, and the number be somebody else's already.
            if callback and self._callbacks.get(fd) is callback:
                self._contain(callback, mask)
        for timer in self.due():
            self._contain(timer.fire)
