"""The remote shell as maitred starts it, with the host's own client and with bare frames."""

from __future__ import annotations

import asyncio
import os
import signal
import struct
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from agent.pb import vsh_pb2
from host import shell
from tests.namespace.vm_in_namespaces import PRIVATE_FILES, Vm, in_vm


def _in_vm(
    directory: Path, scenario: Callable[[Vm], Coroutine[Any, Any, None]], *, before: str = ""
) -> None:
    listen = f"maitred.shell_listen=unix:{directory}/shell.sock"
    in_vm(directory, scenario, before=before, options=[listen])


async def _connect(vm: Vm) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    path = vm.directory / "shell.sock"
    async with asyncio.timeout(30):
        while True:
            try:
                return await asyncio.open_unix_connection(str(path))
            except (FileNotFoundError, ConnectionRefusedError):
                await asyncio.sleep(0.01)


def _request(*argv: str, pty: bool = False, **fields: Any) -> vsh_pb2.SetupConnectionRequest:
    return vsh_pb2.SetupConnectionRequest(argv=argv, nopty=not pty, **fields)


async def _open(vm: Vm, *argv: str, pty: bool = False, **fields: Any) -> shell.Session:
    return await shell.open_session(await _connect(vm), _request(*argv, pty=pty, **fields))


async def _result(session: shell.Session) -> tuple[int, bytes, bytes]:
    outputs = {1: bytearray(), 2: bytearray()}
    async with asyncio.timeout(60):
        async for item in session.output():
            if isinstance(item, int):
                await session.close()
                return item, bytes(outputs[1]), bytes(outputs[2])
            outputs[item[0]] += item[1]
    raise AssertionError("no exit code")


async def _run(vm: Vm, *argv: str, **fields: Any) -> tuple[int, bytes, bytes]:
    return await _result(await _open(vm, *argv, **fields))


