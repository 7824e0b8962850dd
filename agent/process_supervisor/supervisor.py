"""PID 1 itself: joins the loop, the table and the control socket, reaps every child, and starts the
shutdown. What a VM needs besides stands in machine.py and power_off.py.
"""

from __future__ import annotations

import os

from agent.console import write_line
from agent.lean_stdlib import signal, socket
from agent.listening import open_listener
from agent.options import UnixAddress
from agent.process_supervisor.control import Control
from agent.process_supervisor.listeners import Listeners
from agent.process_supervisor.loop import Loop, report
from agent.process_supervisor.output import Outputs, Ring, SystemLog
from agent.process_supervisor.protocol import ProcessSpec, ProtocolError, socket_path
from agent.process_supervisor.spawn import Stdio, spawn
from agent.process_supervisor.table import Table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from agent.prepared import Prepared
    from agent.process_supervisor.output import Pipe
    from agent.process_supervisor.shutdown import Shutdown
    from agent.process_supervisor.table import Process

_REAPED_PER_TURN = 1000
"""Children taken before the loop has a look at everything else."""

_STORM = 50
_STORM_GAP = 0.006
_STORM_REST = 0.002
"""After so many reaps of nothing but orphans, less than the gap apart, SIGCHLD rests (seconds)."""

MAITRED = "maitred"
"""The name of maitred in the table."""

_MAITRED_RETRY = 5.0
"""Seconds until maitred is tried again when it cannot be executed, or its port not be opened."""


def maitred_spec(argv: list[str], listen: list[str]) -> ProcessSpec:
    """How PID 1 starts maitred: again whenever it ends, however often."""
    return ProcessSpec(
        argv,
        name=MAITRED,
        env=dict(os.environ),
        respawn=True,
        backoff=True,
        console=True,
        listen=listen,
    )


