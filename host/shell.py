"""A client of the remote shell (vsh, vsock port 9001 of the guest): a terminal, or plain streams,
of a program in the VM or in a container.

A frame is a little-endian uint32 length and one message of at most 4096 bytes (protos/vsh.proto).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import struct
import sys
from typing import TYPE_CHECKING, Any

from agent.pb import vsh_pb2
from host.commands import LXC_ENVIRONMENT
from host.errors import HostError
from host.terminal import raw_mode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

PORT = 9001

_LENGTH = struct.Struct("<I")
_MESSAGE_MAX = 4096
_DATA_MAX = 4000  # leaves room for the fields around it
_AT_ONCE = 16
"""Messages in a write: each write costs as much as several messages."""
_OPEN_SECONDS = 20.0
_SIGNALS = {
    signal.SIGHUP: vsh_pb2.SIGNAL_HUP,
    signal.SIGINT: vsh_pb2.SIGNAL_INT,
    signal.SIGQUIT: vsh_pb2.SIGNAL_QUIT,
    signal.SIGTERM: vsh_pb2.SIGNAL_TERM,
}


class ShellError(HostError):
    """The session could not begin, or broke off."""


async def _read_frame(reader: asyncio.StreamReader) -> bytes:
    """Raises ShellError when the guest hangs up or sends what is no frame."""
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        if length > _MESSAGE_MAX:
            raise ShellError(f"cannot go on: the guest sent a message of {length} bytes")
        return await reader.readexactly(length)
    except (asyncio.IncompleteReadError, ConnectionError):
        raise ShellError("cannot go on: the guest hung up") from None


class Session:
    """One session, begun by open_session()."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pid: int
    ) -> None:
        self._reader = reader
        self._writer = writer
        self.pid = pid
        """The program's process id in the VM."""

    def _send(self, *messages: Any) -> None:
        pieces = [message.SerializeToString() for message in messages]
        self._writer.write(b"".join(_LENGTH.pack(len(data)) + data for data in pieces))

    async def send_input(self, data: bytes) -> None:
        """Bytes for the program's stdin, none for its end; returns when there is room for more."""
        pieces = [data[at : at + _DATA_MAX] for at in range(0, len(data), _DATA_MAX)] or [b""]
        for start in range(0, len(pieces), _AT_ONCE):
            self._send(*map(_input, pieces[start : start + _AT_ONCE]))
            with contextlib.suppress(ConnectionError):  # the reading side tells
                await self._writer.drain()

    def resize(self, *, rows: int, columns: int) -> None:
        """The terminal has a new size, in characters."""
        size = vsh_pb2.WindowResizeMessage(rows=rows, cols=columns)
        self._send(vsh_pb2.GuestMessage(resize_message=size))

    def send_signal(self, number: signal.Signals) -> None:
        """SIGHUP, SIGINT, SIGQUIT or SIGTERM for the program."""
        self._send(vsh_pb2.GuestMessage(signal=_SIGNALS[number]))

    async def output(self) -> AsyncIterator[tuple[int, bytes] | int]:
        """What the program writes, (1, bytes) for stdout and (2, bytes) for stderr, and at last
        its exit code.

        Raises ShellError.
        """
        while True:
            message = vsh_pb2.HostMessage.FromString(await _read_frame(self._reader))
            if message.WhichOneof("msg") == "data_message":
                is_error = message.data_message.stream == vsh_pb2.STDERR_STREAM
                yield (2 if is_error else 1, message.data_message.data)
            elif message.status_message.status == vsh_pb2.EXITED:
                yield message.status_message.code
                return
            elif message.status_message.status == vsh_pb2.FAILED:
                raise ShellError(f"cannot go on: {message.status_message.description}")

    async def close(self) -> None:
        """Ends the connection, and with it a program that still runs."""
        await _close(self._writer)


def _input(data: bytes) -> Any:
    stream = vsh_pb2.DataMessage(stream=vsh_pb2.STDIN_STREAM, data=data)
    return vsh_pb2.GuestMessage(data_message=stream)


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def open_session(
    connection: tuple[asyncio.StreamReader, asyncio.StreamWriter], request: Any
) -> Session:
    """Begins a session.

    connection: to port 9001 of the guest; request: a SetupConnectionRequest.
    Raises ShellError with the guest's reason.
    """
    reader, writer = connection
    try:
        data = request.SerializeToString()
        if len(data) > _MESSAGE_MAX:
            raise ShellError("cannot open a shell: command and environment exceed 4096 bytes")
        writer.write(_LENGTH.pack(len(data)) + data)
        async with asyncio.timeout(_OPEN_SECONDS):
            answer = vsh_pb2.SetupConnectionResponse.FromString(await _read_frame(reader))
        if answer.status != vsh_pb2.READY:
            raise ShellError(f"cannot open a shell: {answer.description or 'no reason given'}")
    except TimeoutError:
        await _close(writer)
        raise ShellError("cannot open a shell: the guest does not answer") from None
    except BaseException:
        await _close(writer)
        raise
    return Session(reader, writer, answer.pid)


