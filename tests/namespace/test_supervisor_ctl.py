"""termina-ctl, as a person or a program calls it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.namespace.pid_one import REPOSITORY, PidOne, wait_until


@pytest.fixture(scope="module")
def pid_one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PidOne]:
    with PidOne(tmp_path_factory.mktemp("ctl")) as running, running.client() as client:
        client.launch(["sh", "-c", "echo hello; exec sleep 1000"], name="greeter", respawn=True)
        yield running


def command(pid_one: PidOne, *words: str) -> list[str]:
    run_dir = f"--run-dir={pid_one.run_dir}"
    return [sys.executable, "-m", "agent.process_supervisor.ctl", run_dir, *words]


def ctl(pid_one: PidOne, *words: str, code: int = 0) -> str:
    result = subprocess.run(
        command(pid_one, *words),
        capture_output=True,
        text=True,
        timeout=20,
        cwd=REPOSITORY,
        check=False,
    )
    assert result.returncode == code, result.stderr
    return result.stdout + result.stderr


def test_list_is_a_table_or_json(pid_one: PidOne) -> None:
    lines = ctl(pid_one).splitlines()
    assert " ".join(lines[0].split()) == "KEY STATE PID UPTIME STARTS LAST EXIT COMMAND"
    greeter = next(line for line in lines if line.startswith("greeter"))
    assert "running (respawn)" in greeter
    assert "exec sleep 1000" in greeter
    rows = [json.loads(line) for line in ctl(pid_one, "--json", "list").splitlines()]
    assert [row["key"] for row in rows[:2]] == ["maitred", "greeter"]


def test_show_and_output(pid_one: PidOne) -> None:
    assert "state      running" in ctl(pid_one, "show", "greeter")
    assert ctl(pid_one, "output", "greeter").startswith("hello\n")
    assert json.loads(ctl(pid_one, "--json", "show", "greeter"))["respawn"] is True
    assert json.loads(ctl(pid_one, "--json", "output", "greeter"))["output"].startswith("hello\n")


def test_why_it_is_stopped(pid_one: PidOne) -> None:
    ctl(pid_one, "launch", "--name", "loop", "--respawn", "--", "false")
    stopped = "state      stopped: it was started more than 10 times in 30 s"
    wait_until("it is stopped", lambda: stopped in ctl(pid_one, "show", "loop"))
    ctl(pid_one, "start", "loop")
    ctl(pid_one, "stop", "greeter")
    assert "state      stopped\n" in ctl(pid_one, "show", "greeter")


def test_stop_start_signal_wait(pid_one: PidOne) -> None:
    ctl(pid_one, "stop", "greeter")
    assert "state      stopped" in ctl(pid_one, "show", "greeter")
    assert "pid " in ctl(pid_one, "start", "greeter")
    ctl(pid_one, "signal", "greeter", "hup")
    ctl(pid_one, "restart", "greeter")
    assert "no such process" in ctl(pid_one, "stop", "nobody", code=1)
    assert "there is no signal" in ctl(pid_one, "signal", "greeter", "999", code=1)
    assert ctl(pid_one, "launch", "--wait", "--", "sh", "-c", "echo out; exit 3", code=3) == "out\n"
    words = ("--json", "launch", "--wait", "--", "sh", "-c", "echo out; exit 3")
    ended = json.loads(ctl(pid_one, *words, code=3))
    assert (ended["status"], ended["code"], ended["output"]) == ("exited", 3, "out\n")
    key = ctl(pid_one, "launch", "--", "sh", "-c", "exit 4").split()[0]
    assert ctl(pid_one, "wait", key, code=4) == "exited 4\n"


def test_events_can_be_followed_by_a_program(pid_one: PidOne) -> None:
    with subprocess.Popen(
        command(pid_one, "--json", "events"), stdout=subprocess.PIPE, cwd=REPOSITORY
    ) as follower:
        assert follower.stdout
        seen = threading.Event()

        def make_events() -> None:
            # Until the follower is there, events are nobody's.
            with pid_one.client() as client:
                while not seen.is_set():
                    client.launch(["true"], wait=True)

        maker = threading.Thread(target=make_events)
        maker.start()
        event = json.loads(follower.stdout.readline())
        seen.set()
        maker.join()
        follower.kill()
    assert event["event"] in {"started", "exited"}


def test_without_pid_1_it_says_so(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "agent.process_supervisor.ctl", f"--run-dir={tmp_path}", "list"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert "termina-ctl: cannot connect to" in result.stderr
