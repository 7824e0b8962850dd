"""A program of the agent that is started before anybody knows what it is to do: while PID 1 imports
itself and mounts, maitred imports itself on another CPU. Then it is told its arguments, environment
and descriptors over a socket; both ends of that are here. Nothing depends on it: what does not live
to be told is started in the ordinary way.
"""

from __future__ import annotations

import _socket as socket
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

OPTION = "--prepared"
"""The only argument of a program that waits for its real ones."""

_FD = 3
_MAX_BYTES = 64 * 1024
"""More than a kernel command line and an environment made of it."""
_MAX_FDS = 17
_FD_BYTES = 4
"""Of a descriptor in SCM_RIGHTS, unix(7)."""


def guest_command(module: str) -> list[str]:
    """How a program of the agent is executed in the guest, before its own arguments."""
    return [sys.executable, "-IS", __file__.removesuffix("prepared.py") + "start.py", module]


class Prepared:
    """The one that waits: a child of this process, in a session of its own."""

    def __init__(self, command: list[str]) -> None:
        """Starts it; command: its argv without its own arguments. Raises OSError."""
        self._command = command
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self.pid = os.posix_spawn(
                command[0],
                [*command, OPTION],
                os.environ,
                file_actions=[(os.POSIX_SPAWN_DUP2, theirs.fileno(), _FD)],
                setsid=True,
            )
        except OSError:
            self._socket.close()
            raise
        finally:
            theirs.close()

    def become(
        self, argv: list[str], env: Mapping[str, str], console: str | None, sockets: list[int]
    ) -> bool:
        """Lets it go on as argv, with the limits of this process; whether it can be that.

        console: path of what its stdio is to be; None to leave that as it is.
        sockets: listening ones that it gets. To be called once; when it cannot, it ends.
        """
        own = len(self._command)
        try:
            if argv[:own] != self._command:
                return False
            self._set_limits()
            stdio = [] if console is None else [os.open(console, os.O_RDWR | os.O_NOCTTY)]
            try:
                self._send([argv[own:], dict(env), len(stdio)], [*stdio, *sockets])
            finally:
                for fd in stdio:
                    os.close(fd)
        except OSError:
            return False
        finally:
            self._socket.close()
        return True

    def _set_limits(self) -> None:
        import resource

        for number in range(resource.RLIMIT_RTPRIO + 1):
            resource.prlimit(self.pid, number, resource.getrlimit(number))

    def _send(self, message: object, descriptors: list[int]) -> None:
        from agent.lean_stdlib import dumps

        rights = b"".join(fd.to_bytes(_FD_BYTES, sys.byteorder) for fd in descriptors)
        self._socket.sendmsg(
            [dumps(message).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
        )


def prepare(module: str, *, unless: str) -> Prepared | None:
    """Starts the one of that module, when this is PID 1 without an environment variable `unless`;
    None also when it cannot.
    """
    if os.getpid() != 1 or unless in os.environ:
        return None
    try:
        return Prepared(guest_command(module))
    except OSError:
        return None


def wait() -> tuple[list[str], list[int]] | None:
    """For the one that was started: its arguments and sockets when it is told them, its environment
    and stdio being set. None when it is not to be.
    """
    from agent.lean_stdlib import loads

    told = socket.socket(fileno=_FD)
    try:
        data, ancillary, _flags, _address = told.recvmsg(
            _MAX_BYTES, socket.CMSG_SPACE(_MAX_FDS * _FD_BYTES), socket.MSG_CMSG_CLOEXEC
        )
    finally:
        told.close()
    if not data:
        return None
    words, env, stdio = loads(data.decode())
    rights = b"".join(rights for _level, _kind, rights in ancillary)
    descriptors = [
        int.from_bytes(rights[at : at + _FD_BYTES], sys.byteorder)
        for at in range(0, len(rights), _FD_BYTES)
    ]
    os.chdir("/")
    os.environ.clear()
    os.environ.update(env)
    for fd in descriptors[:stdio]:
        for number in (0, 1, 2):
            os.dup2(fd, number)
        os.close(fd)
    return words, descriptors[stdio:]