def test_output_errors_and_exit_codes(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        assert await _run(vm, "sh", "-c", "echo out; echo err >&2; exit 7") == (
            7,
            b"out\n",
            b"err\n",
        )
        assert (await _run(vm, "sh", "-c", "kill -9 $$"))[0] == 137
        assert await _run(vm, command="echo $((6 * 7))") == (0, b"42\n", b"")
        code, out, _ = await _run(vm, "seq", "200000")
        assert (code, out) == (0, b"".join(b"%d\n" % n for n in range(1, 200001)))

    _in_vm(tmp_path, scenario)


def test_input_and_its_end(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        data = os.urandom(3_000_000)
        session = await _open(vm, "cat")

        async def feed() -> None:
            await session.send_input(data)
            await session.send_input(b"")

        feeding = asyncio.create_task(feed())
        assert await _result(session) == (0, data, b"")
        await feeding

    _in_vm(tmp_path, scenario)


def test_a_process_that_does_not_read_slows_the_host_down(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        connection = await _connect(vm)
        session = await shell.open_session(connection, _request("sleep", "1000"))
        feeding = asyncio.create_task(session.send_input(bytes(8_000_000)))
        done, _ = await asyncio.wait({feeding}, timeout=0.3)
        assert not done, "8 MB went somewhere although nobody reads them"
        feeding.cancel()
        # A host that vanishes now is noticed all the same.
        connection[1].transport.abort()
        async with asyncio.timeout(20):
            while _in_session(vm, session.pid):
                await asyncio.sleep(0.05)

    _in_vm(tmp_path, scenario)


def test_a_terminal_its_size_and_its_signals(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        script = (
            "trap 'echo got-int' INT; trap 'stty size; exit 3' WINCH; test -t 0 && tty;"
            "stty size; stty -echo; echo ready; while :; do sleep 0.05; done"
        )
        session = await _open(
            vm, "sh", "-c", script, pty=True, window_rows=40, window_cols=100, env={"TERM": "x"}
        )
        seen = b""
        async with asyncio.timeout(60):
            async for item in session.output():
                if isinstance(item, int):
                    assert item == 3
                    break
                before, seen = seen, seen + item[1]
                if b"ready" in seen and b"ready" not in before:
                    await session.send_input(b"\x03")
                if b"got-int" in seen and b"got-int" not in before:
                    session.resize(rows=50, columns=120)
        await session.close()
        assert b"/dev/pts/" in seen
        assert b"40 100" in seen
        assert seen.rstrip().endswith(b"50 120")

    _in_vm(tmp_path, scenario)


def test_a_login_shell_in_a_terminal(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        session = await _open(vm, pty=True, window_rows=24, window_cols=80, env={"TERM": "dumb"})
        await session.send_input(b"echo $0 $HOME; exit 5\n")
        code, out, _ = await _result(session)
        assert code == 5
        assert b"-" in out
        assert b"/root" in out

    _in_vm(tmp_path, scenario)


def test_user_directory_and_environment(tmp_path: Path) -> None:
    script = 'id -un; id -Gn; pwd; echo "$HOME|$USER|$A"'

    async def scenario(vm: Vm) -> None:
        code, out, err = await _run(
            vm, "sh", "-c", script, user="games", cwd="/usr/share", env={"A": "ä b"}
        )
        assert (code, err) == (0, b"")
        assert out.decode().splitlines() == [
            "games",
            "games",
            "/usr/share",
            "/usr/games|games|ä b",
        ]
        sleeper = await _open(vm, "sleep", "1000", cwd="/var/lib")
        code, out, _ = await _run(vm, "pwd", cwd_pid=sleeper.pid)
        assert out == b"/var/lib\n"
        await sleeper.close()
        # A terminal belongs to who sits at it.
        code, out, _ = await _run(vm, "sh", "-c", 'stat -c %U "$(tty)"', user="games", pty=True)
        assert out.strip() == b"games"

    _in_vm(tmp_path, scenario, before=PRIVATE_FILES.replace("mount --rbind /run/dev /dev", ":"))


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"argv": ["no-such-program"]}, "cannot execute 'no-such-program': No such file"),
        ({"argv": ["true"], "user": "nobodyhere"}, "there is no such user"),
        ({"argv": ["true"], "cwd": "/no/such/place"}, "there is no directory '/no/such/place'"),
        ({"argv": ["true"], "target": "elsewhere"}, "there is no target 'elsewhere'"),
        ({"argv": ["a\0b"]}, "cannot execute"),
    ],
)
def test_what_cannot_be_is_said(tmp_path: Path, fields: dict[str, Any], why: str) -> None:
    async def scenario(vm: Vm) -> None:
        for nopty in (True, False):
            request = vsh_pb2.SetupConnectionRequest(nopty=nopty, **fields)
            with pytest.raises(shell.ShellError, match="cannot open a shell") as caught:
                await shell.open_session(await _connect(vm), request)
            assert why in str(caught.value)

    _in_vm(tmp_path, scenario)


def test_signals_without_a_terminal(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        session = await _open(vm, "sh", "-c", "trap 'exit 9' TERM; echo up; sleep 1000 & wait")
        async for item in session.output():
            if isinstance(item, int):
                assert item == 9
                break
            session.send_signal(signal.SIGTERM)
        await session.close()

    _in_vm(tmp_path, scenario)


def _in_session(vm: Vm, session: int) -> list[str]:
    text = vm.inside("ps", "-e", "-o", "sid=,stat=,args=")
    rows = [line.split(None, 2) for line in text.splitlines()]
    return [row[2] for row in rows if row[0] == str(session) and not row[1].startswith("Z")]


@pytest.mark.parametrize("pty", [True, False])
def test_a_host_that_vanishes_ends_all_of_its_session(tmp_path: Path, pty: bool) -> None:
    async def scenario(vm: Vm) -> None:
        script = "trap '' HUP; sleep 1001 & (trap '' HUP TERM; sleep 1002) & echo up; sleep 1003"
        session = await _open(vm, "sh", "-c", script, pty=pty)
        async for item in session.output():
            assert isinstance(item, tuple)
            break
        assert len(_in_session(vm, session.pid)) >= 3
        await session.close()
        async with asyncio.timeout(20):
            while _in_session(vm, session.pid):
                await asyncio.sleep(0.05)
        assert await _run(vm, "echo", "still here") == (0, b"still here\n", b"")

    _in_vm(tmp_path, scenario)


def test_a_hundred_sessions_at_once(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        sessions = [await _open(vm, "sh", "-c", f"read x; echo {n} $x") for n in range(50)]
        sessions += [
            await _open(vm, "sh", "-c", f"stty -echo; echo up; read x; echo {n} $x", pty=True)
            for n in range(50, 100)
        ]
        for session in sessions:
            await session.send_input(b"hello\n")
        results = await asyncio.gather(*(_result(session) for session in sessions))
        for number, (code, out, _) in enumerate(results):
            assert code == 0
            assert f"{number} hello".encode() in out

    _in_vm(tmp_path, scenario)


def test_what_is_left_in_the_background_does_not_hold_up_the_end(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        assert await _run(vm, "sh", "-c", "sleep 1000 & echo done") == (0, b"done\n", b"")

    _in_vm(tmp_path, scenario)


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<I", 5000) + bytes(5000),
        struct.pack("<I", 4) + b"\xff\xff\xff\xff",
        os.urandom(64),
    ],
    ids=["too long", "no message", "noise"],
)
def test_what_is_no_frame_ends_the_connection_only(tmp_path: Path, data: bytes) -> None:
    async def scenario(vm: Vm) -> None:
        reader, writer = await _connect(vm)
        writer.write(data)
        writer.write_eof()
        try:
            await asyncio.wait_for(reader.read(), 20)
        except ConnectionError:
            pass
        writer.close()
        assert await _run(vm, "echo", "still here") == (0, b"still here\n", b"")

    _in_vm(tmp_path, scenario)
