"""PID 1 executes itself anew: nothing that it supervises, and nobody who waits, notices."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.process_supervisor.client import Client, Exit, SupervisorError
from tests.namespace.pid_one import REPOSITORY, PidOne, wait_until


@pytest.fixture
def pid_one(tmp_path: Path) -> Iterator[PidOne]:
    with PidOne(tmp_path) as running:
        yield running


def upgrades(client: Client) -> int:
    count: int = client.request("list")["supervisor"]["upgrades"]
    return count


def test_table_children_output_and_clients_go_over(pid_one: PidOne) -> None:
    exits: list[Exit] = []
    with pid_one.client() as client, pid_one.client() as waiter, pid_one.client() as follower:
        client.launch(["sh", "-c", "echo before; read x; exit 5"], name="ended", wait=True)
        client.launch(["sh", "-c", "echo $$; exec sleep 1000"], name="respawned", respawn=True)
        client.launch(["false"], name="limited", respawn=True)
        wait_until("it is stopped", lambda: client.info("limited")["state"] == "stopped")
        trap = "trap 'echo hup; exit 7' HUP; while :; do sleep 0.01; done"
        client.launch(["sh", "-c", trap], name="w")
        wait = threading.Thread(target=lambda: exits.append(waiter.wait("w")))
        wait.start()
        events = follower.events()
        before = {row["key"]: row for row in client.list()}
        for number in range(1, 4):
            client.request("upgrade")
            assert upgrades(client) == number
        after = {row["key"]: row for row in client.list()}
        assert after.pop("upgrade-check")["last_exit"]["code"] == 0
        for key, row in before.items():
            for field in ("serial", "argv", "state", "pid", "starts", "respawn", "recent_starts"):
                assert after[key][field] == row[field], (key, field)
        assert client.output("ended")[1] == b"before\n"
        client.signal("w", "SIGHUP")
        wait.join(10)
        assert exits == [Exit("exited", 7)]
        assert client.output("w")[1] == b"hup\n"
        client.signal("respawned", "SIGKILL")
        while next(events).key != "respawned":
            pass
        assert (next(events).name, client.info("respawned")["starts"]) == ("started", 2)
        assert pid_one.zombies() == []
    os.kill(pid_one.pid, signal.SIGTERM)
    assert pid_one.wait() == 0
    assert pid_one.console().splitlines()[-1].endswith("exit: clean")


def test_exits_during_the_upgrade_are_not_missed(pid_one: PidOne) -> None:
    with pid_one.client() as client:
        keys = [
            client.launch(["sh", "-c", f"sleep 0.{number:02}; exit {number}"]).key
            for number in range(100)
        ]
        for _ in range(3):
            client.request("upgrade")
        assert [client.wait(key) for key in keys] == [Exit("exited", n) for n in range(100)]


def test_the_signal_does_it_too(pid_one: PidOne) -> None:
    with pid_one.client() as client:
        os.kill(pid_one.pid, signal.SIGUSR2)
        wait_until("it is upgraded", lambda: upgrades(client) == 1)


def test_timers_go_over(pid_one: PidOne) -> None:
    with pid_one.client() as client:
        client.launch(["false"], name="b", respawn=True, backoff=True)
        wait_until("it backs off", lambda: client.info("b")["state"] == "backing_off")
        client.launch(
            ["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.01; done"],
            name="stubborn",
            stop_timeout=2,
        )
        wait_until("it is ready", lambda: client.output("stubborn")[1] == b"ready\n")
        with pid_one.client() as stopper:
            stop = threading.Thread(target=lambda: stopper.stop("stubborn"))
            stop.start()
            wait_until("it is stopping", lambda: client.info("stubborn")["state"] == "stopping")
            client.request("upgrade")
            stop.join(10)
        assert client.info("stubborn")["last_exit"]["code"] == signal.SIGKILL
        wait_until("it is tried again", lambda: client.info("b")["starts"] > 2)


def test_a_program_that_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    # From a copy of the agent, so that it can be broken.
    copy = tmp_path / "copy"
    copy.mkdir()
    subprocess.run(["cp", "-r", REPOSITORY / "agent", copy], check=True)
    with PidOne(tmp_path, checkout=copy) as pid_one, pid_one.client() as client:
        table = copy / "agent/process_supervisor/table.py"
        table.write_text(table.read_text() + "\nraise RuntimeError('half an upgrade')\n")
        with pytest.raises(SupervisorError, match=r"cannot upgrade: .*half an upgrade"):
            client.request("upgrade")
        assert upgrades(client) == 0
        assert client.launch([sys.executable, "-c", ""], wait=True).exit == Exit("exited", 0)
