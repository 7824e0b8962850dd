"""The states of processes: the rules of respawning, and that no order of events breaks the table.

Spawning is handed in here, so that exits can be played in any order; with real processes it is
tested in tests/namespace.
"""

from __future__ import annotations

import contextlib
import errno
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from agent.process_supervisor.listing import describe
from agent.process_supervisor.loop import Timers
from agent.process_supervisor.protocol import ProcessSpec, ProtocolError
from agent.process_supervisor.table import ENDED, MAX_ENDED, Process, Table

EXIT_1 = 1 << 8


class World:
    """A table, and the clock and the processes it deals with."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers = Timers(lambda: self.now)
        self.alive: set[int] = set()
        self.signals: list[tuple[int, int]] = []
        self.events: list[tuple[str, str]] = []
        self.spawn_error: OSError | None = None
        self.listen_error: ProtocolError | None = None
        self.listening: dict[str, list[str]] = {}
        self._pid = 100
        self.table = Table(
            timers=self.timers,
            spawn=self._spawn,
            kill=lambda pid, number: self.signals.append((pid, number)),
            emit=self._emit,
            random=lambda: 0.0,
            listen=self._listen,
        )

    def _spawn(self, _process: Process) -> int:
        if self.spawn_error:
            raise self.spawn_error
        self._pid += 1
        self.alive.add(self._pid)
        return self._pid

    def _listen(self, key: str, addresses: Sequence[str]) -> None:
        if self.listen_error and addresses:
            raise self.listen_error
        self.listening[key] = list(addresses)

    def _emit(self, event: str, process: Process, _fields: dict[str, Any]) -> None:
        self.events.append((event, process.key))

    def exit(self, pid: int, status: int = EXIT_1) -> None:
        self.alive.remove(pid)
        assert self.table.exited(pid, status)

    def launch(self, name: str = "p", **options: Any) -> Process:
        return self.table.launch(ProcessSpec(["/bin/p"], name=name, **options))[0]

    def pass_time(self, seconds: float) -> None:
        """Fires every timer at its own time."""
        end = self.now + seconds
        while (wait := self.timers.wait()) is not None and self.now + wait <= end:
            self.now += wait
            for timer in self.timers.due():
                timer.fire()
        self.now = end


@pytest.fixture
def world() -> World:
    return World()


def pid_of(process: Process) -> int:
    assert process.pid is not None
    return process.pid


def test_the_eleventh_start_within_30_s_is_the_last(world: World) -> None:
    process = world.launch(respawn=True)
    for _ in range(10):
        world.now += 2.9
        world.exit(pid_of(process))
        assert process.state == "running"
    world.exit(pid_of(process))
    assert (process.state, process.starts) == ("stopped", 11)
    assert world.launch(respawn=True) is process
    assert (process.state, process.starts) == ("running", 12)


def test_starts_that_are_further_apart_never_stop_it(world: World) -> None:
    process = world.launch(respawn=True)
    for _ in range(100):
        world.now += 3.1
        world.exit(pid_of(process))
    assert (process.state, process.starts) == ("running", 101)


def test_back_off_doubles_up_to_30_s_and_begins_afresh_after_a_long_run(world: World) -> None:
    process = world.launch(respawn=True, backoff=True)
    for delay in (0.5, 1, 2, 4, 8, 16, 30, 30):
        world.exit(pid_of(process))
        assert process.state == "backing_off"
        world.pass_time(delay - 0.01)
        assert process.state == "backing_off"
        world.pass_time(0.01)
        assert process.state == "running"
    world.now += 31
    world.exit(pid_of(process))
    assert describe(process, world.now)["due"] == 0.5


def test_one_that_spoke_to_pid_1_is_started_again_at_once(world: World) -> None:
    process = world.launch(respawn=True, backoff=True)
    for _ in range(100):
        process.spoke = True
        world.exit(pid_of(process))
        assert process.state == "running"


def test_a_respawn_that_cannot_be_executed_is_tried_again(world: World) -> None:
    process = world.launch(respawn=True)
    world.spawn_error = FileNotFoundError(errno.ENOENT, "No such file or directory")
    world.exit(pid_of(process))
    assert process.state == "backing_off"
    world.pass_time(60)
    assert process.state == "backing_off"
    world.spawn_error = None
    world.pass_time(31)
    assert process.state == "running"


def test_what_cannot_be_executed_at_all_leaves_no_trace(world: World) -> None:
    world.spawn_error = PermissionError(errno.EACCES, "Permission denied")
    with pytest.raises(ProtocolError, match="cannot launch /bin/p: Permission denied") as caught:
        world.launch()
    assert caught.value.code == "EACCES"
    assert not list(world.table)


def test_a_name_is_one_process(world: World) -> None:
    first = world.launch()
    assert world.table.launch(ProcessSpec(["/bin/p"], name="p")) == (first, True)
    with pytest.raises(ProtocolError, match="that name runs something else"):
        world.table.launch(ProcessSpec(["/bin/other"], name="p"))
    world.exit(pid_of(first))
    assert world.table.launch(ProcessSpec(["/bin/other"], name="p")) == (first, False)
    assert first.spec.argv == ["/bin/other"]


def test_once_is_once(world: World) -> None:
    first = world.launch(once=True)
    world.exit(pid_of(first), 0)
    assert world.table.launch(ProcessSpec(["/bin/p"], name="p", once=True)) == (first, True)
    assert first.starts == 1


def test_stop_ends_it_for_good_and_kills_after_its_time(world: World) -> None:
    process = world.launch(respawn=True, stop_signal="SIGPWR", stop_timeout=2)
    done: list[str] = []
    world.table.stop("p", 1, lambda: done.append("first"))
    world.table.stop("p", 2, lambda: done.append("second"))
    pid = pid_of(process)
    assert world.signals == [(pid, signal.SIGPWR), (pid, signal.SIGCONT)]
    world.pass_time(1.9)
    assert (pid, signal.SIGKILL) not in world.signals
    world.pass_time(0.2)
    assert (pid, signal.SIGKILL) in world.signals
    assert done == []
    world.exit(pid, signal.SIGKILL)
    assert process.state == "stopped"
    assert done == ["first", "second"]


def test_stop_of_one_that_backs_off_is_immediate(world: World) -> None:
    process = world.launch(respawn=True, backoff=True)
    waited: list[str] = []
    world.exit(pid_of(process))
    world.table.wait("p", 1, lambda: waited.append("wait"))
    world.table.stop("p", 2, lambda: waited.append("stop"))
    assert sorted(waited) == ["stop", "wait"]
    world.pass_time(100)
    assert process.state == "stopped"


def test_wait_after_the_exit_gets_it_too(world: World) -> None:
    process = world.launch()
    waited: list[str] = []
    world.table.wait("p", 1, lambda: waited.append("before"))
    world.exit(pid_of(process), 0)
    world.table.wait("p", 2, lambda: waited.append("after"))
    assert waited == ["before", "after"]
    assert process.last_exit == ("exited", 0)


def test_ended_processes_are_forgotten_in_time_but_not_those_of_once(world: World) -> None:
    world.exit(pid_of(world.launch("kept", once=True)))
    for _ in range(MAX_ENDED + 50):
        world.exit(pid_of(world.launch("")))
    assert len(world.table) == MAX_ENDED + 1
    assert world.table.get("kept", "find").state == "exited"


def test_it_listens_until_it_is_forgotten(world: World) -> None:
    process = world.launch(listen=["unix:/a"], respawn=True)
    world.exit(pid_of(process))
    world.table.stop("p", 1, lambda: None)
    world.exit(pid_of(process))
    assert world.listening["p"] == ["unix:/a"]
    for _ in range(MAX_ENDED):
        world.exit(pid_of(world.launch("")))
    assert world.listening["p"] == []


def test_what_cannot_listen_is_as_before(world: World) -> None:
    first = world.launch(listen=["unix:/a"])
    world.exit(pid_of(first))
    world.listen_error = ProtocolError("EADDRINUSE", "cannot listen on unix:/b: in use")
    with pytest.raises(ProtocolError, match="cannot launch p: cannot listen on unix:/b") as caught:
        world.launch(listen=["unix:/b"])
    assert caught.value.code == "EADDRINUSE"
    assert (first.spec.listen, first.starts, first.state) == (["unix:/a"], 1, "exited")
    with pytest.raises(ProtocolError, match="in use"):
        world.launch("q", listen=["unix:/b"])
    assert [process.key for process in world.table] == ["p"]


def test_a_first_start_that_fails_closes_its_sockets_again(world: World) -> None:
    world.spawn_error = PermissionError(errno.EACCES, "Permission denied")
    with pytest.raises(ProtocolError, match="cannot launch /bin/p"):
        world.launch(listen=["unix:/a"])
    assert world.listening == {"p": []}


def test_nothing_starts_after_close(world: World) -> None:
    process = world.launch(respawn=True)
    waiting = world.launch("w", respawn=True, backoff=True)
    world.exit(pid_of(waiting))
    world.table.close()
    assert waiting.state == "stopped"
    world.exit(pid_of(process))
    assert process.state == "exited"
    with pytest.raises(ProtocolError, match="shutting down"):
        world.launch("new")
    with pytest.raises(ProtocolError, match="shutting down"):
        world.table.start("p")


@contextlib.contextmanager
def tolerated(*codes: str) -> Iterator[None]:
    """Only these refusals may happen."""
    try:
        yield
    except ProtocolError as error:
        if error.code not in codes:
            raise


class TableMachine(RuleBasedStateMachine):
    """Any order of requests, exits and time."""

    names = st.sampled_from(["a", "b", "c", ""])

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.waiting = 0
        self.answered = 0

    def _done(self) -> None:
        self.answered += 1

    @rule(name=names, respawn=st.booleans(), backoff=st.booleans(), once=st.booleans())
    def launch(self, *, name: str, respawn: bool, backoff: bool, once: bool) -> None:
        with tolerated("EBUSY", "ENOENT"):
            self.world.launch(
                name, respawn=respawn, backoff=respawn and backoff, once=once and bool(name)
            )

    @precondition(lambda self: bool(self.world.alive))
    @rule(data=st.data(), status=st.sampled_from([0, EXIT_1, 9]), spoke=st.booleans())
    def exit(self, *, data: st.DataObject, status: int, spoke: bool) -> None:
        pid = data.draw(st.sampled_from(sorted(self.world.alive)))
        process = self.world.table.by_pid(pid)
        assert process is not None
        process.spoke = spoke
        self.world.exit(pid, status)

    @precondition(lambda self: len(self.world.table) > 0)
    @rule(data=st.data(), request=st.sampled_from(["stop", "wait", "start", "signal"]))
    def ask(self, data: st.DataObject, request: str) -> None:
        key = data.draw(st.sampled_from([process.key for process in self.world.table]))
        with tolerated("EBUSY", "ESRCH", "ENOENT"):
            if request in {"stop", "wait"}:
                self.waiting += 1
                getattr(self.world.table, request)(key, self.waiting, self._done)
            elif request == "start":
                self.world.table.start(key)
            else:
                self.world.table.signal(key, "SIGHUP")

    @rule(seconds=st.floats(0, 60))
    def time(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    @rule(fails=st.booleans())
    def program(self, *, fails: bool) -> None:
        self.world.spawn_error = FileNotFoundError(errno.ENOENT, "gone") if fails else None

    @invariant()
    def table_and_processes_agree(self) -> None:
        rows = list(self.world.table)
        assert {row.pid for row in rows if row.pid is not None} == self.world.alive
        for row in rows:
            assert (row.pid is not None) == (row.state in {"running", "stopping"})
            assert (row.timer is not None) <= (row.state in {"stopping", "backing_off"})
            assert row.state != "backing_off" or row.timer is not None
            assert row.state not in ENDED or not (row.waiters or row.stop_waiters)
            assert describe(row, self.world.now)["state"] == row.state
        pending = sum(len(row.waiters) + len(row.stop_waiters) for row in rows)
        assert pending + self.answered == self.waiting


TestTableMachine = TableMachine.TestCase
TestTableMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
