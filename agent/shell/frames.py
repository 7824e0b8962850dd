"""The frames of the remote shell: a little-endian uint32 length and one message."""

from __future__ import annotations

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
    return b"".join(
        frame(
            vsh_pb2.HostMessage(
                data_message=vsh_pb2.DataMessage(
                    stream=stream, data=data[start : start + _DATA_MAX]
                )
            )
        )
        for start in range(0, len(data), _DATA_MAX)
    )
