"""Starts a process: posix_spawn(3), in a session of its own, with default signals."""

from __future__ import annotations

import errno
import os

from agent.process_supervisor.lean import signal
from agent.process_supervisor.protocol import DEFAULT_PATH

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from agent.process_supervisor.protocol import ProcessSpec

_DEFAULT_SIGNALS = [
    int(number)
    for number in signal.valid_signals()
    if number not in {signal.SIGKILL, signal.SIGSTOP}
]


class Stdio:
    """What processes get as stdin, stdout and stderr.

    console: path of the console, or None to hand on PID 1's own stderr.
    """

    def __init__(self, console: str | None) -> None:
        self._quiet = _three("/dev/null")
        self._console = (
            _three(console)
            if console
            else [
                (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDWR, 0),
                (os.POSIX_SPAWN_DUP2, 2, 1),
                # Onto itself: takes close-on-exec away, which the descriptor may have.
                (os.POSIX_SPAWN_DUP2, 2, 2),
            ]
        )

    def actions(self, spec: ProcessSpec) -> list[tuple[Any, ...]]:
        """The file actions of posix_spawn for a process."""
        return self._console if spec.console else self._quiet


def _three(path: str) -> list[tuple[Any, ...]]:
    return [
        (os.POSIX_SPAWN_OPEN, 0, path, os.O_RDWR | os.O_NOCTTY, 0),
        (os.POSIX_SPAWN_DUP2, 0, 1),
        (os.POSIX_SPAWN_DUP2, 0, 2),
    ]


def find_program(name: str) -> str:
    """The file to execute: name itself when it has a slash, else from DEFAULT_PATH.

    Raises OSError (ENOENT, EACCES).
    """
    if "/" in name:
        return name
    error = errno.ENOENT
    for directory in DEFAULT_PATH.split(":"):
        path = f"{directory}/{name}"
        if os.path.isfile(path):
            if os.access(path, os.X_OK):
                return path
            error = errno.EACCES
    raise OSError(error, os.strerror(error), name)


def spawn(spec: ProcessSpec, stdio: Stdio) -> int:
    """Starts what spec says; the pid. When this returns, the program is being executed.

    Raises OSError when it cannot be executed, ValueError for text that cannot be an argument.
    """
    env = {"PATH": DEFAULT_PATH, **spec.env}
    return os.posix_spawn(
        find_program(spec.argv[0]),
        spec.argv,
        env,
        file_actions=stdio.actions(spec),
        setsid=True,
        setsigmask=(),
        setsigdef=_DEFAULT_SIGNALS,
    )
