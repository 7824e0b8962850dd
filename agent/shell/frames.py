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

_LENGTH = struct.Struct("<I")


class FrameError(Exception):
    """What came is no frame."""


class FrameReader:
    """Cuts what a stream brings into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The messages that are complete with data. Raises FrameError."""
        self._buffer += data
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            if length > MESSAGE_MAX:
                raise FrameError(f"a message of {length} bytes")
            end = start + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            yield bytes(self._buffer[start + _LENGTH.size : end])
            start = end
        del self._buffer[:start]


def frame(message: Message) -> bytes:
    """One frame."""
    data = message.SerializeToString()
    return _LENGTH.pack(len(data)) + data


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
