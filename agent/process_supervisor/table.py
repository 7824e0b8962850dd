"""The supervised processes and their states; every transition there is stands in this file. Knows
nothing of sockets, signals or /proc: how to spawn, kill and tell is handed in.

              launch, start            exits, not respawning
    (ended) ───────────────▶ starting ──▶ running ───────────────────────▶ exited
                              ▲   ▲         │ │ │
                        timer,│   └─────────┘ │ └─ exits too often ──────▶ stopped
                        start │   exits,      │                            ▲    ▲
                              │   respawning  │ stop                       │    │
                         backing_off          └────────▶ stopping ──exits──┘    │
                              └──────────────── stop ───────────────────────────┘

exited and stopped are the ended states: exited by itself, stopped by request or by the rule that a
respawning process may not start more than 10 times in 30 s. backing_off is where a process with
`backoff` waits for its next start, and any respawning process that could not be executed.
"""

from __future__ import annotations

import os

from agent.lean_stdlib import signal
from agent.process_supervisor.protocol import SIGNALS, ProcessSpec, ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    from agent.process_supervisor.loop import Timer, Timers
    from agent.process_supervisor.output import Pipe, Ring

MAX_STARTS = 10
WINDOW = 30.0
"""A respawning process that was started more than MAX_STARTS times in WINDOW seconds is stopped."""

_TOO_OFTEN = f"it was started more than {MAX_STARTS} times in {WINDOW:.0f} s"

FIRST_DELAY = 0.5
MAX_DELAY = 30.0
"""Back-off between starts, in seconds: doubles from the first to the last, with 10 % jitter."""

MAX_ENDED = 256
"""Processes that have ended are remembered, but no more than this many."""

WHOLE_OUTPUTS = 32
SHORT_OUTPUT = 4096
"""The output of so many of them is kept whole, and so many bytes of that of the others."""

STARTING = "starting"
RUNNING = "running"
STOPPING = "stopping"
BACKING_OFF = "backing_off"
EXITED = "exited"
STOPPED = "stopped"
ENDED = (EXITED, STOPPED)


class Process:
    """One row: what to run, and where that stands. Only Table changes it."""

    __slots__ = (
        "ended_at",
        "failures",
        "key",
        "last_exit",
        "pid",
        "pipe",
        "recent_starts",
        "ring",
        "serial",
        "spec",
        "spoke",
        "started_at",
        "starts",
        "state",
        "stop_reason",
        "stop_waiters",
        "timer",
        "waiters",
    )

    def __init__(self, serial: int, key: str, spec: ProcessSpec) -> None:
        self.serial = serial
        self.key = key
        self.spec = spec
        self.state = STARTING
        self.pid: int | None = None
        self.starts = 0
        self.recent_starts: list[float] = []
        self.started_at = 0.0
        self.ended_at = 0.0
        self.last_exit: tuple[str, int] | None = None
        self.stop_reason = ""
        """Why it is stopped, when nobody asked for it."""
        self.failures = 0
        self.spoke = False
        """In this run it has made a request of PID 1: it came up, so back-off begins afresh."""
        self.timer: Timer | None = None
        self.ring: Ring | None = None
        """What it printed, once it was started without console."""
        self.pipe: Pipe | None = None
        """Where that comes from, in this run."""
        self.waiters: dict[object, Callable[[], object]] = {}
        self.stop_waiters: dict[object, Callable[[], object]] = {}


def _what(spec: ProcessSpec) -> tuple[object, ...]:
    """What two launches of one name have to agree on."""
    return spec.argv, spec.env, spec.listen


