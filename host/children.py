"""Child processes that never outlive the program that started them, however it ends."""

from __future__ import annotations

import asyncio
import os
import shutil
from typing import TYPE_CHECKING

from host.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_STOP_SECONDS = 2.0

# PR_SET_PDEATHSIG (prctl(2)) is only effective from the moment it is set: a parent that died
# before that is noticed by its number. Python's preexec_fn is no alternative, as it forks in a
# process that uses gRPC.
_UNLESS_ORPHANED = 'test "$PPID" = "$1" || exit 125; shift; exec "$@"'


def find_program(name: str, *, hint: str) -> str:
    """The path of a program on PATH, or in the sbin directories that a user's PATH may lack.

    hint: what to do when it is not there, for the error.
    Raises HostError.
    """
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    found = shutil.which(name, path=path)
    if found is None:
        raise HostError(f"cannot run {name}: not installed; {hint}")
    return found


class Child:
    """A running child process; its stdout and stderr go to a file."""

    def __init__(self, process: asyncio.subprocess.Process, name: str, log: Path) -> None:
        self._process = process
        self.name = name
        self.log = log

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit code, minus the signal's number when killed, None while it runs."""
        return self._process.returncode

    async def wait(self) -> int:
        """Waits for the end; returns the exit code."""
        return await self._process.wait()

    async def kill(self) -> None:
        """SIGKILL, and waits for the end."""
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    async def stop(self) -> None:
        """SIGTERM, SIGKILL when it is still there 2 s later, and waits for the end."""
        if self._process.returncode is None:
            self._process.terminate()
            try:
                async with asyncio.timeout(_STOP_SECONDS):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
        await self._process.wait()

    def last_words(self) -> str:
        """The last line that it wrote to its log, or its exit code when it wrote nothing."""
        try:
            lines = self.log.read_text(errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return lines[-1] if lines else f"exit code {self.returncode}"


async def spawn(
    argv: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Child:
    """Starts a child that is killed by the kernel when this process ends.

    argv: the program (a path) and its arguments.
    log: where its stdout and stderr are appended.
    Call it from the main thread: the signal is bound to the thread that forks (prctl(2)).
    Raises HostError.
    """
    setpriv = find_program("setpriv", hint="install util-linux")
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            setpriv, "--pdeathsig", "KILL", "--",
            "/bin/sh", "-c", _UNLESS_ORPHANED, "sh", str(os.getpid()), *argv,
            stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output,
            env=env, cwd=cwd, start_new_session=True,
        )  # fmt: skip
    return Child(process, os.path.basename(argv[0]), log)
