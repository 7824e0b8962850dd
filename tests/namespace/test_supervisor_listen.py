"""Listening sockets that belong to PID 1: who connects is served, now or by the next process."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from agent.listening import VARIABLE
from agent.pb import vm_guest_pb2_grpc
from agent.process_supervisor.client import Client, Exit, SupervisorError
from tests.namespace.pid_one import PidOne, wait_until
from tests.namespace.vm_in_namespaces import EMPTY, Vm, in_vm

_SERVER = f"""
import os, socket
from agent.listening import inherited
sockets = [socket.socket(fileno=fd) for fd in inherited().values()]
assert not any(os.get_blocking(each.fileno()) for each in sockets)
os.system("echo $(ls /proc/self/fd | wc -w) ${{{VARIABLE}-unset}}")
sockets[0].setblocking(True)
while True:
    peer, _ = sockets[0].accept()
    peer.sendall(b"%d %s" % (os.getpid(), peer.recv(100)))
    peer.close()
"""


@pytest.fixture
def pid_one(tmp_path: Path) -> Iterator[PidOne]:
    with PidOne(tmp_path) as running:
        yield running


@pytest.fixture
def client(pid_one: PidOne) -> Iterator[Client]:
    with pid_one.client() as client:
        yield client


@pytest.fixture
def path(tmp_path: Path, client: Client) -> Path:
    """Where a server named s listens."""
    path = tmp_path / "s.sock"
    argv = [sys.executable, "-c", _SERVER]
    client.launch(argv, name="s", respawn=True, backoff=True, listen=[f"unix:{path}"])
    return path


def call(path: Path, word: bytes) -> socket.socket:
    """A connection that has said a word."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(20)
    connection.connect(str(path))
    connection.sendall(word)
    return connection


def answer(connection: socket.socket) -> tuple[int, bytes]:
    """Who has answered, and the word that was said."""
    with connection:
        text = b""
        while data := connection.recv(100):
            text += data
    pid, _, word = text.partition(b" ")
    return int(pid), word


def test_it_listens_before_its_process_does_and_is_private(path: Path, client: Client) -> None:
    pid, word = answer(call(path, b"early"))
    assert (pid, word) == (client.info("s")["pid"], b"early")
    assert path.stat().st_mode & 0o777 == 0o600
    assert client.info("s")["listen"] == [f"unix:{path}"]


def test_who_connects_while_it_is_away_is_served_by_the_next(
    pid_one: PidOne, path: Path, client: Client
) -> None:
    first, _ = answer(call(path, b"hello"))
    client.signal("s", "SIGSTOP")  # or it might accept in the moment before it is killed
    wait_until("it is suspended", lambda: "T" in pid_one.children().values())
    waiting = call(path, b"killed")
    client.signal("s", "SIGKILL")
    second, word = answer(waiting)
    assert word == b"killed"
    client.stop("s")
    waiting = call(path, b"stopped")
    third = client.start("s").pid
    assert answer(waiting) == (third, b"stopped")
    client.stop("s")
    waiting = call(path, b"upgraded")
    client.request("upgrade")
    fourth = client.start("s").pid
    assert answer(waiting) == (fourth, b"upgraded")
    assert len({first, second, third, fourth}) == 4


def test_nobody_else_has_the_sockets(pid_one: PidOne, path: Path, client: Client) -> None:
    answer(call(path, b"up"))
    # The shell that the server starts: three, and the directory that ls reads.
    wait_until("it has printed", lambda: client.output("s")[1])
    assert client.output("s")[1] == b"4 unset\n"
    for number in range(2):
        for options in ({}, {"user": "nobody"}):
            script = f"ls /proc/self/fd | wc -w; echo ${{{VARIABLE}-unset}}"
            other = client.launch(["sh", "-c", script], wait=True, **options)
            assert client.output(other.key)[1] == b"4\nunset\n"
        if not number:
            client.request("upgrade")
    maitred = next(pid for pid in pid_one.children() if "sleep" in _command(pid))
    listening = [
        os.readlink(f"/proc/{maitred}/fd/{fd}") for fd in os.listdir(f"/proc/{maitred}/fd")
    ]
    assert len([target for target in listening if target.startswith("socket:")]) == 1  # its own


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def test_one_with_less_than_full_root_gets_them_too(
    tmp_path: Path, pid_one: PidOne, client: Client
) -> None:
    # More of them than PID 1 has descriptors open where theirs come to lie.
    paths = [tmp_path / f"{number}.sock" for number in range(16)]
    client.launch(
        [sys.executable, "-c", _SERVER],
        name="confined",
        listen=[f"unix:{path}" for path in paths],
        capabilities=[],
        no_new_privs=True,
    )
    assert answer(call(paths[0], b"x"))[1] == b"x"
    with pytest.raises(SupervisorError, match="cannot launch /no/thing: No such file"):
        client.launch(
            ["/no/thing"],
            name="gone",
            listen=[f"unix:{tmp_path}/g{number}" for number in range(16)],
            capabilities=[],
        )
    assert not list(tmp_path.glob("g*"))


