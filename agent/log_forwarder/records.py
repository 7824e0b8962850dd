"""From what the kernel and syslog(3) write to LogRecords: severities, times, clean text."""

from __future__ import annotations

import re
import time

from agent.console import CONTROLS
from agent.pb import vm_host_pb2

_NS = 1_000_000_000
_DAY = 86_400
_MONTHS = dict(
    zip(
        b"Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split(),
        range(1, 13),
        strict=True,
    )
)
_PRIORITY = re.compile(rb"<(\d{1,3})>")
_TIME = re.compile(rb"([A-Z][a-z]{2}) ([ \d]\d) (\d\d):(\d\d):(\d\d) ")
_ISO_TIME = re.compile(rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,6})?(?:Z|[+-]\d\d:\d\d)) ")
_PRIORITY_MAX = 191
_QUARTER_HOUR = 900
"""Every timezone is a whole number of these away from UTC."""
_SKEW = 3


class Record:
    """severity: as in LogSeverity; time: ns since the epoch; content: clean(); sequence: the
    kernel's number of it, or 0.
    """

    __slots__ = ("content", "sequence", "severity", "time")

    def __init__(self, severity: int, time: int, content: bytes, sequence: int = 0) -> None:
        self.severity = severity
        self.time = time
        self.content = content
        self.sequence = sequence

    def encode(self) -> bytes:
        """A LogRequest with this record; requests put one after the other are one request."""
        seconds, nanos = divmod(self.time, _NS)
        record = vm_host_pb2.LogRecord(
            severity=self.severity,  # type: ignore[arg-type]  # an int is one
            timestamp=vm_host_pb2.Timestamp(seconds=seconds, nanos=nanos),
            content=self.content,
        )
        return vm_host_pb2.LogRequest(records=(record,)).SerializeToString()


def clean(data: bytes) -> bytes:
    r"""Valid UTF-8 on one line: other bytes and control characters become \xNN."""
    text = data.decode("utf-8", errors="backslashreplace")
    if not text.isprintable():
        text = text.translate(CONTROLS)
    return text.encode("utf-8", errors="backslashreplace")


def severity_of(priority: int) -> int:
    """LogSeverity of a priority, facility and severity of syslog(3) in one number."""
    return (priority & 7) + 1


def from_kernel(data: bytes, *, boot_time: int) -> Record | None:
    """A record as /dev/kmsg gives it, Documentation/ABI/testing/dev-kmsg; None for anything else.

    boot_time: ns since the epoch at which the kernel's clock was 0.
    """
    head, semicolon, rest = data.partition(b";")
    fields = head.split(b",")
    if not semicolon or len(fields) < 3:
        return None
    try:
        priority, sequence, microseconds = (int(field) for field in fields[:3])
    except ValueError:
        return None
    message = rest.partition(b"\n")[0]
    return Record(severity_of(priority), boot_time + microseconds * 1000, clean(message), sequence)


def from_syslog(data: bytes, *, now: int) -> Record:
    """A message as syslog(3) and logger(1) send it: RFC 3164, or RFC 5424 with its time in front.

    now: ns since the epoch. RFC 3164 has seconds only, no year, and the sender's timezone: a time
    that is now but for those is taken for now.
    """
    severity: int = vm_host_pb2.NOTICE  # RFC 3164, 4.3.3: user.notice
    if (match := _PRIORITY.match(data)) and int(match[1]) <= _PRIORITY_MAX:
        severity = severity_of(int(match[1]))
        data = data[match.end() :]
    then = now
    if match := _TIME.match(data):
        then = _from_header(match, now)
        data = data[match.end() :]
    elif data.startswith(b"1 ") and (match := _ISO_TIME.match(data, 2)):
        then = _from_iso(match[1], now)
        data = data[match.end() :]
    return Record(severity, then, clean(data.rstrip(b"\n\0")))


def _from_header(match: re.Match[bytes], now: int) -> int:
    month = _MONTHS.get(match[1])
    if month is None:
        return now
    day, hour, minute, second = (int(field) for field in match.groups()[1:])
    seconds = now // _NS
    year = time.localtime(seconds).tm_year
    best = None
    for candidate in (year - 1, year, year + 1):
        try:
            then = int(time.mktime((candidate, month, day, hour, minute, second, 0, 0, -1)))
        except (OverflowError, ValueError):
            continue
        if best is None or abs(then - seconds) < abs(best - seconds):
            best = then
    if best is None:
        return now
    off = abs(best - seconds)
    if off < _DAY and min(off % _QUARTER_HOUR, -off % _QUARTER_HOUR) <= _SKEW:
        return now
    return best * _NS


def _from_iso(text: bytes, now: int) -> int:
    from datetime import datetime

    try:
        return int(datetime.fromisoformat(text.decode()).timestamp() * 1e6) * 1000
    except (ValueError, OverflowError):
        return now
