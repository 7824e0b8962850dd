"""The way down, in order and with deadlines:

    first    processes with stop_stage first (tremplin, that stops the containers): their signal
    normal   everything else outside containers: SIGTERM, or the stop signal of a supervised one;
             the descendants of those once they are left behind; longer while one that asked for
             more time is at it
    last     processes with stop_stage last (the log forwarder, lxcfs)
    kill     whatever is left, containers included: SIGKILL

A container's processes are waited for in the normal stage, for as long as that may take, but get no
signal before SIGKILL: their own init takes them down. The process that keeps a container is one of
them to its end, as it has its hooks to run when the container is down.

What comes after the processes are gone (the filesystems, the power) is in power_off.py.
"""

from __future__ import annotations

from agent.console import write_line
from agent.lean_stdlib import signal
from agent.process_supervisor.proc import ProcessFacts, read_processes, subtree
from agent.process_supervisor.protocol import SIGNALS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from agent.process_supervisor.loop import Timer, Timers
    from agent.process_supervisor.table import Table

NORMAL_SECONDS = 10.0
"""How long the normal stage may take,"""
PATIENT_SECONDS = 15.0
"""and how long at most while a supervised process runs whose stop_timeout is longer: LXD, which
gives the containers nearly as long and has its own work to do after that."""

KILL_SECONDS = 2.0
"""How long SIGKILL may take until what is left is given up."""

_LOOK_AGAIN = 0.02
"""Seconds between two looks at /proc at least; the time that ten looks take if that is longer."""

_NAMED = 20
"""How many processes that had to be killed the last line names."""