class Table:
    """All processes.

    timers: for back-off and deadlines. spawn: starts what the spec of a process says, returns its
    pid, raises when it cannot. kill: kill(2). emit: told of each transition, (event,
    process, fields). random: a number from 0 to 1, for jitter. listen: told which addresses the
    process with a key has from now on; raises ProtocolError when it cannot have them.
    """

    def __init__(
        self,
        *,
        timers: Timers,
        spawn: Callable[[Process], int],
        kill: Callable[[int, int], None],
        emit: Callable[[str, Process, dict[str, Any]], None],
        random: Callable[[], float],
        listen: Callable[[str, Sequence[str]], None],
    ) -> None:
        self._timers = timers
        self._spawn = spawn
        self._kill = kill
        self._emit = emit
        self._random = random
        self._listen = listen
        self._by_key: dict[str, Process] = {}
        self._by_pid: dict[int, Process] = {}
        self._ended: dict[str, None] = {}
        self._serial = 0
        self.closed = False
        """No process is started any more."""

    def __iter__(self) -> Iterator[Process]:
        return iter(self._by_key.values())

    def __len__(self) -> int:
        return len(self._by_key)

    def by_pid(self, pid: int) -> Process | None:
        """The process that runs under this pid now."""
        return self._by_pid.get(pid)

    def get(self, key: str, doing: str) -> Process:
        """The process with this key. Raises ProtocolError (ENOENT)."""
        process = self._by_key.get(key)
        if process is None:
            raise ProtocolError("ENOENT", f"cannot {doing} {key}: there is no such process")
        return process

    # ---- what clients ask for ----------------------------------------------------------------

    def launch(self, spec: ProcessSpec) -> tuple[Process, bool]:
        """Starts a process; or returns the one of that name that is there, and True.

        Raises ProtocolError with the errno of what went wrong.
        """
        there = self._by_key.get(spec.name) if spec.name else None
        if there is not None:
            if spec.once:
                return there, True
            if there.state not in ENDED:
                if there.state == STOPPING:
                    raise ProtocolError("EBUSY", f"cannot launch {there.key}: it is being stopped")
                if _what(there.spec) != _what(spec):
                    raise ProtocolError(
                        "EEXIST", f"cannot launch {there.key}: that name runs something else"
                    )
                return there, True
        process = there or self.new(spec)
        self._refuse_when_closed("launch", process.key)
        try:
            self._listen(process.key, spec.listen)
        except ProtocolError as error:
            raise ProtocolError(error.code, f"cannot launch {process.key}: {error}") from None
        before, process.spec = process.spec, spec
        self._begin_afresh(process)
        try:
            self._start(process)
        except Exception as error:  # noqa: BLE001  # whatever it is, the client is told
            process.spec = before
            self._listen(process.key, before.listen if there else ())
            raise _cannot("launch", spec.argv[0], error) from None
        if there is None:
            self._serial += 1
            self._by_key[process.key] = process
        return process, False

    def _new_key(self, spec: ProcessSpec) -> str:
        if spec.name:
            return spec.name
        serial = self._serial + 1
        stem = os.path.basename(spec.argv[0])
        while (key := f"{stem}#{serial}") in self._by_key:
            serial += 1
        return key

    def start(self, key: str) -> Process:
        """Starts a process that has ended or backs off. Raises ProtocolError."""
        process = self.get(key, "start")
        if process.state in {RUNNING, STOPPING}:
            raise ProtocolError("EBUSY", f"cannot start {key}: it is {process.state}")
        self._refuse_when_closed("start", key)
        self._begin_afresh(process)
        try:
            self._start(process)
        except Exception as error:  # noqa: BLE001  # whatever it is, the client is told
            raise _cannot("start", key, error) from None
        return process

    def stop(self, key: str, token: object, done: Callable[[], object]) -> Process:
        """Ends a process for good and calls done when it has: SIGKILL after its stop_timeout.

        Raises ProtocolError.
        """
        process = self.get(key, "stop")
        if process.state in ENDED:
            done()
            return process
        process.stop_waiters[token] = done
        if process.state == BACKING_OFF:
            self._enter_ended(process, STOPPED)
        elif process.state == RUNNING:
            process.state = STOPPING
            self._kill_later(process, process.spec.stop_timeout)
            self._emit("stopping", process, {"signal": process.spec.stop_signal})
            self._send(process, SIGNALS[process.spec.stop_signal])
            self._send(process, signal.SIGCONT)  # one that is suspended could not obey
        return process

    def signal(self, key: str, name: str) -> int:
        """Sends a signal; the pid it went to. Raises ProtocolError."""
        process = self.get(key, "signal")
        if process.pid is None:
            raise ProtocolError("ESRCH", f"cannot signal {key}: it is {process.state}")
        self._send(process, SIGNALS[name])
        return process.pid

    def wait(self, key: str, token: object, done: Callable[[], object]) -> Process:
        """Calls done at the next exit of a process, at once when it has ended.

        token: to take the wish back, with forget_waiter. Raises ProtocolError.
        """
        process = self.get(key, "wait for")
        if process.state in ENDED:
            done()
        else:
            process.waiters[token] = done
        return process

    @staticmethod
    def forget_waiter(process: Process, token: object) -> None:
        """Takes back what wait or stop was told."""
        process.waiters.pop(token, None)
        process.stop_waiters.pop(token, None)

    def close(self) -> None:
        """From now on nothing is started."""
        self.closed = True
        for process in list(self):
            if process.state == BACKING_OFF:
                self._enter_ended(process, STOPPED)

    # ---- upgrade in place --------------------------------------------------------------------

    def new(self, spec: ProcessSpec) -> Process:
        """A row for spec that is not in the table yet."""
        return Process(self._serial + 1, self._new_key(spec), spec)

    def adopt(self, process: Process, due: float | None) -> None:
        """Puts one in that PID 1 had before. due: of its timer, on the clock of timers.

        Raises ValueError when the key is taken.
        """
        if process.key in self._by_key:
            raise ValueError(f"there are two processes {process.key}")
        self._serial = max(self._serial, process.serial)
        self._by_key[process.key] = process
        if process.pid is not None:
            self._by_pid[process.pid] = process
        if process.state in ENDED and not process.spec.once:
            self._ended[process.key] = None
        delay = max(0.0, (due or 0) - self._timers.now())
        if process.state == BACKING_OFF:
            self._start_later(process, delay)
        elif process.state == STOPPING:
            self._kill_later(process, delay)

    # ---- transitions -------------------------------------------------------------------------

    def _start(self, process: Process) -> None:
        """To running; the state is as before when it raises."""
        before, process.state = process.state, STARTING
        try:
            process.pid = self._spawn(process)
        except BaseException:
            process.state = before
            raise
        now = self._timers.now()
        self._forget_timer(process)
        self._ended.pop(process.key, None)
        self._by_pid[process.pid] = process
        process.started_at = now
        process.recent_starts.append(now)
        del process.recent_starts[: -MAX_STARTS - 1]
        process.starts += 1
        process.spoke = False
        process.stop_reason = ""
        process.state = RUNNING
        self._emit("started", process, {"pid": process.pid, "starts": process.starts})

    def exited(self, pid: int, wait_status: int) -> bool:
        """A child was reaped; whether it was one of these. wait_status: from waitpid(2)."""
        process = self._by_pid.pop(pid, None)
        if process is None:
            return False
        self._forget_timer(process)
        code = os.waitstatus_to_exitcode(wait_status)
        process.last_exit = status, code = ("exited", code) if code >= 0 else ("signaled", -code)
        process.ended_at = self._timers.now()
        process.pid = None
        again = process.spec.respawn and process.state == RUNNING and not self.closed
        self._emit("exited", process, {"status": status, "code": code, "respawn": again})
        if again:
            self._respawn(process)
        else:
            self._enter_ended(process, STOPPED if process.state == STOPPING else EXITED)
        self._tell(process.waiters)
        return True

    def _respawn(self, process: Process) -> None:
        if process.spec.backoff and not process.spoke:
            self._back_off(process)
        elif not process.spec.backoff and self._too_often(process):
            self._enter_ended(process, STOPPED, reason=_TOO_OFTEN)
        else:
            process.failures = 0
            self._start_or_back_off(process)

    @staticmethod
    def _too_often(process: Process) -> bool:
        starts = process.recent_starts
        return len(starts) > MAX_STARTS and process.ended_at - starts[0] <= WINDOW

    def _start_or_back_off(self, process: Process) -> None:
        try:
            self._start(process)
        except Exception as error:  # noqa: BLE001  # whatever it is, it is tried again
            self._emit("failed", process, {"error": str(error)})
            self._back_off(process)

    def _back_off(self, process: Process) -> None:
        if process.ended_at - process.started_at >= MAX_DELAY:
            process.failures = 0
        delay = min(MAX_DELAY, FIRST_DELAY * 2 ** min(process.failures, 16))
        delay *= 1 + self._random() / 10
        process.failures += 1
        process.state = BACKING_OFF
        self._start_later(process, delay)
        self._emit("backing_off", process, {"delay": round(delay, 3)})

    def _enter_ended(self, process: Process, state: str, *, reason: str = "") -> None:
        self._forget_timer(process)
        process.state = state
        process.stop_reason = reason
        if state == STOPPED:
            self._emit("stopped", process, {"reason": reason} if reason else {})
        if not process.spec.once:
            self._ended[process.key] = None
            if len(self._ended) > WHOLE_OUTPUTS:
                older = self._by_key[list(self._ended)[-WHOLE_OUTPUTS - 1]]
                if older.ring:
                    older.ring.append(b"", SHORT_OUTPUT)
            if len(self._ended) > MAX_ENDED:
                oldest = next(iter(self._ended))
                del self._ended[oldest], self._by_key[oldest]
                self._listen(oldest, ())
        self._tell(process.stop_waiters)
        self._tell(process.waiters)

    # ---- helpers -----------------------------------------------------------------------------

    def _refuse_when_closed(self, doing: str, key: str) -> None:
        if self.closed:
            raise ProtocolError("ESHUTDOWN", f"cannot {doing} {key}: shutting down")

    def _begin_afresh(self, process: Process) -> None:
        process.recent_starts.clear()
        process.failures = 0

    @staticmethod
    def _forget_timer(process: Process) -> None:
        if process.timer:
            process.timer.cancel()
            process.timer = None

    def _send(self, process: Process, number: int) -> None:
        # A pid in this table is a child that was not waited for yet, so it is nobody else's.
        if process.pid is not None:
            self._kill(process.pid, number)

    def _start_later(self, process: Process, delay: float) -> None:
        process.timer = self._timers.call_later(delay, lambda: self._start_or_back_off(process))

    def _kill_later(self, process: Process, delay: float) -> None:
        process.timer = self._timers.call_later(delay, lambda: self._kill_now(process))

    def _kill_now(self, process: Process) -> None:
        process.timer = None
        self._emit("killed", process, {})
        self._send(process, signal.SIGKILL)

    @staticmethod
    def _tell(waiters: dict[object, Callable[[], object]]) -> None:
        calls = list(waiters.values())
        waiters.clear()
        for call in calls:
            call()


def _cannot(doing: str, what: str, error: Exception) -> ProtocolError:
    if isinstance(error, OSError) and error.errno:
        import errno

        code = errno.errorcode.get(error.errno, "EIO")
        if code == "EINVAL":  # that is for requests; execve(2) says it of a program
            code = "ENOEXEC"
        return ProtocolError(code, f"cannot {doing} {what}: {os.strerror(error.errno)}")
    return ProtocolError("EINVAL", f"cannot {doing} {what}: {error}")
