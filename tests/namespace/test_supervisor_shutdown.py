"""The order and the deadlines of a shutdown, with real processes and a container's namespace."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.process_supervisor.client import Event, SupervisorError, SupervisorGone
from tests.namespace.pid_one import PidOne, wait_until

TELLS = """
for name in PWR TERM HUP; do
    trap "echo $NAME $name >>$LOG; [ -z \\"$OBEY\\" ] || exit 0" $name
done
echo $NAME ready >>$LOG
while :; do sleep 0.01; done
"""
"""Writes each signal it gets to a file; ends at one when OBEY is set."""


@pytest.fixture
def pid_one(tmp_path: Path) -> Iterator[PidOne]:
    with PidOne(tmp_path) as running:
        yield running


class Log:
    """What the processes wrote."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def lines(self) -> list[str]:
        return self.path.read_text().splitlines()

    def env(self, name: str, *, obey: bool) -> dict[str, str]:
        return {"NAME": name, "LOG": str(self.path), "OBEY": "1" if obey else ""}

    def wait_for(self, *lines: str) -> None:
        wait_until(f"{lines} are written", lambda: set(lines) <= set(self.lines()))


def last_line(pid_one: PidOne) -> str:
    return pid_one.console().splitlines()[-1]


def test_the_stages_come_in_order(pid_one: PidOne, tmp_path: Path) -> None:
    log = Log(tmp_path / "log")
    shell = ["sh", "-c", TELLS]
    with pid_one.client() as client:
        client.launch(
            shell,
            env=log.env("tremplin", obey=False),
            name="tremplin",
            respawn=True,
            stop_signal="SIGPWR",
            stop_timeout=0.5,
            stop_stage="first",
        )
        client.launch(shell, env=log.env("plain", obey=True), name="plain", respawn=True)
        client.launch(shell, env=log.env("own", obey=True), name="own", stop_signal="SIGHUP")
        client.launch(
            shell, env=log.env("logs", obey=True), name="logs", stop_stage="last", respawn=True
        )
        # A daemon that nobody supervises, and a container: processes in a PID namespace.
        client.launch(
            ["sh", "-c", '(setsid sh -c "$0" >/dev/null 2>&1 &)', TELLS],
            env=log.env("daemon", obey=True),
            wait=True,
        )
        client.launch(
            ["sh", "-c", '(setsid unshare -pf --kill-child sh -c "$0" >/dev/null 2>&1 &)', TELLS],
            env=log.env("container", obey=False),
            wait=True,
        )
        log.wait_for(*(f"{n} ready" for n in ("tremplin", "plain", "own", "logs", "daemon")))
        log.wait_for("container ready")
        started = time.monotonic()
        client.shutdown("test")
    assert pid_one.wait() == 0
    took = time.monotonic() - started
    order = [line for line in log.lines() if not line.endswith("ready")]
    assert order[0] == "tremplin PWR"
    assert sorted(order[1:-1]) == ["daemon TERM", "own HUP", "plain TERM"]
    assert order[-1] == "logs TERM"
    # 0.5 s for tremplin; the container is waited for to the end of the normal stage.
    assert 10.4 < took < 12.0
    killed = last_line(pid_one)
    assert "tremplin" in killed
    assert "unshare" in killed
    assert "plain" not in killed


KEEPS = """
import ctypes, os, sys, time
log = open(os.environ["LOG"], "a", buffering=1)
assert ctypes.CDLL(None).unshare(0x20000000) == 0  # CLONE_NEWPID
pid = os.fork()
if pid == 0:
    os.execvp("sleep", ["sleep", "1000"])
print("container", pid, file=log)
os.waitpid(pid, 0)
print("container down", file=log)
time.sleep(0.5)
print("hooks done", file=log)
"""
"""As liblxc's monitor does: has work to do after the container's init has ended."""