class Shutdown:
    """The shutdown of all processes, step by step, driven by `poke` and timers.

    descendants_only: signal nothing that does not descend from this process.
    finished: called at the end, with the names of those that had to be killed.
    """

    def __init__(
        self,
        *,
        table: Table,
        timers: Timers,
        kill: Callable[[int, int], None],
        children_left: Callable[[], bool],
        descendants_only: bool,
        finished: Callable[[list[str]], None],
    ) -> None:
        self._table = table
        self._timers = timers
        self._kill = kill
        self._children_left = children_left
        self._descendants_only = descendants_only
        self._finished = finished
        self._signalled: set[tuple[int, int]] = set()
        self._of_containers: set[tuple[int, int]] = set()
        self._killed: list[str] = []
        self._timer: Timer | None = None
        self._steps = self._run()
        self._ended = False
        table.close()
        self.poke()

    def poke(self) -> None:
        """A process was reaped, or it is time to look again: goes on if there is reason to."""
        if self._timer:
            self._timer.cancel()
            self._timer = None
        if self._ended:
            return
        delay = next(self._steps, None)
        if delay is None:
            self._ended = True
            self._finished(self._killed)
        else:
            self._timer = self._timers.call_later(delay, self.poke)

    def _run(self) -> Iterator[float]:
        """Each yield waits for poke, at most for the seconds it yields."""
        self._processes()  # who keeps a container: cannot be seen any more once that is down
        yield from self._supervised_stage("first")
        yield from self._normal_stage()
        yield from self._supervised_stage("last")
        yield from self._kill_stage()

    def _supervised_stage(self, stage: str) -> Iterator[float]:
        """Stops the supervised processes of a stage, all at once."""
        started = self._timers.now()
        limit = 0.0
        for process in self._table:
            if process.pid is not None and process.spec.stop_stage == stage:
                self._kill(process.pid, SIGNALS[process.spec.stop_signal])
                limit = max(limit, min(process.spec.stop_timeout, NORMAL_SECONDS))
        while (left := started + limit - self._timers.now()) > 0 and any(
            process.pid is not None and process.spec.stop_stage == stage for process in self._table
        ):
            yield left

    def _normal_stage(self) -> Iterator[float]:
        started = self._timers.now()
        look_at = 0.0
        while self._children_left():
            now = self._timers.now()
            limit = NORMAL_SECONDS if now < started + NORMAL_SECONDS else self._patience()
            if now >= started + limit:
                return
            # Looking through /proc costs, so not at each exit of a thousand.
            if now >= look_at:
                processes = self._outside_the_last_stage()
                if not processes:
                    return
                led = self._led(processes)
                for facts in processes.values():
                    if facts.pid not in led:
                        self._ask_to_end(facts)
                then = self._timers.now()
                look_at = then + max(_LOOK_AGAIN, 10 * (then - now))
            yield min(started + limit, look_at) - now

    def _patience(self) -> float:
        """How long the normal stage may take as its usual time is over."""
        timeouts = (
            process.spec.stop_timeout
            for process in self._table
            if process.pid is not None and process.spec.stop_stage == "normal"
        )
        return min(max(timeouts, default=0.0), PATIENT_SECONDS)

    def _outside_the_last_stage(self) -> dict[int, ProcessFacts]:
        processes = self._processes()
        later = subtree(
            (p.pid for p in self._table if p.pid is not None and p.spec.stop_stage == "last"),
            processes,
        )
        return {pid: facts for pid, facts in processes.items() if pid not in later}

    def _led(self, processes: dict[int, ProcessFacts]) -> set[int]:
        """Those that are ended by another that was asked to: what descends from a supervised
        process, or from the one that keeps a container. LXD for one needs its helpers to take
        containers down. If their leader leaves them behind, they are orphans, and asked then.
        """
        leaders = {process.pid for process in self._table if process.pid is not None}
        leaders |= {facts.pid for facts in processes.values() if facts.in_container}
        return subtree(leaders, processes) - leaders

    def _ask_to_end(self, facts: ProcessFacts) -> None:
        identity = (facts.pid, facts.started)
        if identity in self._signalled:
            return
        self._signalled.add(identity)
        process = self._table.by_pid(facts.pid)
        if process is None:
            if not facts.in_container:
                self._kill(facts.pid, signal.SIGTERM)
                self._kill(facts.pid, signal.SIGCONT)
        elif process.spec.stop_stage == "normal":
            self._kill(facts.pid, SIGNALS[process.spec.stop_signal])
            self._kill(facts.pid, signal.SIGCONT)

    def _kill_stage(self) -> Iterator[float]:
        deadline = self._timers.now() + KILL_SECONDS
        named: set[tuple[int, int]] = set()
        while self._children_left():
            now = self._timers.now()
            processes = self._processes()
            if not processes:
                return
            if now >= deadline:
                write_line("init", f"gave up on {len(processes)} processes that SIGKILL cannot end")
                return
            for facts in processes.values():
                # The rest of a container goes with its init, and is not worth a name each.
                if (facts.pid, facts.started) not in named:
                    named.add((facts.pid, facts.started))
                    self._killed.append(self._name(facts))
                self._kill(facts.pid, signal.SIGKILL)
            yield max(_LOOK_AGAIN, 10 * (self._timers.now() - now))

    def _name(self, facts: ProcessFacts) -> str:
        process = self._table.by_pid(facts.pid)
        return f"{process.key if process else facts.name} (pid {facts.pid})"

    def _processes(self) -> dict[int, ProcessFacts]:
        """Those there are, from /proc, or at least the supervised ones when it is of no use."""
        found = read_processes(descendants_only=self._descendants_only)
        for process in self._table:
            if process.pid is not None and process.pid not in found:
                found[process.pid] = ProcessFacts(process.pid, 0, process.key, 0)
        for facts in found.values():
            identity = (facts.pid, facts.started)
            if facts.in_container:
                self._of_containers.add(identity)
            elif identity in self._of_containers:
                facts.in_container = True
        return found


def summary(killed: list[str], not_unmounted: list[str]) -> str:
    """What the last line says: `clean`, or what was not."""
    parts = []
    if killed:
        more = f" and {len(killed) - _NAMED} more" if len(killed) > _NAMED else ""
        parts.append(f"killed {', '.join(killed[:_NAMED])}{more}")
    if not_unmounted:
        parts.append(f"cannot unmount {', '.join(not_unmounted)}")
    return "; ".join(parts) or "clean"