def test_what_cannot_be_listened_on_starts_nothing(
    tmp_path: Path, path: Path, client: Client
) -> None:
    taken = tmp_path / "taken"
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.bind(str(taken))
        stranger.listen()
        for listen, code, reason in (
            ([f"unix:{tmp_path}/free", f"unix:{taken}"], "EADDRINUSE", "Address already in use"),
            ([f"unix:{path}"], "EADDRINUSE", "PID 1 keeps it for s"),
            ([f"unix:{tmp_path}/no/x"], "ENOENT", "No such file or directory"),
            (["vsock:9999"], "EOPNOTSUPP", "maitred.listen is no vsock port here"),
            (["tcp:80"], "EINVAL", "not an address of the form vsock:PORT or unix:/path: 'tcp:80'"),
            ([f"unix:{tmp_path}/a"] * 2, "EINVAL", "listen has an address twice"),
        ):
            with pytest.raises(SupervisorError, match=f"cannot launch.*{reason}") as caught:
                client.launch(["true"], name="t", listen=listen)
            assert caught.value.code == code
            assert len(str(caught.value).splitlines()) == 1
        with pytest.raises(SupervisorError, match="listen needs a name"):
            client.launch(["true"], listen=[f"unix:{tmp_path}/free"])
    assert not (tmp_path / "free").exists()
    assert {row["key"] for row in client.list()} == {"maitred", "s"}
    client.launch(["true"], name="t", wait=True, listen=[f"unix:{taken}"])  # nobody's any more
    with pytest.raises(SupervisorError, match="that name runs something else"):
        client.launch([sys.executable, "-c", _SERVER], name="s", listen=[f"unix:{tmp_path}/other"])


def test_launched_again_with_other_addresses_it_has_only_those(
    tmp_path: Path, client: Client
) -> None:
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    client.launch(["true"], name="t", wait=True, listen=[f"unix:{one}", f"unix:{two}"])
    inode = two.stat().st_ino
    client.launch(["true"], name="t", wait=True, listen=[f"unix:{two}", f"unix:{three}"])
    assert (one.exists(), two.stat().st_ino, three.exists()) == (False, inode, True)
    row = client.info("t")
    with pytest.raises(SupervisorError, match="cannot launch /no/thing: No such file"):
        client.launch(["/no/thing"], name="t", listen=[f"unix:{one}", f"unix:{two}"])
    assert (one.exists(), two.stat().st_ino, three.exists()) == (False, inode, True)
    after = client.info("t")
    assert (after["argv"], after["listen"]) == (row["argv"], row["listen"])


def test_the_end_of_pid_1_is_the_end_of_the_sockets(pid_one: PidOne, path: Path) -> None:
    assert (pid_one.run_dir.parent / "maitred.sock").exists()
    os.kill(pid_one.pid, signal.SIGTERM)
    assert pid_one.wait() == 0
    assert not path.exists()
    assert not (pid_one.run_dir.parent / "maitred.sock").exists()
    assert "cannot" not in pid_one.console(), pid_one.console()


def test_a_call_made_while_maitred_is_away_is_answered_by_the_next(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        def new_call() -> tuple[grpc.aio.Channel, asyncio.Future[Any]]:
            # A host that has never spoken to the VM, and does not ask gRPC to wait.
            channel = grpc.aio.insecure_channel(
                f"unix:{tmp_path}/maitred.sock", options=[("grpc.use_local_subchannel_pool", 1)]
            )
            stub = vm_guest_pb2_grpc.MaitredStub(channel)
            return channel, asyncio.ensure_future(stub.GetKernelVersion(EMPTY, timeout=20))

        with Client.connect(str(vm.run_dir), timeout=20) as client:
            for _ in range(3):
                client.signal("maitred", "SIGKILL")
                channel, call = new_call()
                assert (await call).kernel_release
                await channel.close()
            await asyncio.to_thread(client.stop, "maitred")
            channel, call = new_call()
            await asyncio.sleep(0)
            client.start("maitred")
            assert (await call).kernel_release
            await channel.close()
            assert client.launch(["true"], wait=True).exit == Exit("exited", 0)

    in_vm(tmp_path, scenario)
