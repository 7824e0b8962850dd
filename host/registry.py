"""The VMs of this user that run, by name: each has a directory with a lock, its state as JSON, its
sockets and its logs, through which `termina status`, `stop`, `console` and `shell` find it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from host import paths
from host.errors import HostError

_STATE = "state.json"
_LOCK = "lock"
_POLL_SECONDS = 0.05


def check_name(name: str) -> str:
    """Returns the name of a VM, which becomes part of file names; raises HostError."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,30}", name):
        raise HostError(
            f"cannot use VM name {name!r}: small letters, digits and hyphens, at most 31"
        )
    return name


def _lock(directory: Path, kind: int) -> int:
    """The locked file's descriptor. Raises BlockingIOError when the VM runs, OSError."""
    fd = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _claim(directory: Path) -> int:
    """As _lock(), for oneself; somebody who only asks holds the lock for no time at all."""
    for _ in range(5):
        try:
            return _lock(directory, fcntl.LOCK_EX)
        except BlockingIOError:
            time.sleep(_POLL_SECONDS)
    return _lock(directory, fcntl.LOCK_EX)


class Claim:
    """The right to run a VM of a name; a context manager. What it says is for others to read."""

    def __init__(self, name: str) -> None:
        """Raises HostError when a VM of this name runs."""
        self.directory = paths.runtime_dir() / check_name(name)
        try:
            self.directory.mkdir(mode=0o700, exist_ok=True)
            self._fd = _claim(self.directory)
        except BlockingIOError:
            raise HostError(
                f"cannot start VM {name}: it is running already; `termina stop`, "
                "or another name with --vm"
            ) from None
        except OSError as error:
            raise HostError(f"cannot use directory {self.directory}: {error.strerror}") from None
        self._state: dict[str, Any] = {"name": name, "pid": os.getpid(), "started": time.time()}
        self.tell()

    def tell(self, **facts: Any) -> None:
        """Adds facts to the state that others read."""
        self._state.update(facts)
        new = self.directory / f"{_STATE}.new"
        new.write_text(json.dumps(self._state))
        new.replace(self.directory / _STATE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        (self.directory / _STATE).unlink(missing_ok=True)
        os.close(self._fd)


@dataclass(frozen=True)
class Running:
    """A VM that runs in another process."""

    directory: Path
    state: dict[str, Any]

    @property
    def name(self) -> str:
        """The VM's name."""
        return self.directory.name

    def stop(self, *, timeout: float) -> None:
        """Asks its program to shut it down, and waits until it has ended.

        timeout: seconds. Raises HostError.
        """
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.state["pid"], signal.SIGTERM)
        give_up = time.monotonic() + timeout
        while _state_of(self.directory) is not None:
            if time.monotonic() > give_up:
                raise HostError(
                    f"cannot stop VM {self.name}: it still runs after {timeout:g} s; "
                    "`termina stop` again kills it"
                )
            time.sleep(_POLL_SECONDS)


def _state_of(directory: Path) -> dict[str, Any] | None:
    """The state of the VM in a directory, None when it does not run."""
    try:
        os.close(_lock(directory, fcntl.LOCK_SH))
        return None
    except BlockingIOError:
        pass
    except OSError:
        return None
    try:
        state: dict[str, Any] = json.loads((directory / _STATE).read_text())
    except (OSError, ValueError):
        return None
    return state


def running() -> list[Running]:
    """All that run, by name."""
    return [
        Running(lock.parent, state)
        for lock in sorted(paths.runtime_dir().glob(f"*/{_LOCK}"))
        if (state := _state_of(lock.parent)) is not None
    ]


def find(name: str) -> Running:
    """The running VM of a name. Raises HostError."""
    directory = paths.runtime_dir() / check_name(name)
    state = _state_of(directory) if directory.is_dir() else None
    if state is None:
        raise HostError(f"cannot find VM {name}: it is not running")
    return Running(directory, state)
