"""Opens the kernel's log and the socket of syslog(3). Imports next to nothing."""

from __future__ import annotations

import os
import socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agent.options import Options

_RECEIVE_BUFFER = 4 << 20
_SO_RCVBUFFORCE = 33  # socket(7); not in Python's socket module


def open_syslog(options: Options) -> socket.socket | None:
    """The datagram socket that syslog(3) writes to; None when it is off, which it is by default
    where the machine is not ours. Raises OSError.
    """
    path = _path(options, "maitred.syslog")
    if path is None:
        return None
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    server = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    server.setblocking(False)
    server.bind(path)
    os.chmod(path, 0o666)  # noqa: S103  # for every program of the VM
    try:
        server.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER)
    except PermissionError:
        pass
    return server


def open_kernel_log(options: Options) -> int | None:
    """A descriptor of the kernel's log; None when it is off. Raises OSError."""
    path = _path(options, "maitred.kernel_log")
    if path is None:
        return None
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)


def _path(options: Options, key: str) -> str | None:
    path: str = options[key]
    return path if options["maitred.setup"] or key in options.given else None
