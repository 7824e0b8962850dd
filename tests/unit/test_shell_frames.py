"""The guest's side of the remote shell's frames, and of a program's stdin."""

from __future__ import annotations

import asyncio
import os
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.pb import vsh_pb2
from agent.shell.frames import MESSAGE_MAX, FrameError, FrameReader, frame, input_in
from agent.shell.program_input import ProgramInput


def _feed(reader: FrameReader, data: bytes) -> list[bytes]:
    space = reader.space()
    space[: len(data)] = data
    return [bytes(message) for message in reader.received(len(data))]


@given(st.lists(st.binary(max_size=MESSAGE_MAX), max_size=20), st.data())
def test_messages_arrive_however_the_stream_is_cut(messages: list[bytes], data: Any) -> None:
    stream = b"".join(struct.pack("<I", len(one)) + one for one in messages)
    reader, got = FrameReader(), []
    while stream:
        count = data.draw(st.integers(1, min(len(stream), 50_000)))
        got += _feed(reader, stream[:count])
        stream = stream[count:]
    assert got == messages


def test_too_long_a_message_is_no_frame() -> None:
    with pytest.raises(FrameError, match="a message of 4097 bytes"):
        _feed(FrameReader(), struct.pack("<I", MESSAGE_MAX + 1))


def _input(size: int, stream: vsh_pb2.StdioStream.ValueType = vsh_pb2.STDIN_STREAM) -> bytes:
    data = vsh_pb2.DataMessage(stream=stream, data=os.urandom(size))
    return vsh_pb2.GuestMessage(data_message=data).SerializeToString()


def test_input_of_every_size_is_known_without_protobuf() -> None:
    for size in range(1, 4080):
        message = _input(size)
        found = input_in(memoryview(message))
        assert found is not None
        assert found == vsh_pb2.GuestMessage.FromString(message).data_message.data
    for other in (
        b"",
        _input(0),
        _input(100, vsh_pb2.STDOUT_STREAM),
        vsh_pb2.GuestMessage(signal=vsh_pb2.SIGNAL_INT).SerializeToString(),
    ):
        assert input_in(memoryview(other)) is None


@given(st.binary(max_size=300))
def test_what_is_taken_for_input_is_what_protobuf_takes_it_for(data: bytes) -> None:
    head = _input(len(data) + 1)[: -len(data) - 1]
    for message in (data, head + data, head + data + b"x", head + data + b"xx"):
        found = input_in(memoryview(message))
        if found is not None:
            parsed = vsh_pb2.GuestMessage.FromString(message)
            assert parsed.data_message.stream == vsh_pb2.STDIN_STREAM
            assert parsed.data_message.data == found


def test_input_waits_for_a_program_that_does_not_read() -> None:
    async def scenario() -> None:
        reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        room = asyncio.Event()
        program = ProgramInput(writing, is_terminal=False, on_room=room.set)
        sent = os.urandom(400_000)
        buffer = bytearray(100_000)
        for start in range(0, len(sent), len(buffer)):
            buffer[:] = sent[start : start + len(buffer)]
            program.put(memoryview(buffer)[:50_000])
            program.put(memoryview(buffer)[50_000:])
            program.write()
            buffer[:] = bytes(len(buffer))  # as when the next bytes are received into it
        assert program.is_full
        program.put(b"")
        program.write()
        got = bytearray()
        async with asyncio.timeout(10):
            while len(got) < len(sent):
                try:
                    got += os.read(reading, 1 << 16)
                except BlockingIOError:
                    await asyncio.sleep(0)
            assert got == sent
            await room.wait()
        assert os.read(reading, 1) == b""  # its end
        os.close(reading)

    asyncio.run(scenario())


def test_input_for_a_program_that_closed_its_stdin_is_dropped() -> None:
    async def scenario() -> None:
        reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        program = ProgramInput(writing, is_terminal=False, on_room=lambda: None)
        os.close(reading)
        for _ in range(3):
            program.put(b"x" * 100_000)
            program.write()
        assert not program.is_full
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(writing)

    asyncio.run(scenario())


def test_a_frame_is_its_length_and_its_message() -> None:
    message = vsh_pb2.SetupConnectionResponse(status=vsh_pb2.READY, pid=7)
    assert _feed(FrameReader(), frame(message)) == [message.SerializeToString()]
