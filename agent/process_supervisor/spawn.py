"""Starts a process: posix_spawn(3), in a session of its own, with default signals."""

from __future__ import annotations

import errno
import fcntl
import os

from agent.lean_stdlib import signal
from agent.listening import FIRST_FD, VARIABLE
from agent.process_supervisor.protocol import DEFAULT_PATH

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from agent.process_supervisor.protocol import ProcessSpec

_DEFAULT_SIGNALS = [
    int(number) for number in signal.valid_signals() if signal.getsignal(number) == signal.SIG_IGN
]
"""Ignored signals stay so over an exec, handled ones do not: Python ignores SIGPIPE and SIGXFSZ."""


_NOBODYS_FD = 64
"""Above FIRST_FD + protocol.MAX_LISTEN."""


class Stdio:
    """What processes get as stdin, stdout and stderr.

    console: path of the console, or None to hand on PID 1's own stderr.
    """

    def __init__(self, console: str | None) -> None:
        self.console = console

    def actions(self, spec: ProcessSpec, writer: int | None) -> list[tuple[Any, ...]]:
        """The file actions of posix_spawn for a process.

        writer: where its output goes when it has no console; None for nowhere.
        """
        if spec.console and self.console:
            return _from(self.console, os.O_NOCTTY)
        if spec.console:
            writer = 2
        if writer is None:
            return _from("/dev/null", 0)
        return [
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDWR, 0),
            (os.POSIX_SPAWN_DUP2, writer, 1),
            # 2 onto itself takes close-on-exec away, which it may have.
            (os.POSIX_SPAWN_DUP2, writer, 2),
        ]


def _from(path: str, flags: int) -> list[tuple[Any, ...]]:
    return [
        (os.POSIX_SPAWN_OPEN, 0, path, os.O_RDWR | flags, 0),
        (os.POSIX_SPAWN_DUP2, 0, 1),
        (os.POSIX_SPAWN_DUP2, 0, 2),
    ]


def find_program(name: str) -> str:
    """The file to execute: name itself when it is an absolute path, else from DEFAULT_PATH.

    Raises OSError (ENOENT, EACCES); ENOENT for a relative path, as there is nothing it is
    relative to.
    """
    if name.startswith("/"):
        return name
    error = errno.ENOENT
    directories = [] if "/" in name else DEFAULT_PATH.split(":")
    for directory in directories:
        path = f"{directory}/{name}"
        if os.path.isfile(path):
            if os.access(path, os.X_OK):
                return path
            error = errno.EACCES
    raise OSError(error, os.strerror(error), name)


def move_up(fd: int) -> int:
    """The same under a number that no process's own descriptors have, so that they can be made one
    after the other; close-on-exec. fd is closed. Raises OSError.
    """
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _NOBODYS_FD)
    finally:
        os.close(fd)


def spawn(
    spec: ProcessSpec, actions: list[tuple[Any, ...]], cgroup: str, listening: Sequence[int]
) -> int:
    """Starts what spec says; the pid. When this returns, the program is being executed.

    actions: from Stdio. cgroup: path for its cgroup, if it has limits; "": no cgroups here.
    listening: sockets it gets, see agent/listening.py; each has been moved up.
    Raises OSError when it cannot be executed, ValueError for text that cannot be an argument.
    """
    program = find_program(spec.argv[0])
    env = {"PATH": DEFAULT_PATH, **spec.env}
    if listening:
        env[VARIABLE] = str(len(listening))
        actions += [(os.POSIX_SPAWN_DUP2, fd, FIRST_FD + n) for n, fd in enumerate(listening)]
    if spec.confined():
        from agent.process_supervisor.confine import spawn_confined

        return spawn_confined(program, spec, env, actions, cgroup)
    return os.posix_spawn(
        program,
        spec.argv,
        env,
        file_actions=actions,
        setsid=True,
        setsigmask=(),
        setsigdef=_DEFAULT_SIGNALS,
    )
