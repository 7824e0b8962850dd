"""The frames of the remote shell: a little-endian uint32 length and one message."""

from __future__ import annotations

import functools
import struct

from agent.pb import vsh_pb2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from google.protobuf.message import Message

MESSAGE_MAX = 4096
"""Bytes of a message."""

_DATA_MAX = 4000
"""Bytes of output in a message; the fields around them take some too."""

_READ_BYTES = 128 << 10
"""What is taken off a stream at once: each time costs as much as a dozen messages."""

_LENGTH = struct.Struct("<I")


class FrameError(Exception):
    """What came is no frame."""


class FrameReader:
    """Cuts what a stream brings into messages, in the buffer that it was received into."""

    def __init__(self) -> None:
        self._buffer = memoryview(bytearray(_READ_BYTES))
        self._start = 0
        self._end = 0

    def space(self) -> memoryview:
        """Where the next bytes of the stream are to be put; never empty. What received() gave is
        gone then.
        """
        rest = self._end - self._start
        self._buffer[:rest] = self._buffer[self._start : self._end]
        self._start, self._end = 0, rest
        return self._buffer[rest:]

    def received(self, count: int) -> Iterator[memoryview]:
        """The messages that are complete now that count more bytes are in space().

        Raises FrameError.
        """
        self._end += count
        while (first := self._start + _LENGTH.size) <= self._end:
            (length,) = _LENGTH.unpack_from(self._buffer, self._start)
            if length > MESSAGE_MAX:
                raise FrameError(f"a message of {length} bytes")
            if first + length > self._end:
                return
            self._start = first + length
            yield self._buffer[first : self._start]


def frame(message: Message) -> bytes:
    """One frame."""
    data = message.SerializeToString()
    return _LENGTH.pack(len(data)) + data


def input_in(message: memoryview) -> memoryview | None:
    """The input for stdin that a message is; None when it is another one, or written in another
    way than most write it, which takes protobuf to tell.
    """
    head = _head_of_input(len(message))
    size = len(head)
    return message[size:] if size and message[:size] == head else None


@functools.cache
def _head_of_input(length: int) -> bytes:
    # As in _head_of_full_frame(). The lengths in it reach to the end of the message, so whatever
    # begins like that is input to its end.
    stream = vsh_pb2.STDIN_STREAM
    for size in range(length - 1, 0, -1):
        data = vsh_pb2.DataMessage(stream=stream, data=bytes(size))
        whole = vsh_pb2.GuestMessage(data_message=data).SerializeToString()
        if len(whole) <= length:
            return whole[:-size] if len(whole) == length else b""
    return b""


def output_frames(stream: vsh_pb2.StdioStream.ValueType, data: bytes) -> bytes:
    """The frames that carry output of any length."""
    whole = len(data) - len(data) % _DATA_MAX
    parts: list[bytes] = []
    for start in range(0, whole, _DATA_MAX):
        parts += _head_of_full_frame(stream), data[start : start + _DATA_MAX]
    if whole < len(data):
        parts.append(_output_frame(stream, data[whole:]))
    return b"".join(parts)


def _output_frame(stream: vsh_pb2.StdioStream.ValueType, data: bytes) -> bytes:
    return frame(vsh_pb2.HostMessage(data_message=vsh_pb2.DataMessage(stream=stream, data=data)))


@functools.cache
def _head_of_full_frame(stream: vsh_pb2.StdioStream.ValueType) -> bytes:
    # The data come last, fields being in the order of their numbers: so frames of the same length
    # differ in nothing else, and the work of making one is done once.
    return _output_frame(stream, bytes(_DATA_MAX))[:-_DATA_MAX]
