"""The supervisors that benchmarks/supervisor.py compares, each as PID 1 of a PID namespace, and the
small C programs that they supervise.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from agent.process_supervisor.client import AsyncClient, Client, SupervisorGone

REPOSITORY = Path(__file__).resolve().parents[1]
PROGRAMS = REPOSITORY / "build/benchmarks"
PYTHON = "/usr/bin/python3"
OURS, TINI, DUMB_INIT, S6, RUNIT, SUPERVISORD = (
    "ours",
    "tini",
    "dumb-init",
    "s6",
    "runit",
    "supervisord",
)

_ENTRY = (
    f"import sys; sys.path.insert(0, {str(REPOSITORY)!r});"
    "from agent.process_supervisor.__main__ import main; sys.exit(main(sys.argv[1:]))"
)


def build() -> None:
    """Compiles the programs."""
    PROGRAMS.mkdir(parents=True, exist_ok=True)
    for source in (REPOSITORY / "benchmarks/programs").glob("*.c"):
        subprocess.run(
            ["gcc", "-O2", "-Wall", "-o", PROGRAMS / source.stem, source], check=True, timeout=60
        )


class Contestant:
    """A PID 1 in a namespace, in a directory of its own that goes with it."""

    def __init__(self, directory: Path, argv: list[str]) -> None:
        self.directory = directory
        self.started = time.monotonic()
        self._unshare = subprocess.Popen(
            ["unshare", "-pf", "--mount-proc", "--kill-child", *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={"PATH": "/usr/bin:/usr/sbin:/bin:/sbin"},
            cwd=directory,
        )

    def close(self) -> None:
        """Ends it and all that runs in it."""
        self._unshare.kill()
        self._unshare.wait()

    def wait(self) -> None:
        """Waits for its end."""
        self._unshare.wait(60)

    @property
    def pid(self) -> int:
        """PID 1's pid outside."""
        outer = self._unshare.pid
        return int(Path(f"/proc/{outer}/task/{outer}/children").read_text())

    def outer_pid(self, inner: int) -> int:
        """The pid outside of a process that has this one inside."""
        for pid in self.pids():
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{pid}/status").read_text()
                if status.split("\nNSpid:")[1].split("\n")[0].split()[-1] == str(inner):
                    return pid
        raise LookupError(inner)

    def pids(self) -> list[int]:
        """All its processes, by their pids outside."""
        found, unread = [], [self.pid]
        while unread:
            pid = unread.pop()
            found.append(pid)
            with contextlib.suppress(OSError):
                unread += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        return found

    def supervisors(self) -> list[int]:
        """Those of its processes that supervise: not the services."""
        own = []
        for pid in self.pids():
            with contextlib.suppress(OSError):
                name = Path(f"/proc/{pid}/comm").read_text().strip()
                if name not in {"service", "sleep", "orphans"}:
                    own.append(pid)
        return own

    def memory(self) -> float:
        """RSS of its supervising processes together, in MB."""
        return sum(status(pid, "VmRSS") for pid in self.supervisors()) / 1024

    def switches(self) -> int:
        """Voluntary context switches of its supervising processes so far."""
        return sum(status(pid, "voluntary_ctxt_switches") for pid in self.supervisors())


def status(pid: int, field: str) -> int:
    """A number in /proc/PID/status."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1])
    return 0


def until(condition: Callable[[], object], timeout: float = 60.0) -> None:
    """Waits for condition."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("a contestant does not come up")
        time.sleep(0.001)


@contextlib.contextmanager
def directory() -> Iterator[Path]:
    """A directory in memory."""
    path = Path(tempfile.mkdtemp(prefix="supervisor-bench-", dir="/dev/shm"))
    try:
        yield path
    finally:
        shutil.rmtree(path)


def _ours(path: Path) -> Contestant:
    idle_program = path / "maitred"
    idle_program.write_text("#!/bin/sh\nexec sleep infinity\n")
    idle_program.chmod(0o755)
    options = ["maitred.setup=no", f"maitred.run_dir={path}/run", f"maitred.listen=unix:{path}/m"]
    options.append(f"maitred.command={idle_program}")
    return Contestant(path, [PYTHON, "-I", "-S", "-c", _ENTRY, *options])


def _answers(run_dir: Path) -> bool:
    with contextlib.suppress(SupervisorGone), Client.connect(str(run_dir)):
        return True
    return False


@contextlib.contextmanager
def contestant(name: str, services: dict[str, list[str]]) -> Iterator[Contestant]:
    """A running contestant that supervises services, by name."""
    with directory() as path:
        if name == OURS:
            running = _ours(path)
        elif name == S6:
            _service_directories(path / "s6", services)
            running = Contestant(path, ["s6-svscan", "-c", "2000", str(path / "s6")])
        elif name == RUNIT:
            _service_directories(path / "runit", services)
            running = Contestant(path, ["runsvdir", str(path / "runit")])
        elif name == SUPERVISORD:
            _supervisord_configuration(path / "conf", services)
            running = Contestant(path, ["supervisord", "-n", "-c", str(path / "conf")])
        elif name == TINI:
            running = Contestant(path, ["tini", "--", *next(iter(services.values()))])
        else:
            running = Contestant(path, ["dumb-init", "--", *next(iter(services.values()))])
        try:
            if name == OURS:
                until(lambda: _answers(path / "run"))
                asyncio.run(_launch_all(path, services))
            yield running
        finally:
            running.close()


async def _launch_all(path: Path, services: dict[str, list[str]]) -> None:
    async with await AsyncClient.connect(str(path / "run")) as client:
        await asyncio.gather(
            *(client.launch(argv, name=name, respawn=True) for name, argv in services.items())
        )


def _service_directories(path: Path, services: dict[str, list[str]]) -> None:
    for name, argv in services.items():
        (path / name).mkdir(parents=True)
        script = path / name / "run"
        script.write_text(f"#!/bin/sh\nexec {' '.join(argv)}\n")
        script.chmod(0o755)


def _supervisord_configuration(path: Path, services: dict[str, list[str]]) -> None:
    text = f"[supervisord]\nuser=root\nlogfile=/dev/null\nlogfile_maxbytes=0\npidfile={path}.pid\n"
    for name, argv in services.items():
        text += f"[program:{name}]\ncommand={' '.join(argv)}\nautorestart=true\n"
        text += "stdout_logfile=NONE\nstderr_logfile=NONE\n"
    path.write_text(text)


class Fifo:
    """What services write when they run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)
        self._fd = os.open(path, os.O_RDWR)

    def next(self, timeout: float = 60.0) -> tuple[int, float]:
        """Pid (inside) and start (seconds, monotonic clock) of the next service that runs."""
        signal.alarm(int(timeout))
        line = os.read(self._fd, 32).split()
        signal.alarm(0)
        return int(line[0]), int(line[1]) / 1e9

    def close(self) -> None:
        """No more."""
        os.close(self._fd)


@contextlib.contextmanager
def fifo() -> Iterator[Fifo]:
    """A fifo for services."""
    with directory() as path:
        opened = Fifo(path / "fifo")
        try:
            yield opened
        finally:
            opened.close()
