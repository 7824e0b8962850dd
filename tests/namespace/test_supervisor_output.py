"""What processes print: kept, followed, forwarded to the log, and never in PID 1's way."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.process_supervisor.client import Exit
from agent.process_supervisor.loop import Loop
from agent.process_supervisor.output import RING, Outputs, Ring, SystemLog
from tests.namespace.pid_one import PidOne, wait_until


@pytest.fixture
def pid_one(tmp_path: Path) -> Iterator[PidOne]:
    with PidOne(tmp_path) as running:
        yield running


def test_the_output_is_there_when_the_exit_is_known(pid_one: PidOne) -> None:
    with pid_one.client() as client:
        for _ in range(50):
            launched = client.launch(["sh", "-c", "echo out; echo err >&2; printf end"], wait=True)
            assert client.output(launched.key)[1] == b"out\nerr\nend"


def test_the_last_64_kib_are_kept_over_respawns(pid_one: PidOne) -> None:
    script = "head -c 40000 /dev/zero | tr '\\0' x; echo; echo run"
    with pid_one.client() as client:
        for _ in range(3):
            client.launch(["sh", "-c", script], name="printer", wait=True)
        end, output = client.output("printer")
        assert end == 3 * 40005
        assert len(output) == RING
        assert output.count(b"run") == 2
        assert output.endswith(b"x\nrun\n")


def test_what_is_printed_can_be_followed(pid_one: PidOne) -> None:
    with pid_one.client() as client, pid_one.client() as follower:
        events = follower.events(output=True)
        client.launch(["sh", "-c", "echo one; echo two"], name="p")
        printed = b""
        while printed != b"one\ntwo\n":
            event = next(events)
            if event.name == "output":
                assert event.key == "p"
                printed += event.output()


def test_one_that_prints_without_end_harms_nobody(pid_one: PidOne) -> None:
    with pid_one.client() as client:
        client.launch(["yes", "x" * 100], name="yes")
        wait_until("it prints", lambda: client.output("yes")[0] > 1024 * 1024)
        for _ in range(50):
            assert client.launch(["true"], wait=True).exit == Exit("exited", 0)
        client.stop("yes")
        assert client.info("yes")["last_exit"]["status"] == "signaled"


def test_a_daemon_keeps_its_pipe_after_its_parent_has_ended(
    pid_one: PidOne, tmp_path: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pid_one.client() as client:
        script = "echo parent; (read line <$FIFO; echo daemon; echo done >$FIFO) & exit 0"
        launched = client.launch(["sh", "-c", script], env={"FIFO": str(fifo)}, wait=True)
        assert launched.exit == Exit("exited", 0)
        fifo.write_text("go\n")
        assert fifo.read_text() == "done\n"
        wait_until("it is kept", lambda: client.output(launched.key)[1] == b"parent\ndaemon\n")


def test_lines_go_to_the_log_with_the_name(tmp_path: Path) -> None:
    path = str(tmp_path / "log")
    loop = Loop()
    log = SystemLog(path)
    log.write("p", 1, b"nobody is there")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(path)
        server.settimeout(10)
        outputs = Outputs(loop, log=log.write, follower=lambda _pipe, _data: None)
        pair = outputs.open()
        assert pair
        reader, writer = pair
        outputs.follow(reader, Ring(), "dhclient#7", 42)
        os.write(writer, b"first\nsecond, in ")
        loop.turn()
        os.write(writer, b"two parts\n" + b"x" * 3000 + b"\nlast, without line feed")
        loop.turn()
        os.close(writer)
        while outputs.pipes:
            loop.turn()
        lines = [server.recv(8192) for _ in range(5)]
    log.close()
    assert all(line.startswith(b"<30>") and b" dhclient#7[42]: " in line for line in lines)
    texts = [line.partition(b"]: ")[2] for line in lines]
    assert texts[:2] == [b"first", b"second, in two parts"]
    assert [len(text) for text in texts[2:4]] == [2048, 952]
    assert texts[4] == b"last, without line feed"


def test_when_descriptors_run_out_processes_start_without(pid_one: PidOne) -> None:
    with pid_one.client() as client:
        import resource

        resource.prlimit(pid_one.pid, resource.RLIMIT_NOFILE, (100, 100))
        # The reserve was reckoned from the limit at the start, so this meets EMFILE itself.
        for number in range(150):
            client.launch(["sleep", "1000"], name=f"s{number}")
        assert client.launch(["true"], wait=True).exit == Exit("exited", 0)
        assert len(client.list()) == 152
