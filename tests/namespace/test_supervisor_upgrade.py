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


# ---- a new program that cannot go on -----------------------------------------------------------

_SERVE = """
import os, time
from agent.listening import inherited
assert len(inherited()) == 1
time.sleep(1000)
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the agent that may be broken."""
    copy = tmp_path / "copy"
    copy.mkdir()
    # With its times: a change within the second in which Python compiled a file is not seen.
    subprocess.run(["cp", "-a", REPOSITORY / "agent", copy], check=True)
    return copy


def edit(copy: Path, module: str, old: str, new: str) -> None:
    path = copy / f"agent/process_supervisor/{module}.py"
    text = path.read_text()
    assert text.count(old) == 1, text.count(old)
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("upgrade", "FORMAT = 3", "FORMAT = 4"), "the state is of format 3, not 4"),
        (("protocol", '    "user": _is_account,\n', ""), "there is no field 'user'"),
        (("upgrade", '"failures", "spoke"', '"failures", "spoke", "news"'), "news"),
        (("salvage", "def salvage(", "def salvage(:"), "SyntaxError: invalid syntax"),
        (("table", "MAX_STARTS = 10", "raise OSError('half an upgrade')"), "half an upgrade"),
    ],
)
def test_a_program_that_could_not_go_on_is_refused(
    tmp_path: Path, copy: Path, change: tuple[str, str, str], reason: str
) -> None:
    with PidOne(tmp_path, checkout=copy) as pid_one, pid_one.client() as client:
        running = client.launch(["sleep", "1000"], name="s", user="nobody")
        edit(copy, *change)
        files = pid_one.open_files()
        with pytest.raises(SupervisorError, match=f"cannot upgrade: .*{reason}"):
            client.request("upgrade")
        assert upgrades(client) == 0
        assert client.info("s")["pid"] == running.pid
        assert pid_one.open_files() == files


NO_REHEARSAL = (
    "takeover",
    '    with open(path, "rb") as file:',
    "    return\n    with open(path) as file:",
)


@pytest.mark.parametrize(
    ("change", "known"),
    [
        # Nothing of the state can be read: another format, or cut off.
        (("upgrade", "FORMAT = 3", "FORMAT = 4"), set[str]()),
        (("takeover", "file.seek(0)", "os.truncate(fd, 300)"), set[str]()),
        # Of one process it cannot.
        (("protocol", '    "user": _is_account,\n', ""), {"r", "w", "c", "done", "served"}),
    ],
)
def test_a_take_over_that_fails_loses_no_process(
    tmp_path: Path, copy: Path, change: tuple[str, str, str], known: set[str]
) -> None:
    serve = f"exec {sys.executable} -c '{_SERVE}' maitred"
    options = (f"maitred.listen=unix:{tmp_path}/maitred.sock",)
    listen = [f"unix:{tmp_path}/served.sock"]
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    loud = f"exec 9<>{fifo}; while read x <&9; do echo $x; done"
    with PidOne(tmp_path, checkout=copy, maitred=f"#!/bin/sh\n{serve}\n", options=options) as one:
        with one.client() as client:
            client.launch(["true"], name="done", wait=True)
            client.launch(["sleep", "1001"], name="r", respawn=True)
            client.launch(["sleep", "1002"], name="w", env={"A": "b"})
            client.launch(["sleep", "1003"], name="c", console=True)
            client.launch(["sleep", "1004"], name="nobody", user="nobody")
            client.launch([sys.executable, "-c", _SERVE], name="served", listen=listen)
            client.launch(["sh", "-c", loud])
            before = {row["pid"]: row for row in client.list() if row["pid"]}
            edit(copy, *NO_REHEARSAL)
            edit(copy, *change)
            client.request("upgrade")
        wait_until("it goes on", lambda: "upgraded, with" in one.console())
        with one.client() as client:
            rows = {row["pid"]: row for row in client.list() if row["pid"]}
            # Every process is there, once, and no other: maitred neither.
            rows = {pid: row for pid, row in rows.items() if row["key"] != "upgrade-check"}
            assert rows.keys() == before.keys()
            for pid, row in rows.items():
                assert row["argv"] == before[pid]["argv"] or row["key"] == "maitred"
                assert abs(row["uptime"] - before[pid]["uptime"]) < 10
            keys = {row["key"] for row in client.list()}
            assert known <= keys
            assert client.info("maitred")["respawn"]
            # It can still print, and what it prints is read.
            loud_key = next(row["key"] for row in rows.values() if row["argv"][0] == "sh")
            fifo.write_text("after\n")
            wait_until("it is read", lambda: b"after\n" in client.output(loud_key)[1])
            # A process ended and one begun are seen to.
            sleeper = next(row for row in rows.values() if row["argv"] == ["sleep", "1002"])
            client.signal(sleeper["key"], "SIGKILL")
            assert client.wait(sleeper["key"]) == Exit("signaled", 9)
            assert client.launch(["true"], wait=True).exit == Exit("exited", 0)
            client.signal("maitred", "SIGKILL")
            wait_until("it is started again", lambda: client.info("maitred")["starts"] == 2)
            assert len(client.info("maitred")["listen"]) == 1
            assert one.zombies() == []
        lines = [line for line in one.console().splitlines() if "upgraded, with" in line]
        assert len(lines) == 1
        assert "cannot take over everything: " in lines[0]
        assert "adopted as found: " in lines[0]
        os.kill(one.pid, signal.SIGTERM)
        assert one.wait() == 0
        assert one.console().splitlines()[-1].endswith("exit: clean")


def test_a_program_that_fails_to_start_is_tried_until_it_is_mended(
    tmp_path: Path, copy: Path
) -> None:
    with PidOne(tmp_path, checkout=copy) as pid_one:
        with pid_one.client() as client:
            running = client.launch(["sleep", "1000"], name="s")
            ends = client.launch(["sh", "-c", "sleep 0.2; exit 5"], name="e")
            edit(copy, "__main__", "_TRY_AGAIN = 5.0", "_TRY_AGAIN = 0.1")
            edit(copy, "supervisor", "        self._stdio = stdio\n", "        raise OSError(5)\n")
            client.request("upgrade")
        failed = "cannot start after the upgrade, and tries again"
        wait_until("it has failed", lambda: pid_one.console().count(failed) > 3)
        assert pid_one.children()
        edit(copy, "supervisor", "        raise OSError(5)\n", "        self._stdio = stdio\n")
        with pid_one.client() as client:
            assert upgrades(client) == 1
            assert client.info("s")["pid"] == running.pid
            assert client.wait(ends.key) == Exit("exited", 5)
        assert "upgraded, with 4 processes\n" in pid_one.console()
