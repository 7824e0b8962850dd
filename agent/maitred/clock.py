"""SetTime: the wall clock of the VM."""

from __future__ import annotations

import time

from agent.maitred.errors import BadRequest, Failed, NotNow

TYPE_CHECKING = False
if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp

_NANOSECONDS = 1_000_000_000
_EARLIEST = 946_684_800
"""2000-01-01: a host that says less has no idea of the time, and everything signed would fail."""
_LATEST = 253_402_300_799
"""9999-12-31, the last time that a Timestamp can hold."""


def check(timestamp: Timestamp) -> int:
    """Nanoseconds since the epoch. Raises BadRequest."""
    if not 0 <= timestamp.nanos < _NANOSECONDS:
        raise BadRequest(f"cannot set the time: {timestamp.nanos} ns are no part of a second")
    if not _EARLIEST <= timestamp.seconds <= _LATEST:
        raise BadRequest(
            f"cannot set the time to {timestamp.seconds} s after the epoch: not from 2000 to 9999"
        )
    return timestamp.seconds * _NANOSECONDS + timestamp.nanos


def set_time(nanoseconds: int, *, is_own_machine: bool) -> None:
    """Sets the clock of the kernel, clock_settime(2).

    is_own_machine: whether the machine is the VM's own; no namespace has a wall clock.
    Raises NotNow: it is not; Failed: the kernel refused.
    """
    if not is_own_machine:
        raise NotNow("cannot set the time: with maitred.setup=no the clock is another machine's")
    try:
        time.clock_settime_ns(time.CLOCK_REALTIME, nanoseconds)
    except OSError as error:
        raise Failed(f"cannot set the time: {error.strerror}") from None
