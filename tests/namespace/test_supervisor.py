"""The real PID 1 in a PID namespace: reaping, respawning, waiting, clients that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.process_supervisor.client import AsyncClient, Exit, SupervisorError, SupervisorGone
from tests.namespace.pid_one import REPOSITORY, UNSHARE, PidOne, wait_until


@pytest.fixture
def pid_one(tmp_path: Path) -> Iterator[PidOne]:
    with PidOne(tmp_path) as running:
        yield running


def run_supervisor(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*UNSHARE, sys.executable, "-m", "agent.process_supervisor", *words],
        capture_output=True,
        text=True,
        timeout=20,
        cwd=REPOSITORY,
        check=False,
    )


def test_help_says_what_options_there_are() -> None:
    result = run_supervisor("--help")
    assert result.returncode == 0
    assert "maitred.setup=" in result.stdout


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["maitred.nonsense=1"], "cannot use option 'maitred.nonsense': there is no such option"),
        (["maitred.listen=tcp:1"], "cannot use option maitred.listen: not an address"),
        ([], "cannot set the machine up: not its PID 1; use maitred.setup=no"),
    ],
)
def test_bad_options_are_one_line_and_code_2(words: list[str], line: str) -> None:
    result = run_supervisor(*words)
    assert result.returncode == 2
    assert line in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_two_do_not_share_a_run_directory(pid_one: PidOne) -> None:
    result = run_supervisor("maitred.setup=no", f"maitred.run_dir={pid_one.run_dir}")
    assert result.returncode == 1
    assert "another supervisor listens there" in result.stderr or "cannot listen" in result.stderr
    with pid_one.client() as client:
        assert client.info("maitred")["state"] == "running"


def test_launch_wait_and_exit_codes(pid_one: PidOne) -> None:
    with pid_one.client() as client:
        assert client.launch(["true"], wait=True).exit == Exit("exited", 0)
        assert client.launch(["sh", "-c", "exit 7"], wait=True).exit == Exit("exited", 7)
        killed = client.launch(["sh", "-c", "kill -KILL $$"], wait=True)
        assert killed.exit == Exit("signaled", signal.SIGKILL)
        launched = client.launch(["sh", "-c", "exit 3"])
        assert client.wait(launched.key) == Exit("exited", 3)
        assert client.wait(launched.key) == Exit("exited", 3)


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["/nothing"], "ENOENT"),
        (["nothing"], "ENOENT"),
        ([os.path.relpath("/usr/bin/true", REPOSITORY)], "ENOENT"),  # found from where PID 1 is
        (["/etc/passwd"], "EACCES"),
    ],
)
def test_what_cannot_be_executed_says_so(pid_one: PidOne, argv: list[str], code: str) -> None:
    with pid_one.client() as client, pytest.raises(SupervisorError, match="cannot launch") as error:
        client.launch(argv)
    assert error.value.code == code


def test_a_process_gets_a_clean_start(pid_one: PidOne, tmp_path: Path) -> None:
    script = (
        "exec >$OUT; echo $PATH; echo $A; readlink /proc/self/fd/0 /proc/self/fd/2;"
        " ls /proc/self/fd | wc -w; cut -d' ' -f1,6 /proc/$$/stat;"
        " exec grep -E '^Sig(Blk|Ign)' /proc/self/status"
    )
    out = tmp_path / "out"
    with pid_one.client() as client:
        launched = client.launch(["sh", "-c", script], env={"A": "b c", "OUT": str(out)}, wait=True)
    lines = out.read_text().splitlines()
    assert lines[:4] == ["/usr/bin:/usr/sbin:/bin:/sbin", "b c", "/dev/null", lines[3]]
    assert int(lines[4]) == 4  # three, and the directory that ls reads
    assert lines[5] == f"{launched.pid} {launched.pid}"  # leads a session of its own
    assert lines[6].split()[1] == "0" * 16
    # 32 and 33 are glibc's own, and its posix_spawn leaves them ignored.
    assert int(lines[7].split()[1], 16) & ~(3 << 31) == 0


def test_orphans_are_reaped(pid_one: PidOne, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    script = "i=0; while [ $i -lt 200 ]; do (sleep 0.05 & ) ; i=$((i+1)); done; echo >$FIFO"
    with pid_one.client() as client:
        client.launch(["sh", "-c", script], env={"FIFO": str(fifo)})
        fifo.read_text()
        wait_until("only maitred is left", lambda: len(pid_one.children()) == 1)
        assert client.request("list")["supervisor"]["orphans"] >= 200


def test_a_respawning_process_is_stopped_at_its_eleventh_start(pid_one: PidOne) -> None:
    with pid_one.client() as client, pid_one.client() as follower:
        events = follower.events()
        client.launch(["false"], name="loop", respawn=True)
        names = []
        for event in events:
            names.append(event.name)
            if event.name == "stopped":
                break
        assert names == ["started", "exited"] * 11 + ["stopped"]
        row = client.info("loop")
        assert (row["state"], row["starts"]) == ("stopped", 11)
        client.launch(["false"], name="loop", respawn=True)
        assert next(events).name == "started"


def test_maitred_comes_back_and_nothing_else_notices(pid_one: PidOne) -> None:
    with pid_one.client() as client, pid_one.client() as follower:
        events = follower.events()
        before = client.launch(["sleep", "1000"], name="s", respawn=True)
        client.signal("maitred", "SIGKILL")
        assert [(event.name, event.key) for event in (next(events), next(events))] == [
            ("started", "s"),
            ("exited", "maitred"),
        ]
        while next(events).name != "started":
            pass
        assert client.info("maitred")["starts"] == 2
        assert client.info("s")["pid"] == before.pid


def test_a_thousand_waits_at_once_cost_no_thread(pid_one: PidOne) -> None:
    async def wait_for_all() -> None:
        async with await AsyncClient.connect(str(pid_one.run_dir)) as client:
            gate = await client.launch(["sleep", "1000"], name="gate")
            waits = [asyncio.create_task(client.wait(gate.key)) for _ in range(1000)]
            shells = [
                asyncio.create_task(client.launch(["sh", "-c", f"exit {n % 256}"], wait=True))
                for n in range(1000)
            ]
            codes = [launched.exit for launched in await asyncio.gather(*shells)]
            assert codes == [Exit("exited", n % 256) for n in range(1000)]
            assert pid_one.threads() == 1
            await client.signal(gate.key, "SIGTERM")
            assert set(await asyncio.gather(*waits)) == {Exit("signaled", signal.SIGTERM)}

    asyncio.run(wait_for_all())
    assert pid_one.zombies() == []


def test_a_cancelled_wait_is_forgotten(pid_one: PidOne) -> None:
    async def cancel() -> None:
        async with await AsyncClient.connect(str(pid_one.run_dir)) as client:
            await client.launch(["sleep", "1000"], name="s")
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.wait("s"), 0.05)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.launch(["sleep", "1000"], name="t", wait=True), 0.05)
            assert (await client.info("t"))["state"] == "running"
            await client.stop("s")

    asyncio.run(cancel())


def test_stop_and_start(pid_one: PidOne) -> None:
    with pid_one.client() as client:
        client.launch(["sleep", "1000"], name="s", respawn=True)
        client.stop("s")
        row = client.info("s")
        assert (row["state"], row["last_exit"]["code"]) == ("stopped", signal.SIGTERM)
        with pytest.raises(SupervisorError, match="cannot signal s: it is stopped"):
            client.signal("s", "SIGHUP")
        assert client.start("s").state == "running"
        with pytest.raises(SupervisorError, match="cannot start s: it is running"):
            client.start("s")
        with pytest.raises(SupervisorError, match="cannot stop x: there is no such process"):
            client.stop("x")


def raw(pid_one: PidOne) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(20)
    connection.connect(str(pid_one.run_dir / "supervisor.sock"))
    return connection


@pytest.mark.parametrize(
    "garbage",
    [
        b"\n\n\n",
        b"\0\xff\xfe garbage\n",
        b"[]\n",
        b"{}\n",
        b'{"v":1,"id":true,"op":"list"}\n',
        b'{"v":2,"id":1,"op":"list"}\n',
        b'{"v":1,"id":1,"op":["list"]}\n',
        b'{"v":1,"id":1,"op":"explode"}\n',
        b'{"v":1,"id":1,"op":"wait","key":{}}\n',
        b'{"v":1,"id":1,"op":"launch","argv":"true"}\n',
        b'{"v":1,"id":1,"op":"signal","key":"maitred","signal":[]}\n',
        b"[" * 60000 + b"\n",
    ],
)
def test_garbage_is_refused_and_the_connection_goes_on(pid_one: PidOne, garbage: bytes) -> None:
    with raw(pid_one) as connection:
        connection.sendall(garbage)
        reader = connection.makefile("rb")
        for _ in range(garbage.count(b"\n")):
            assert b'"ok":false' in reader.readline()
        connection.sendall(b'{"v":1,"id":2,"op":"list"}\n')
        assert b'"ok":true' in reader.readline()
        reader.close()


def test_clients_that_misbehave_harm_nobody(pid_one: PidOne) -> None:
    with raw(pid_one) as endless, raw(pid_one) as half, raw(pid_one) as deaf, raw(pid_one) as flood:
        half.sendall(b'{"v":1,"id":1,"op":"li')
        deaf.sendall(b'{"v":1,"id":1,"op":"events"}\n')
        flood.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:  # until PID 1 no longer reads, as nobody reads its answers
                flood.send(b'{"v":1,"id":1,"op":"list"}\n' * 100)
        endless.sendall(b"x" * 70000)
        assert b"E2BIG" in endless.recv(65536)
        with pid_one.client() as client:
            for _ in range(200):
                assert client.launch(["true"], wait=True).exit == Exit("exited", 0)
            assert client.info("maitred")["state"] == "running"
    wait_until("they are gone", lambda: pid_one.open_files() <= 9)


def test_one_that_follows_events_but_never_reads_is_dropped(pid_one: PidOne) -> None:
    with raw(pid_one) as deaf, pid_one.client() as client:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        deaf.sendall(b'{"v":1,"id":1,"op":"events"}\n' * 8)
        name = "n" * 200
        client.launch(["sleep", "1000"], name=name)

        def dropped() -> bool:
            for _ in range(100):
                client.stop(name)
                client.start(name)
            return "that does not read" in pid_one.console()

        wait_until("it is dropped", dropped, timeout=60)
        assert client.info(name)["state"] == "running"


def test_list_comes_in_pages(pid_one: PidOne) -> None:
    with pid_one.client() as client:
        for number in range(300):
            client.launch(["sh", "-c", "exec sleep 1000", "x" * 400], name=f"s{number}")
        keys = [row["key"] for row in client.list()]
    assert keys == ["maitred", *(f"s{number}" for number in range(300))]


def test_sigterm_ends_it_with_0(pid_one: PidOne) -> None:
    os.kill(pid_one.pid, signal.SIGTERM)
    assert pid_one.wait() == 0
    assert pid_one.console().splitlines()[-1].endswith("init: exit: clean")
    with pytest.raises(SupervisorGone, match="cannot connect to"), pid_one.client():
        pass


def test_as_a_subreaper_it_ends_only_its_own(tmp_path: Path) -> None:
    # In a PID namespace still, but not as its PID 1: a shell is that, with a child of its own.
    words = f"maitred.setup=no maitred.run_dir={tmp_path}/run maitred.command={tmp_path}/m.sh"
    (tmp_path / "m.sh").write_text("#!/bin/sh\n(sleep 1000 &)\nexec sleep 1000\n")
    (tmp_path / "m.sh").chmod(0o755)
    supervisor = f"{sys.executable} -m agent.process_supervisor {words}"
    script = f"sleep 999 & {supervisor} & wait $!; echo $?; jobs -l"
    with subprocess.Popen(
        [*UNSHARE, "bash", "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=REPOSITORY,
    ) as shell:
        watchdog = threading.Timer(30, shell.kill)
        watchdog.start()
        path = tmp_path / "run/supervisor.sock"
        wait_until("the socket is there", path.exists)
        with PidOne.connect(tmp_path / "run") as client:
            client.launch(["sh", "-c", "(sleep 0.01 &)"], wait=True)
            wait_until(
                "orphans are taken", lambda: client.request("list")["supervisor"]["orphans"] >= 1
            )
            client.shutdown("test")
        output, _ = shell.communicate()
        watchdog.cancel()
    assert output.startswith(b"0\n")
    assert b"Running" in output


def test_a_maitred_that_cannot_be_executed_is_tried_again(tmp_path: Path) -> None:
    command = tmp_path / "maitred"
    words = ["maitred.setup=no", f"maitred.run_dir={tmp_path}/run", f"maitred.command={command}"]
    with subprocess.Popen(
        [*UNSHARE, sys.executable, "-m", "agent.process_supervisor", *words],
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    ) as running:
        assert running.stderr
        assert "No such file or directory" in running.stderr.readline()
        command.write_text("#!/bin/sh\nexec sleep 1000\n")
        command.chmod(0o755)
        assert "maitred started" in running.stderr.readline()
        running.kill()
