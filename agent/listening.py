"""Listening sockets: opened here, or inherited from PID 1, which keeps them open while the process
that serves them ends and is started again. Imports next to nothing: PID 1 opens its own here too.
"""

from __future__ import annotations

import _socket as socket
import errno
import os
import stat

from agent.options import Address, UnixAddress, VsockAddress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

BACKLOG = 1024
"""Connections that wait to be accepted; the next one is refused, listen(2)."""

FIRST_FD = 3
"""Inherited sockets are the descriptors from this one on, as in sd_listen_fds(3)."""

VARIABLE = "PROCESS_SUPERVISOR_LISTEN_FDS"
"""The environment variable with their number. sd_listen_fds(3) calls it LISTEN_FDS and wants
LISTEN_PID beside it, which nobody knows before posix_spawn(3) has made the process; so it has
another name, and what guards against a number that was meant for somebody else is the sockets' own
addresses, getsockname(2)."""


def inherited() -> dict[Address, int]:
    """The listening sockets that PID 1 has handed to this process, by address.

    To be called first of all, once: from then on neither they nor the variable go over to any
    process that this one starts.
    """
    count = os.environ.pop(VARIABLE, "")
    if not (count.isascii() and count.isdigit()):
        return {}
    return by_address(range(FIRST_FD, FIRST_FD + int(count[:4])))


def by_address(descriptors: Iterable[int]) -> dict[Address, int]:
    """Those of the descriptors that are listening sockets; they become close-on-exec."""
    found: dict[Address, int] = {}
    for fd in descriptors:
        try:
            address = _listens_on(fd)
        except OSError:  # closed, or no socket
            continue
        if address is not None:
            os.set_inheritable(fd, False)
            found[address] = fd
    return found


def _listens_on(fd: int) -> Address | None:
    probe = socket.socket(fileno=fd)
    try:
        if not probe.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return None
        name = probe.getsockname()
        if probe.family == socket.AF_VSOCK:
            return VsockAddress(name[1])
        return UnixAddress(name) if probe.family == socket.AF_UNIX else None
    finally:
        probe.detach()


def open_listener(address: Address) -> int:
    """The descriptor of a listening, non-blocking, close-on-exec socket on address; a unix socket
    has mode 0600.

    A unix socket that a killed process left behind is replaced. Raises OSError with the address as
    its filename, EADDRINUSE when somebody is listening there.
    """
    try:
        if isinstance(address, VsockAddress):
            listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        else:
            remove_stale_socket(address.path)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            if isinstance(address, VsockAddress):
                listener.bind((socket.VMADDR_CID_ANY, address.port))
            else:
                before = os.umask(0o177)
                try:
                    listener.bind(address.path)
                finally:
                    os.umask(before)
            listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        # A path that is too long has no errno.
        reason = error.strerror or str(error)
        raise OSError(error.errno or errno.EINVAL, reason, str(address)) from None
    return listener.detach()


def remove_stale_socket(path: str) -> None:
    """Removes the unix socket at path that nobody listens on any more; does nothing when there is
    none. Raises OSError EADDRINUSE when somebody listens there.
    """
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        probe.connect(path)
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        # Connecting to a regular file is refused as well; that one stays, and bind(2) complains.
        if stat.S_ISSOCK(os.stat(path, follow_symlinks=False).st_mode):
            unlink(path)
        return
    except BlockingIOError:
        pass
    finally:
        probe.close()
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE), path)


def unlink(path: str) -> None:
    """Removes a file, or finds it removed. Raises OSError."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
