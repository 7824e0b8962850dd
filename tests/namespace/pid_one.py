"""Runs the real PID 1 in a PID namespace of its own, for tests. Everything in it ends with it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from agent.process_supervisor.client import Client

REPOSITORY = Path(__file__).resolve().parents[2]

UNSHARE = ("unshare", "-pf", "--mount-proc", "--kill-child")
"""A PID namespace; all in it ends with the command."""

IDLE_MAITRED = "#!/bin/sh\nexec sleep infinity\n"
"""Stands in maitred's place where a test is about PID 1 only."""


def wait_until(what: str, condition: Callable[[], object], *, timeout: float = 10.0) -> None:
    """Waits for something that no event tells of."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout} s"
        time.sleep(0.005)


class PidOne:
    """A running PID 1.

    directory: its run directory is below. maitred: a program in its place. checkout: whose agent.
    """

    def __init__(
        self,
        directory: Path,
        *,
        maitred: str | None = IDLE_MAITRED,
        options: tuple[str, ...] = (),
        checkout: Path = REPOSITORY,
    ) -> None:
        self.run_dir = directory / "run"
        words = ["maitred.setup=no", f"maitred.listen=unix:{directory}/maitred.sock"]
        words += [f"maitred.run_dir={self.run_dir}", *options]
        if maitred is not None:
            script = directory / "maitred.sh"
            script.write_text(maitred)
            script.chmod(0o755)
            words.append(f"maitred.command={script}")
        self._console = directory / "console"
        with self._console.open("wb") as console:
            self._unshare = subprocess.Popen(
                [*UNSHARE, sys.executable, "-m", "agent.process_supervisor", *words],
                stderr=console,
                stdin=subprocess.DEVNULL,
                cwd=checkout,
            )
        wait_until(
            "PID 1 is up", lambda: "maitred started" in self.console() or self._unshare.poll()
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._unshare.kill()  # --kill-child: and with it the namespace
        self._unshare.wait()

    def console(self) -> str:
        """What it has written so far."""
        return self._console.read_text()

    @property
    def pid(self) -> int:
        """PID 1's pid outside the namespace."""
        outer = self._unshare.pid
        return int(Path(f"/proc/{outer}/task/{outer}/children").read_text())

    def wait(self, timeout: float = 30.0) -> int:
        """Waits for its end; the exit code."""
        return self._unshare.wait(timeout)

    @staticmethod
    def connect(run_dir: Path) -> Client:
        """A connection to any PID 1, by its run directory."""
        return Client.connect(str(run_dir), timeout=20.0)

    @contextmanager
    def client(self, timeout: float | None = 20.0) -> Iterator[Client]:
        """A connection to its control socket; timeout in seconds for each call."""
        with Client.connect(str(self.run_dir), timeout=timeout) as client:
            yield client

    def children(self) -> dict[int, str]:
        """State of each child of PID 1 by its pid outside, Z for a zombie."""
        states = {}
        pid = self.pid
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            try:
                stat = Path(f"/proc/{child}/stat").read_text()
            except OSError:
                continue
            states[int(child)] = stat.rpartition(")")[2].split()[0]
        return states

    def zombies(self) -> list[int]:
        """The children of PID 1 that it has not reaped."""
        return [pid for pid, state in self.children().items() if state == "Z"]

    def open_files(self) -> int:
        """How many descriptors PID 1 has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def threads(self) -> int:
        """How many threads PID 1 has."""
        return len(os.listdir(f"/proc/{self.pid}/task"))