def request_for(
    argv: Sequence[str],
    *,
    container: str | None,
    user: str,
    cwd: str,
    env: Mapping[str, str],
    pty: bool,
) -> Any:
    """The SetupConnectionRequest for a command, or for a login shell when argv is empty.

    container: None for the VM itself. user: whose session, "" for root in the VM.
    cwd: the working directory, "" for home.
    pty: whether it gets a terminal; its size is that of this process's.
    """
    env = dict(env)
    if container is not None:
        # As step 10 of the contract has it: lxc knows its own way into a container.
        mode = "--force-interactive" if pty else "--force-noninteractive"
        term = env.get("TERM", "dumb")
        argv = [
            "/usr/bin/lxc", "exec", mode, f"--env=TERM={term}", container, "--",
            *_in_container(argv, user=user, cwd=cwd, env=env, pty=pty),
        ]  # fmt: skip
        env, user, cwd = LXC_ENVIRONMENT | {"TERM": term}, "", ""
    rows, columns = _window_size() if pty else (0, 0)
    return vsh_pb2.SetupConnectionRequest(
        target="vm",
        user=user,
        env=env,
        argv=argv,
        window_rows=rows,
        window_cols=columns,
        nopty=not pty,
        cwd=cwd,
    )


def _in_container(
    argv: Sequence[str], *, user: str, cwd: str, env: Mapping[str, str], pty: bool
) -> list[str]:
    """The command that makes a user's session there, in an environment of the user's own."""
    env = {key: value for key, value in env.items() if key != "TERM"}
    if not (argv or cwd or env):
        return ["/bin/login", "-f", user] if pty else ["su", "-", user]
    steps = [f"cd {shlex.quote(cwd)}"] if cwd else []
    steps += [f"export {shlex.quote(key)}={shlex.quote(value)}" for key, value in env.items()]
    steps.append(f"exec {shlex.join(argv)}" if argv else 'exec "$SHELL"')
    return ["su", "-", user, "-c", " && ".join(steps)]


def _window_size() -> tuple[int, int]:
    try:
        size = os.get_terminal_size(0)
    except OSError:
        return 24, 80
    return size.lines or 24, size.columns or 80


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _wait_readable(fd: int) -> None:
    """Returns when a read would not block; at once for files, which epoll(7) does not take."""
    loop = asyncio.get_running_loop()
    readable: asyncio.Future[None] = loop.create_future()
    try:
        loop.add_reader(fd, _settle, readable)
    except PermissionError:
        return
    try:
        await readable
    finally:
        loop.remove_reader(fd)


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


async def run(session: Session, *, pty: bool) -> int:
    """Joins a session to this process's stdin, stdout and stderr.

    pty: stdin is a terminal, and the program has one.
    Returns the exit code. Raises ShellError.
    """
    loop = asyncio.get_running_loop()

    async def pass_input() -> None:
        while True:
            await _wait_readable(0)
            data = os.read(0, 1 << 16)
            await session.send_input(data)
            if not data:
                return

    def resized() -> None:
        rows, columns = _window_size()
        session.resize(rows=rows, columns=columns)

    handled = [signal.SIGTERM, signal.SIGHUP]
    if pty:
        loop.add_signal_handler(signal.SIGWINCH, resized)
        handled.append(signal.SIGWINCH)
    else:
        handled += [signal.SIGINT, signal.SIGQUIT]
    for number in handled:
        if number is not signal.SIGWINCH:
            loop.add_signal_handler(number, session.send_signal, number)
    typing = asyncio.create_task(pass_input())
    try:
        with raw_mode(0) if pty else contextlib.nullcontext():
            async for item in session.output():
                if isinstance(item, int):
                    return item
                _write(*item)
        raise ShellError("cannot go on: the session ended without an exit code")
    finally:
        typing.cancel()
        await asyncio.gather(typing, return_exceptions=True)
        for number in handled:
            loop.remove_signal_handler(number)
        await session.close()
        sys.stdout.flush()
