"""Children end with their parent, whatever becomes of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from host.children import find_program, spawn
from host.errors import HostError

_PARENT = """
import asyncio, pathlib, sys
from host.children import find_program, spawn
async def main():
    child = await spawn([find_program("sleep", hint=""), "60"], log=pathlib.Path(sys.argv[1]))
    print(child.pid, flush=True)
    await child.wait()
asyncio.run(main())
"""


def test_killed_parent_takes_its_children_along(tmp_path: Path) -> None:
    """Kill -9 of the parent ends the child too."""
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, str(tmp_path / "log")], stdout=subprocess.PIPE
    )
    assert parent.stdout
    child = psutil.Process(int(parent.stdout.readline()))
    assert child.is_running()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    with contextlib.suppress(psutil.NoSuchProcess):
        child.wait(timeout=10)


def test_exit_code_and_last_words(tmp_path: Path) -> None:
    """What a child says last is there for errors."""

    async def scene() -> tuple[int, str]:
        argv = ["/bin/sh", "-c", "echo first; echo cannot go on >&2; exit 3"]
        child = await spawn(argv, log=tmp_path / "log")
        return await child.wait(), child.last_words()

    assert asyncio.run(scene()) == (3, "cannot go on")


def test_stop_kills_what_does_not_listen(tmp_path: Path) -> None:
    """SIGTERM first, SIGKILL later, and never an error for one that is gone."""

    async def scene() -> int | None:
        argv = ["/bin/sh", "-c", "trap '' TERM; echo ready; while :; do sleep 1; done"]
        child = await spawn(argv, log=tmp_path / "log")
        while "ready" not in (tmp_path / "log").read_text():
            await asyncio.sleep(0.01)
        await child.stop()
        await child.stop()
        await child.kill()
        return child.returncode

    assert asyncio.run(scene()) == -signal.SIGKILL


def test_program_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install."""
    monkeypatch.setenv("PATH", os.defpath)
    with pytest.raises(HostError, match="cannot run no-such-program: not installed; install it"):
        find_program("no-such-program", hint="install it")
