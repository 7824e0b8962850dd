"""vsock as seen from the host. gRPC speaks only over unix sockets, so every guest port is made one:
a relay listens on a unix socket and dials the guest for each connection; and every port of the
host that the guest dials arrives as a connection to another unix socket.

Two ways there: UserVsock goes through vhost-device-vsock (`CONNECT port` on its unix socket, a
unix socket with the port's number appended for the other direction); KernelVsock through AF_VSOCK,
for machines with /dev/vhost-vsock, and there only.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import socket
import stat
from pathlib import Path
from typing import Protocol, Self

from host.errors import HostError

VHOST_VSOCK = Path("/dev/vhost-vsock")
_CID_HOST = 2
_CHUNK = 1 << 16
_CONNECT_SECONDS = 5.0
_SUN_PATH_MAX = 107  # unix(7): sun_path has 108 bytes, the last one is the NUL


def pick_cid() -> int:
    """A context id for a guest; drawn at random, since nobody keeps a list of the taken ones."""
    return random.randint(1000, 2**31 - 1)


def kernel_vsock_usable() -> bool:
    """Whether this machine has vhost-vsock and this user may open it."""
    try:
        return stat.S_ISCHR(VHOST_VSOCK.stat().st_mode) and os.access(
            VHOST_VSOCK, os.R_OK | os.W_OK
        )
    except OSError:
        return False


def check_socket_path(path: Path) -> Path:
    """Returns the path. Raises HostError when it is too long for a unix socket."""
    if len(os.fsencode(path)) > _SUN_PATH_MAX:
        raise HostError(
            f"cannot use socket {path}: longer than {_SUN_PATH_MAX} bytes; "
            "choose a shorter name or directory"
        )
    return path


class Vsock(Protocol):
    """One VM's vsock, from the host's side."""

    async def connect(self, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A stream to a port of the guest. Raises OSError when nobody listens there."""

    async def listen(self, port: int) -> Path:
        """The unix socket on which connections of the guest to this port of the host arrive; the
        caller serves it. Raises HostError when the port is taken.
        """

    async def close(self) -> None:
        """Ends what listen() began."""


class UserVsock:
    """vsock through vhost-device-vsock's unix sockets."""

    def __init__(self, path: Path) -> None:
        """path: the daemon's uds-path; it need not be there yet."""
        self.path = path

    async def connect(self, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """See Vsock."""
        async with asyncio.timeout(_CONNECT_SECONDS):
            reader, writer = await asyncio.open_unix_connection(str(self.path))
            try:
                writer.write(f"CONNECT {port}\n".encode())
                answer = await reader.readline()
                if not answer.startswith(b"OK "):
                    raise ConnectionRefusedError(
                        errno.ECONNREFUSED, f"nobody listens on vsock port {port} of the guest"
                    )
            except BaseException:
                writer.close()
                raise
        return reader, writer

    async def listen(self, port: int) -> Path:
        """See Vsock."""
        return check_socket_path(self.path.with_name(f"{self.path.name}_{port}"))

    async def close(self) -> None:
        """See Vsock."""


class KernelVsock:
    """vsock through the kernel. A port of the host is one for all VMs of the machine: connections
    of other guests than ours are refused.
    """

    def __init__(self, cid: int, directory: Path) -> None:
        """cid: the guest's context id; directory: for the unix sockets."""
        self._cid = cid
        self._directory = directory
        self._servers: list[asyncio.Server] = []

    def _socket(self) -> socket.socket:
        if not kernel_vsock_usable():
            raise HostError(f"cannot use vsock: no usable {VHOST_VSOCK}")
        return socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)

    async def connect(self, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """See Vsock."""
        sock = self._socket()
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                await asyncio.get_running_loop().sock_connect(sock, (self._cid, port))
        except BaseException:
            sock.close()
            raise
        return await asyncio.open_connection(sock=sock)

    async def listen(self, port: int) -> Path:
        """See Vsock."""
        target = check_socket_path(self._directory / f"port_{port}")
        sock = self._socket()
        try:
            sock.bind((_CID_HOST, port))
        except OSError as error:
            sock.close()
            raise HostError(
                f"cannot listen on vsock port {port}: {error.strerror}; is another VM's host "
                "program running? `--vsock user` does without the kernel's ports"
            ) from None

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if writer.get_extra_info("peername")[0] != self._cid:
                writer.close()
                return
            await _join_to(lambda: asyncio.open_unix_connection(str(target)), reader, writer)

        self._servers.append(await asyncio.start_server(accept, sock=sock))
        return target

    async def close(self) -> None:
        """See Vsock."""
        for server in self._servers:
            server.close()
        self._servers.clear()


class _Dial(Protocol):
    async def __call__(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]: ...


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_CHUNK):
        writer.write(data)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()


async def _join_to(dial: _Dial, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Dials, and passes bytes both ways until both directions have ended or one has failed."""
    try:
        far_reader, far_writer = await dial()
    except (OSError, EOFError):
        writer.close()
        return
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(_pump(reader, far_writer))
            group.create_task(_pump(far_reader, writer))
    except* OSError:
        pass  # one side is gone; closing both tells the other
    finally:
        for each in (writer, far_writer):
            each.close()


class GuestPortRelay:
    """A unix socket that stands for a port of the guest; an async context manager."""

    def __init__(self, vsock: Vsock, port: int, path: Path) -> None:
        """path: where the unix socket is made."""
        self._vsock = vsock
        self._port = port
        self.path = check_socket_path(path)
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self.path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._accept, path=str(self.path))
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(
            _join_to(lambda: self._vsock.connect(self._port), reader, writer)
        )
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)
