"""The client of the remote shell, against a peer that speaks the frames; the guest's own side is in
the VM tests.
"""

from __future__ import annotations

import asyncio
import signal
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from agent.pb import vsh_pb2
from host.shell import Session, ShellError, open_session, request_for

Peer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def _receive(reader: asyncio.StreamReader, kind: Any) -> Any:
    (length,) = struct.unpack("<I", await reader.readexactly(4))
    assert length <= 4096
    return kind.FromString(await reader.readexactly(length))


def _send(writer: asyncio.StreamWriter, message: Any) -> None:
    data = message.SerializeToString()
    writer.write(struct.pack("<I", len(data)) + data)


def _with_peer(directory: Path, peer: Peer, scene: Callable[[Session], Awaitable[None]]) -> None:
    async def run() -> None:
        failures: list[BaseException] = []

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await peer(reader, writer)
            except BaseException as error:
                failures.append(error)
                raise
            finally:
                writer.close()

        server = await asyncio.start_unix_server(accept, path=str(directory / "s"))
        connection = await asyncio.open_unix_connection(str(directory / "s"))
        request = request_for(["cat"], container=None, user="", cwd="", env={}, pty=False)
        try:
            session = await open_session(connection, request)
            try:
                await scene(session)
            finally:
                await session.close()
        finally:
            server.close()
        assert not failures

    asyncio.run(run())


def test_session_from_start_to_exit_code(tmp_path: Path) -> None:
    """Input in frames that fit, a signal, a new size, two streams of output and the code."""
    payload = bytes(range(256)) * 40

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await _receive(reader, vsh_pb2.SetupConnectionRequest)
        assert (list(request.argv), request.nopty) == (["cat"], True)
        _send(writer, vsh_pb2.SetupConnectionResponse(status=vsh_pb2.READY, pid=7))
        got = b""
        while (message := await _receive(reader, vsh_pb2.GuestMessage)).data_message.data:
            assert message.data_message.stream == vsh_pb2.STDIN_STREAM
            got += message.data_message.data
        assert got == payload
        assert (await _receive(reader, vsh_pb2.GuestMessage)).signal == vsh_pb2.SIGNAL_INT
        assert (await _receive(reader, vsh_pb2.GuestMessage)).resize_message.rows == 50
        for stream, data in ((vsh_pb2.STDOUT_STREAM, b"out"), (vsh_pb2.STDERR_STREAM, b"err")):
            data_message = vsh_pb2.DataMessage(stream=stream, data=data)
            _send(writer, vsh_pb2.HostMessage(data_message=data_message))
        status = vsh_pb2.ConnectionStatusMessage(status=vsh_pb2.EXITED, code=3)
        _send(writer, vsh_pb2.HostMessage(status_message=status))

    async def scene(session: Session) -> None:
        assert session.pid == 7
        await session.send_input(payload)
        await session.send_input(b"")
        session.send_signal(signal.SIGINT)
        session.resize(rows=50, columns=100)
        assert [item async for item in session.output()] == [(1, b"out"), (2, b"err"), 3]

    _with_peer(tmp_path, peer, scene)


def test_refusal_and_broken_connections(tmp_path: Path) -> None:
    """The guest's reason, a hang-up and nonsense all become one clear error."""

    async def refuses(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _receive(reader, vsh_pb2.SetupConnectionRequest)
        _send(
            writer,
            vsh_pb2.SetupConnectionResponse(status=vsh_pb2.FAILED, description="no user tux"),
        )

    async def hangs_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _receive(reader, vsh_pb2.SetupConnectionRequest)
        _send(writer, vsh_pb2.SetupConnectionResponse(status=vsh_pb2.READY))

    async def talks_nonsense(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await hangs_up(reader, writer)
        writer.write(b"HTTP/1.1 200 OK")

    async def read(session: Session) -> None:
        async for _ in session.output():
            pass

    for peer, message in (
        (refuses, "cannot open a shell: no user tux"),
        (hangs_up, "cannot go on: the guest hung up"),
        (talks_nonsense, "cannot go on: the guest sent a message of"),
    ):
        with pytest.raises(ShellError, match=message):
            _with_peer(tmp_path, peer, read)


def test_container_sessions_go_through_lxc() -> None:
    """Working directory, environment and command reach the user's own session, quoted."""
    request = request_for(
        ["echo", "a b"],
        container="penguin",
        user="tux",
        cwd="/my dir",
        env={"TERM": "xterm", "WORD": "it's"},
        pty=False,
    )
    assert list(request.argv)[:2] == ["/usr/bin/lxc", "exec"]
    assert list(request.argv)[-5:-1] == ["su", "-", "tux", "-c"]
    assert request.argv[-1] == "cd '/my dir' && export WORD='it'\"'\"'s' && exec echo 'a b'"
    assert request.env["LXD_DIR"] == "/mnt/stateful/lxd"
    login = request_for([], container="penguin", user="tux", cwd="", env={}, pty=True)
    assert list(login.argv)[-3:] == ["/bin/login", "-f", "tux"]
    assert login.window_rows > 0