def test_the_keeper_of_a_container_is_left_to_its_hooks(pid_one: PidOne, tmp_path: Path) -> None:
    log = Log(tmp_path / "log")
    trap = 'trap "kill -9 $CONTAINER; sleep 0.1; exit 0" PWR'
    with pid_one.client() as client:
        client.launch(
            ["sh", "-c", '(setsid python3 -c "$0" >/dev/null 2>&1 &)', KEEPS],
            env=log.env("keeper", obey=False),
            wait=True,
        )
        wait_until("the container runs", lambda: len(log.lines()) == 1)
        (line,) = log.lines()
        client.launch(
            ["sh", "-c", f"{trap}; echo trapped; while :; do sleep 0.01; done"],
            env={"CONTAINER": line.split()[1]},
            name="tremplin",
            stop_signal="SIGPWR",
            stop_timeout=5,
            stop_stage="first",
        )
        wait_until("the trap is set", lambda: b"trapped" in client.output("tremplin")[1])
        client.shutdown("test")
    assert pid_one.wait() == 0
    assert log.lines()[1:] == ["container down", "hooks done"]
    assert last_line(pid_one).endswith("init: exit: clean")


def test_what_obeys_is_clean_and_quick(pid_one: PidOne, tmp_path: Path) -> None:
    with pid_one.client() as client:
        for number in range(100):
            client.launch(["sleep", "1000"], name=f"s{number}", respawn=number % 2 == 0)
        client.launch(["sh", "-c", "kill -STOP $$"], name="suspended")
        client.launch(["sh", "-c", "kill -STOP $$"])
        started = time.monotonic()
        client.shutdown("test")
    assert pid_one.wait() == 0
    assert time.monotonic() - started < 1.0
    assert last_line(pid_one).endswith("init: exit: clean")


def test_those_that_ignore_it_are_killed_and_named(pid_one: PidOne) -> None:
    with pid_one.client() as client:
        for number in range(50):
            client.launch(["sh", "-c", "trap '' TERM; sleep 1000"], name=f"stubborn{number}")
        started = time.monotonic()
        client.shutdown("test")
    assert pid_one.wait() == 0
    assert 9.9 < time.monotonic() - started < 12.0
    assert "init: exit: killed stubborn0 (pid " in last_line(pid_one)
    assert last_line(pid_one).endswith(" more")


def test_who_asked_for_more_time_gets_it(pid_one: PidOne) -> None:
    slow = (
        "trap 'echo stopping; sleep 10.5; exit 0' TERM; echo trapped; while :; do sleep 0.01; done"
    )
    with pid_one.client() as client:
        client.launch(["sh", "-c", slow], name="slow", stop_timeout=14)
        client.launch(["sh", "-c", "trap '' TERM; sleep 1000"], name="stubborn")
        wait_until("the trap is set", lambda: b"trapped" in client.output("slow")[1])
        started = time.monotonic()
        client.shutdown("test")
    assert pid_one.wait() == 0
    assert 10.4 < time.monotonic() - started < 12.5
    assert "init: exit: killed stubborn (pid " in last_line(pid_one)
    assert "slow" not in last_line(pid_one)


def test_a_shutdown_refuses_new_processes_and_respawns_nothing(pid_one: PidOne) -> None:
    with pid_one.client() as client, pid_one.client() as follower:
        client.launch(["sh", "-c", "trap 'exit 1' TERM; while :; do sleep 0.01; done"], name="s")
        hold = ["sh", "-c", "trap 'sleep 0.3; exit 0' TERM; while :; do sleep 0.01; done"]
        client.launch(hold, name="hold", respawn=True)
        events = follower.events()
        client.shutdown("first wish")
        client.shutdown("second wish")
        with pytest.raises(SupervisorError, match=r"cannot launch true.*: shutting down"):
            client.launch(["true"])
        assert next(events).name == "shutdown"
        names = {event.name for event in _until_gone(events)}
    assert pid_one.wait() == 0
    assert "started" not in names
    assert pid_one.console().count("shutting down") == 1


def _until_gone(events: Iterator[Event]) -> Iterator[Event]:
    try:
        yield from events
    except SupervisorGone:
        return
