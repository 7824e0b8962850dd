"""What becomes of a line that the kernel or a program logs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.log_forwarder import records
from agent.pb import vm_host_pb2

if TYPE_CHECKING:
    from collections.abc import Iterator

NS = 1_000_000_000
NOW = 1_790_000_000 * NS + 123


@pytest.fixture(autouse=True)
def _in_zurich() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "Europe/Zurich")
        time.tzset()
        yield
    time.tzset()


def _header(seconds: int) -> bytes:
    moment = time.localtime(seconds)
    return (
        time.strftime("%b ", moment).encode()
        + f"{moment.tm_mday:2} ".encode()
        + time.strftime("%H:%M:%S ", moment).encode()
    )


def test_a_message_of_glibc() -> None:
    data = b"<38>" + _header(NOW // NS) + b"sshd[12]: hello\n\0"
    record = records.from_syslog(data, now=NOW)
    assert (record.severity, record.time, record.content) == (
        vm_host_pb2.INFO,
        NOW,
        b"sshd[12]: hello",
    )


@pytest.mark.parametrize(("severity", "expected"), [(0, 1), (3, 4), (4, 5), (7, 8)])
def test_severities(severity: int, expected: int) -> None:
    assert records.from_syslog(b"<%d>x" % (8 * 23 + severity), now=NOW).severity == expected
    kernel = records.from_kernel(b"%d,7,1000,-;x" % severity, boot_time=0)
    assert kernel is not None
    assert kernel.severity == expected


def test_messages_without_a_priority_are_notices() -> None:
    for data in (b"plain", b"<192>too much", b"<>x", b"<1x>", b""):
        record = records.from_syslog(data, now=NOW)
        assert (record.severity, record.content) == (vm_host_pb2.NOTICE, data)


def test_a_time_of_long_ago_is_kept() -> None:
    then = NOW // NS - 5 * 86_400 - 17
    assert records.from_syslog(b"<13>" + _header(then) + b"x", now=NOW).time == then * NS


def test_a_time_in_the_timezone_of_the_sender_is_now() -> None:
    sender = NOW // NS - 5 * 3600 - 1800
    assert records.from_syslog(b"<13>" + _header(sender) + b"x", now=NOW).time == NOW


def test_the_year_is_the_nearest_one() -> None:
    new_year = int(time.mktime((2027, 1, 1, 0, 0, 10, 0, 0, -1)))
    then = int(time.mktime((2026, 12, 30, 12, 34, 56, 0, 0, -1)))
    data = b"<13>Dec 30 12:34:56 x"
    assert records.from_syslog(data, now=new_year * NS).time == then * NS


def test_a_message_of_rfc_5424() -> None:
    data = b"<165>1 2003-10-11T22:14:15.003Z host app - ID47 - text"
    record = records.from_syslog(data, now=NOW)
    assert record.time == 1_065_910_455 * NS + 3_000_000
    assert record.content == b"host app - ID47 - text"


def test_a_record_of_the_kernel() -> None:
    data = b"6,339,5140900,-;NET: Registered\\x0a PF_VSOCK\n SUBSYSTEM=net\n"
    record = records.from_kernel(data, boot_time=NOW)
    assert record is not None
    assert (record.sequence, record.time) == (339, NOW + 5_140_900_000)
    assert record.content == b"NET: Registered\\x0a PF_VSOCK"
    for bad in (b"", b"6,339", b"a,b,c;d", b"6,339,1 no semicolon"):
        assert records.from_kernel(bad, boot_time=NOW) is None


def test_text_is_clean() -> None:
    assert records.clean(b"a\tb\nc\x1b[1m\x7f") == rb"a\x09b\x0ac\x1b[1m\x7f"
    assert records.clean("grün €\u0085".encode()) == "grün €\\x85".encode()
    assert records.clean(b"\xff\xc3") == rb"\xff\xc3"


@given(st.binary(max_size=300))
def test_any_bytes_become_a_good_record(data: bytes) -> None:
    record = records.from_syslog(data, now=NOW)
    text = record.content.decode("utf-8")
    assert not any(ord(char) < 0x20 or 0x7F <= ord(char) < 0xA0 for char in text)
    request = vm_host_pb2.LogRequest.FromString(record.encode() * 2)
    assert len(request.records) == 2
    assert request.records[1].content == record.content
    records.from_kernel(data, boot_time=NOW)