class Supervisor:
    """One PID 1.

    run_dir: where the control socket is. stdio: what processes get. log: path of syslog's socket,
    for what they print; cgroups: the cgroup below which they get their own; None for neither.
    descendants_only: signal nothing else at shutdown. vsock: see Listeners. finish: told who had
    to be killed when all processes are gone. maitred: its first run, which was started already.
    """

    def __init__(
        self,
        *,
        run_dir: str,
        stdio: Stdio,
        log: str | None,
        cgroups: str | None,
        descendants_only: bool,
        vsock: bool,
        finish: Callable[[list[str]], None],
        maitred: Prepared | None = None,
    ) -> None:
        self._prepared_maitred = maitred
        self.socket_path = socket_path(run_dir)
        self._stdio = stdio
        self._cgroups = cgroups
        self._descendants_only = descendants_only
        self._finish = finish
        self.control: Control | None = None
        self._shutdown: Shutdown | None = None
        self._running = True
        self.orphans = 0
        self._reaped_at = 0.0
        self._storm = 0
        self.upgrades = 0
        self._old_cgroups: set[str] = set()
        self.loop = Loop()
        self.outputs = Outputs(
            self.loop,
            log=SystemLog(log).write if log else None,
            follower=self._printed,
        )
        self.started_at = self.loop.now()
        self.listeners = Listeners(vsock=vsock)
        self.table = Table(
            timers=self.loop,
            spawn=self._spawn,
            kill=_kill,
            emit=self._emit,
            random=lambda: os.urandom(1)[0] / 255,
            listen=self.listeners.assign,
        )
        self.loop.on_signals(
            {
                signal.SIGCHLD: self._reap,
                signal.SIGTERM: lambda: self.shut_down("SIGTERM"),
                signal.SIGINT: lambda: self.shut_down("SIGINT"),
                signal.SIGPWR: lambda: self.shut_down("SIGPWR"),
                signal.SIGUSR2: lambda: self.upgrade(self._say_refusal),
            }
        )

    def listen(self) -> None:
        """Opens the control socket, unless it is open. Raises OSError."""
        if self.control:
            return
        directory = os.path.dirname(self.socket_path)
        os.makedirs(directory, 0o700, exist_ok=True)
        os.chmod(directory, 0o700)
        self.serve(socket.socket(fileno=open_listener(UnixAddress(self.socket_path))))

    def serve(self, server: socket.socket) -> None:
        """Serves the control protocol on a listening socket that does not block."""
        self.control = Control(
            loop=self.loop,
            table=self.table,
            server=server,
            describe=self._describe,
            shut_down=self.shut_down,
            upgrade=self.upgrade,
        )

    def reserve(self, addresses: Mapping[str, str]) -> None:
        """Listens for processes that are launched later, by name, so that nobody is before them."""
        for name, address in addresses.items():
            try:
                self.listeners.reserve(name, address)
            except ProtocolError as error:
                write_line("init", str(error))

    def launch_maitred(self, spec: ProcessSpec) -> None:
        """Starts maitred, unless it is in the table: it comes back whenever it ends."""
        if MAITRED in {process.key for process in self.table}:
            return
        # What cannot even be executed the first time is not in the table yet, so not its business.
        if not self._launch(spec) and not self._shutdown:
            self.loop.call_later(_MAITRED_RETRY, lambda: self.launch_maitred(spec))

    def launch_once(self, argv: list[str], *, name: str) -> None:
        """Starts a part of the machine's own set-up in the background, with the console."""
        self._launch(ProcessSpec(argv, name=name, once=True, console=True))

    def _launch(self, spec: ProcessSpec) -> bool:
        try:
            self.table.launch(spec)
        except ProtocolError as error:
            write_line("init", str(error))
            return False
        return True

    @staticmethod
    def load_the_rest() -> None:
        """Imports what is needed later: not before maitred runs, as that would hold it up, and not
        when it is needed, as the disk may be gone, or have the next version of it.
        """
        import gc

        import agent.process_supervisor.listing
        import agent.process_supervisor.shutdown
        import agent.process_supervisor.upgrade  # noqa: F401

        gc.freeze()  # the program itself is no garbage: it need not be looked through again

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
        if self.control:
            self.control.emit("shutdown", "", {"reason": reason})
        self._shutdown = Shutdown(
            table=self.table,
            timers=self.loop,
            kill=_kill,
            children_left=_children_left,
            descendants_only=self._descendants_only,
            finished=self._finished,
        )

    @property
    def shutting_down(self) -> bool:
        """The shutdown has begun."""
        return self._shutdown is not None

    def upgrade(self, answer: Callable[[str], None]) -> None:
        """Executes the program as it is on the disk now, after a check that this can go on.

        answer: told why it is not possible, or "" just before.
        """
        if self._shutdown:
            answer("shutting down")
            return
        from agent.process_supervisor.upgrade import upgrade

        upgrade(self, answer)

    @staticmethod
    def _say_refusal(refusal: str) -> None:
        if refusal:
            write_line("init", f"cannot upgrade: {refusal}")

    def _finished(self, killed: list[str]) -> None:
        self._running = False
        self.listeners.close()
        if self.control:
            self.control.close()  # its socket would keep the filesystem of the run directory busy
        self._finish(killed)

    def _reap(self) -> None:
        """Takes every zombie, ours and orphans alike."""
        ours = 0
        for _ in range(_REAPED_PER_TURN):
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            process = self.table.by_pid(pid)
            if process is None:
                self.orphans += 1
                continue
            ours += 1
            try:
                self._see_to_exit(process, pid, status)
            except Exception as error:  # noqa: BLE001  # the next zombie waits
                report(error, f"see to the exit of {pid}")
        else:
            self.loop.call_later(0, self._reap)
        if self._old_cgroups:
            self._remove_cgroups()
        if self._shutdown:
            self._shutdown.poke()
        self._rest_in_a_storm(ours)

    def _see_to_exit(self, process: Process, pid: int, status: int) -> None:
        if process.pipe:
            process.pipe.ready()  # what it printed is there before anybody hears of its end
            process.pipe = None
        self.table.exited(pid, status)
        if process.spec.memory_max or process.spec.pids_max:
            self._old_cgroups.add(self._cgroup(process))

    def _rest_in_a_storm(self, ours: int) -> None:
        """When orphans come one by one as fast as they are taken, lets some come together.

        ours: how many of those just taken were supervised; they are never kept waiting.
        """
        now = self.loop.now()
        self._storm = self._storm + 1 if not ours and now - self._reaped_at < _STORM_GAP else 0
        self._reaped_at = now
        if self._storm > _STORM:
            signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGCHLD,))
            self.loop.call_later(
                _STORM_REST, lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGCHLD,))
            )

    def _spawn(self, process: Process) -> int:
        spec = process.spec
        pipe = None if spec.console else self.outputs.open()
        reader, writer = pipe or (None, None)
        try:
            actions = self._stdio.actions(spec, writer)
            listening = self.listeners.descriptors(process.key, spec.listen)
            pid = self._go_on(process, listening) or spawn(
                spec, actions, self._cgroup(process), listening
            )
        except BaseException:
            if reader is not None:
                os.close(reader)
            raise
        finally:
            if writer is not None:
                os.close(writer)
        if reader is not None:
            process.ring = process.ring or Ring()
            process.pipe = self.outputs.follow(
                reader,
                process.ring,
                process.key,
                pid,
                # The log forwarder is last, and would read its own complaints for ever.
                logged=spec.stop_stage != "last",
            )
        return pid

    def _go_on(self, process: Process, listening: list[int]) -> int | None:
        """The pid of the one that waits to become this process, if it now does."""
        prepared = self._prepared_maitred
        if prepared is None or process.key != MAITRED:
            return None
        self._prepared_maitred = None
        spec = process.spec
        goes_on = prepared.become(spec.argv, spec.env, self._stdio.console, listening)
        return prepared.pid if goes_on else None

    def _cgroup(self, process: Process) -> str:
        name = "".join(letter if letter.isalnum() else "_" for letter in process.key)
        return f"{self._cgroups}/{process.serial}_{name}" if self._cgroups else ""

    def _remove_cgroups(self) -> None:
        """Removes those whose process has ended, as soon as what it left behind has ended too."""
        from agent.process_supervisor.confine import remove_cgroup

        running = {self._cgroup(process) for process in self.table if process.pid is not None}
        self._old_cgroups -= running
        self._old_cgroups -= {path for path in self._old_cgroups if remove_cgroup(path)}

    def _printed(self, pipe: Pipe, data: bytes) -> None:
        if self.control:
            self.control.emit_output(pipe.name, pipe.pid, data)

    def _emit(self, event: str, process: Process, fields: dict[str, Any]) -> None:
        if event in {"failed", "backing_off", "stopped"} or process.key == MAITRED:
            details = ", ".join(
                str(value) if name in {"reason", "error"} else f"{name} {value}"
                for name, value in fields.items()
            )
            write_line("init", f"{process.key} {event.replace('_', ' ')}: {details}".rstrip(": "))
        if self.control and self.control.followed:
            program = os.path.basename(process.spec.argv[0])
            self.control.emit(event, process.key, {**fields, "program": program})

    def _describe(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "uptime": round(self.loop.now() - self.started_at, 3),
            "orphans": self.orphans,
            "upgrades": self.upgrades,
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
