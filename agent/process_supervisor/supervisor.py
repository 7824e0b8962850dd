"""PID 1 itself: joins the loop, the table and the control socket, reaps every child, and starts the
shutdown. What a VM needs besides stands in machine.py and power_off.py.
"""

from __future__ import annotations

import os
import sys

from agent.console import write_line
from agent.process_supervisor.control import Control, listen
from agent.process_supervisor.lean import signal
from agent.process_supervisor.loop import Loop, report
from agent.process_supervisor.protocol import ProcessSpec, ProtocolError, socket_path
from agent.process_supervisor.spawn import Stdio, spawn
from agent.process_supervisor.table import Table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from agent.process_supervisor.shutdown import Shutdown
    from agent.process_supervisor.table import Process

_REAPED_PER_TURN = 1000
"""Children taken before the loop has a look at everything else."""

MAITRED = "maitred"
"""The name of maitred in the table."""


class Supervisor:
    """One PID 1.

    run_dir: where the control socket is. stdio: what processes get. descendants_only: signal
    nothing else at shutdown. finish: told who had to be killed when all processes are gone.
    """

    def __init__(
        self,
        *,
        run_dir: str,
        stdio: Stdio,
        descendants_only: bool,
        finish: Callable[[list[str]], None],
    ) -> None:
        self._run_dir = run_dir
        self._descendants_only = descendants_only
        self._finish = finish
        self._control: Control | None = None
        self._shutdown: Shutdown | None = None
        self._running = True
        self._orphans = 0
        self.loop = Loop()
        self._started_at = self.loop.now()
        self.table = Table(
            timers=self.loop,
            spawn=lambda spec: spawn(spec, stdio),
            kill=_kill,
            emit=self._emit,
            random=lambda: os.urandom(1)[0] / 255,
        )
        self.loop.on_signals(
            {
                signal.SIGCHLD: self._reap,
                signal.SIGTERM: lambda: self.shut_down("SIGTERM"),
                signal.SIGINT: lambda: self.shut_down("SIGINT"),
                signal.SIGPWR: lambda: self.shut_down("SIGPWR"),
            }
        )

    def listen(self) -> None:
        """Opens the control socket. Raises OSError."""
        os.makedirs(self._run_dir, 0o700, exist_ok=True)
        os.chmod(self._run_dir, 0o700)
        self._control = Control(
            loop=self.loop,
            table=self.table,
            server=listen(socket_path(self._run_dir)),
            describe=self._describe,
            shut_down=self.shut_down,
        )

    def launch_maitred(self, argv: list[str]) -> None:
        """Starts maitred: it comes back whenever it ends, however often."""
        self._launch(
            ProcessSpec(
                argv,
                name=MAITRED,
                env=dict(os.environ),
                respawn=True,
                backoff=True,
                console=True,
            )
        )

    def launch_once(self, argv: list[str], *, name: str) -> None:
        """Starts a part of the machine's own set-up in the background, with the console."""
        self._launch(ProcessSpec(argv, name=name, once=True, console=True))

    def _launch(self, spec: ProcessSpec) -> None:
        try:
            self.table.launch(spec)
        except ProtocolError as error:
            write_line("init", str(error))

    @staticmethod
    def load_the_rest() -> None:
        """Imports what only the end needs: not before maitred runs, as that would hold it up, and
        not at the end, when the disk may be gone.
        """
        import agent.process_supervisor.shutdown  # noqa: F401

    def run(self) -> None:
        """The rest of PID 1's life; returns when the shutdown has ended."""
        self._reap()  # what was inherited: the children of the initial RAM filesystem
        while self._running:
            try:
                self.loop.turn()
            except Exception as error:  # noqa: BLE001  # PID 1 goes on whatever happens
                report(error, "turn the loop")

    def shut_down(self, reason: str) -> None:
        """Begins the shutdown; once begun it goes on to the end."""
        if self._shutdown:
            return
        from agent.process_supervisor.shutdown import Shutdown  # late: see load_the_rest

        write_line("init", f"shutting down: {reason}")
        if self._control:
            self._control.emit("shutdown", "", {"reason": reason})
        self._shutdown = Shutdown(
            table=self.table,
            timers=self.loop,
            kill=_kill,
            children_left=_children_left,
            descendants_only=self._descendants_only,
            finished=self._finished,
        )

    def _finished(self, killed: list[str]) -> None:
        self._running = False
        if self._control:
            self._control.close()  # its socket would keep the filesystem of the run directory busy
        self._finish(killed)

    def _reap(self) -> None:
        """Takes every zombie, ours and orphans alike."""
        for _ in range(_REAPED_PER_TURN):
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            try:
                if not self.table.exited(pid, status):
                    self._orphans += 1
            except Exception as error:  # noqa: BLE001  # the next zombie waits
                report(error, f"see to the exit of {pid}")
        else:
            self.loop.call_later(0, self._reap)
        if self._shutdown:
            self._shutdown.poke()

    def _emit(self, event: str, process: Process, fields: dict[str, Any]) -> None:
        if event in {"failed", "backing_off", "stopped"} or process.key == MAITRED:
            details = ", ".join(f"{name} {value}" for name, value in fields.items())
            write_line("init", f"{process.key} {event.replace('_', ' ')}: {details}".rstrip(": "))
        if self._control:
            program = os.path.basename(process.spec.argv[0])
            self._control.emit(event, process.key, {**fields, "program": program})

    def _describe(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "uptime": round(self.loop.now() - self._started_at, 3),
            "orphans": self._orphans,
        }


def _kill(pid: int, number: int) -> None:
    if pid <= 1:
        raise ValueError(f"cannot signal {pid}: not one process of others")
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _children_left() -> bool:
    """Whether this process has a child, dead or alive."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def interpreter(module: str) -> list[str]:
    """The arguments that run a module of the agent with this interpreter."""
    return [sys.executable, *(["-I"] if sys.flags.isolated else []), "-m", module]
