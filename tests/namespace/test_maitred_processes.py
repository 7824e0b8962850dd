"""LaunchProcess, startup files, VmReady, crash reports and Shutdown with the real PID 1."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import struct
from pathlib import Path

import grpc
import pytest

from agent.pb import vm_guest_pb2
from tests.namespace.vm_in_namespaces import EMPTY, ROOT, Vm, in_vm, refusal

_LIBC = ctypes.CDLL(None, use_errno=True)
_PIDFD_GETFD = 438  # pidfd_getfd(2), the same on every architecture

Request = vm_guest_pb2.LaunchProcessRequest


async def _launch(vm: Vm, *argv: str, **fields: object) -> tuple[str, int]:
    request = Request(argv=argv, **fields)  # type: ignore[arg-type]  # any of its fields
    response = await vm.maitred.LaunchProcess(request)
    return vm_guest_pb2.ProcessStatus.Name(response.status), response.code


def test_the_end_of_a_process_is_told(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        assert await _launch(vm, "sh", "-c", "exit 7", wait_for_exit=True) == ("EXITED", 7)
        assert await _launch(vm, "/bin/true", wait_for_exit=True) == ("EXITED", 0)
        killed = await _launch(vm, "sh", "-c", "kill -9 $$", wait_for_exit=True)
        assert killed == ("SIGNALED", 9)
        assert await _launch(vm, "sleep", "1000") == ("LAUNCHED", 0)

    in_vm(tmp_path, scenario)


def _elf_with_interpreter_at(offset: int) -> bytes:
    """Of a program, elf(5), as much as the kernel looks at before it opens the interpreter. From
    beyond 2^63 nothing can be read: execve(2) gives EINVAL.
    """
    program_header = struct.pack("<IIQQQQQQ", 3, 4, offset, 0, 0, 10, 10, 1)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        *(b"\x7fELF\x02\x01\x01", 2, 62, 1, 0, 64, 0, 0, 64, len(program_header), 1, 0, 0, 0),
    )
    return header + program_header


def test_what_cannot_be_executed_has_failed(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("no program")
    broken = tmp_path / "broken"
    broken.write_bytes(_elf_with_interpreter_at(1 << 63))
    broken.chmod(0o755)

    async def scenario(vm: Vm) -> None:
        for argv0 in (
            *("no-such-program", "/no/such/program", os.path.relpath("/usr/bin/true", ROOT)),
            *(str(plain), str(tmp_path), str(broken)),
        ):
            for fields in ({}, {"wait_for_exit": True}, {"respawn": True}):
                status, _ = await _launch(vm, argv0, **fields)
                assert status == "FAILED", (argv0, fields)

    in_vm(tmp_path, scenario)


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    bad = [
        (Request(), "argv is empty"),
        (Request(argv=["", "x"]), "argv is empty"),
        (Request(argv=["true"], respawn=True, wait_for_exit=True), "exclude each other"),
        (Request(argv=["true", "a\0b"]), "NUL"),
        (Request(argv=["true"], env={"A=B": "c"}), "env"),
        (Request(argv=["true", "x" * 100_000]), "longer than"),
    ]

    async def scenario(vm: Vm) -> None:
        for request, why in bad:
            code, details = await refusal(vm.maitred.LaunchProcess(request))
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert why in details
        assert len(vm.processes()) == 1

    in_vm(tmp_path, scenario)


def test_arguments_and_environment_arrive_and_the_session_is_its_own(tmp_path: Path) -> None:
    out = tmp_path / "out"

    async def scenario(vm: Vm) -> None:
        script = f'echo "$1|$A|$PATH" >{out}; ps -o pid=,sid= -p $$ >>{out}'
        answer = await _launch(
            vm, "sh", "-c", script, "sh", "ä b", env={"A": "x=y ü"}, wait_for_exit=True
        )
        assert answer == ("EXITED", 0)
        first, second = out.read_text().splitlines()
        assert first == "ä b|x=y ü|/usr/bin:/usr/sbin:/bin:/sbin"
        pid, sid = second.split()
        assert pid == sid

    in_vm(tmp_path, scenario)


def test_many_calls_wait_at_once(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        fifo = tmp_path / "go"
        os.mkfifo(fifo)
        calls = [
            asyncio.ensure_future(
                _launch(vm, "sh", "-c", f"read x <{fifo}; exit {n % 100}", wait_for_exit=True)
            )
            for n in range(200)
        ]
        async with asyncio.timeout(60):
            while len(vm.processes()) < 201:
                assert await _launch(vm, "true", wait_for_exit=True) == ("EXITED", 0)
        writer = os.open(fifo, os.O_WRONLY)
        os.write(writer, b"x\n" * 200)
        answers = await asyncio.wait_for(asyncio.gather(*calls), 60)
        os.close(writer)
        # A read on a fifo that another reader emptied sees its end when we close: also an exit.
        assert answers == [("EXITED", n % 100) for n in range(200)]

    in_vm(tmp_path, scenario)


def test_a_caller_that_goes_leaves_the_process_alone(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        call = vm.maitred.LaunchProcess(Request(argv=["sleep", "1000"], wait_for_exit=True))
        await vm.pids_of("sleep")
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await _launch(vm, "true", wait_for_exit=True) == ("EXITED", 0)
        assert vm.pid_of("sleep")

    in_vm(tmp_path, scenario)


def test_when_maitred_is_killed_processes_stay_and_vm_ready_is_not_sent_again(
    tmp_path: Path,
) -> None:
    (tmp_path / "startup").mkdir()
    (tmp_path / "startup" / "a.textproto").write_text('argv: "sleep" argv: "2000" respawn: true')

    async def scenario(vm: Vm) -> None:
        await _launch(vm, "sleep", "1000", respawn=True)
        sleeps = await vm.pids_of("1000", "2000")
        async with asyncio.timeout(20):
            while "the host knows" not in vm.console.read_text():
                await asyncio.sleep(0.01)
        await vm.restart_maitred()
        assert [vm.pid_of("1000"), vm.pid_of("2000")] == sleeps
        assert vm.host.ready == 1

    in_vm(tmp_path, scenario)


def test_a_host_may_make_its_calls_from_inside_vm_ready(tmp_path: Path) -> None:
    async def scenario() -> None:
        vm = Vm(tmp_path)

        async def call() -> None:
            assert await _launch(vm, "sh", "-c", "exit 7", wait_for_exit=True) == ("EXITED", 7)
            assert await _launch(vm, "sleep", "1000", respawn=True) == ("LAUNCHED", 0)

        vm.host.inside_vm_ready = call
        async with vm:
            assert vm.pid_of("1000")
            assert vm.host.ready == 1

    asyncio.run(scenario())


def test_startup_files_run_in_order_and_bad_ones_are_passed_over(tmp_path: Path) -> None:
    startup, out = tmp_path / "startup", tmp_path / "out"
    startup.mkdir()
    for name, text in {
        "b": f'argv: "sh" argv: "-c" argv: "echo b >>{out}" wait_for_exit: true',
        "a": f'argv: "sh" argv: "-c" argv: "echo a >>{out}" wait_for_exit: true',
        "c": "this is no request",
        "d": "wait_for_exit: true",
        "e": 'argv: "/no/such/program"',
        "z": f'argv: "touch" argv: "{tmp_path}/last"',
    }.items():
        (startup / f"{name}.textproto").write_text(text)
    (startup / "ignored.txt").write_text("not ours")

    async def scenario(vm: Vm) -> None:
        async with asyncio.timeout(20):
            while not (tmp_path / "last").exists():
                await asyncio.sleep(0.01)
        assert out.read_text() == "a\nb\n"
        console = vm.console.read_text()
        for name in ("c", "d"):
            assert f"startup file {name}.textproto: cannot" in console
        assert "startup file e.textproto: failed" in console

    in_vm(tmp_path, scenario)


def test_startup_files_can_have_less_than_full_root(tmp_path: Path) -> None:
    startup = tmp_path / "startup"
    startup.mkdir()
    out = tmp_path / "out"
    for name, options in {
        "a": '{"no_new_privs": true, "capabilities": ["chown"], "rlimits": {"nofile": [77, 77]}}',
        "b": '{"no_new_privs": "true"}',
        "c": '{"argv": ["other"]}',
        "d": "no JSON",
    }.items():
        script = f"(grep -E 'NoNewPrivs|CapBnd' /proc/self/status; ulimit -n) >{out}.{name}"
        text = f'argv: "sh" argv: "-c" argv: "{script}" wait_for_exit: true'
        (startup / f"{name}.textproto").write_text(text)
        (startup / f"{name}.json").write_text(options)
    (startup / "z.textproto").write_text(f'argv: "touch" argv: "{tmp_path}/last"')

    async def scenario(vm: Vm) -> None:
        async with asyncio.timeout(20):
            while not (tmp_path / "last").exists():
                await asyncio.sleep(0.01)
        lines = Path(f"{out}.a").read_text().split()
        assert lines == ["CapBnd:", "0000000000000001", "NoNewPrivs:", "1", "77"]
        # One whose confinement cannot be read is not launched without it.
        for name in ("b", "c", "d"):
            assert not Path(f"{out}.{name}").exists()
            assert f"startup file {name}.textproto: cannot" in vm.console.read_text()

    in_vm(tmp_path, scenario)


def test_startup_files_can_be_turned_off(tmp_path: Path) -> None:
    (tmp_path / "startup").mkdir()
    (tmp_path / "startup" / "a.textproto").write_text('argv: "sleep" argv: "2000"')

    async def scenario(vm: Vm) -> None:
        await _launch(vm, "true", wait_for_exit=True)
        assert len(vm.processes()) == 1

    in_vm(tmp_path, scenario, options=["maitred.no_startup_processes"])


async def _report_on(vm: Vm, word: str) -> str:
    """Kills the process with this word in its command line until the host is told something:
    reports begin some time after VmReady, and after a connection to PID 1 is lost.
    """
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(ValueError):  # it is not there, or not yet again
                os.kill(vm.pid_of(word), signal.SIGSEGV)
            with contextlib.suppress(TimeoutError):
                return await asyncio.wait_for(vm.host.crashes.get(), 1)


def test_the_end_of_a_respawning_process_is_reported_by_its_name_only(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        await _launch(vm, "/bin/sleep", "1000", respawn=True)
        assert await _report_on(vm, "1000") == "sleep"

    in_vm(tmp_path, scenario)


def test_our_own_program_is_reported_by_what_it_is(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        assert await _report_on(vm, "agent.log_forwarder") == "log-forwarder"

    in_vm(tmp_path, scenario, options=[f"maitred.log_collector=unix:{tmp_path}/host.sock"])


def _cut_off_from_pid_1(vm: Vm) -> int:
    """Ends the connections that maitred has to PID 1; how many they were."""
    maitred = vm.pid_of("agent.maitred")
    peer = str(vm.run_dir / "supervisor.sock")
    pidfd = os.pidfd_open(maitred)
    cut = 0
    for number in os.listdir(f"/proc/{maitred}/fd"):
        try:
            if not os.readlink(f"/proc/{maitred}/fd/{number}").startswith("socket:"):
                continue
        except FileNotFoundError:
            continue
        descriptor = _LIBC.syscall(_PIDFD_GETFD, pidfd, int(number), 0)
        assert descriptor >= 0, os.strerror(ctypes.get_errno())
        with socket.socket(fileno=descriptor) as theirs:
            try:
                is_to_pid_1 = theirs.getpeername() == peer
            except OSError:
                continue
            if is_to_pid_1:
                theirs.shutdown(socket.SHUT_RDWR)
                cut += 1
    os.close(pidfd)
    return cut


def test_a_lost_connection_to_pid_1_is_made_again(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        await _launch(vm, "sleep", "1000", respawn=True)
        await _launch(vm, "tail", "-f", "/dev/null", respawn=True)
        assert await _report_on(vm, "1000") == "sleep"
        assert _cut_off_from_pid_1(vm) == 2  # for calls, and for crash reports
        while await _report_on(vm, "tail") != "tail":
            pass  # one on the other that came late
        assert await _launch(vm, "true", wait_for_exit=True) == ("EXITED", 0)

    in_vm(tmp_path, scenario)


def test_shutdown_is_answered_and_then_done(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        await _launch(vm, "sleep", "1000", respawn=True)
        await vm.maitred.Shutdown(EMPTY)
        assert await asyncio.to_thread(vm.process.wait, 30) == 0
        assert vm.console.read_text().splitlines()[-1].endswith("init: exit: clean")

    in_vm(tmp_path, scenario)


def test_a_waiting_call_ends_unavailable_when_pid_1_goes(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        call = asyncio.ensure_future(_launch(vm, "sleep", "1000", wait_for_exit=True))
        await vm.pids_of("sleep")
        vm.process.kill()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(call, 20)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE

    in_vm(tmp_path, scenario)


def test_sigterm_ends_maitred_cleanly(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        os.kill(vm.pid_of("agent.maitred"), signal.SIGTERM)
        async with asyncio.timeout(20):
            while "maitred exited: status exited, code 0" not in vm.console.read_text():
                await asyncio.sleep(0.01)

    in_vm(tmp_path, scenario)
