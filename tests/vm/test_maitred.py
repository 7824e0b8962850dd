"""What of maitred only a VM shows: vsock and who gets in, the clock, the kernel's log, and
the remote shell over vsock. One VM without containers.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator

import grpc
import grpc.aio
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from agent.pb import vm_guest_pb2, vm_host_pb2, vsh_pb2
from host import shell
from host.build_files import GuestImage
from host.commands import run_in_guest
from host.image_server import ImageServer
from host.vm import Vm
from tests.vm.vms import boot, new_vm

pytestmark = pytest.mark.timeout(240)

_KNOCK = """
import fcntl, socket, struct
with open("/dev/vsock", "rb") as device:
    (own,) = struct.unpack("I", fcntl.ioctl(device, 0x7B9, bytes(4)))
for port in (8888, 9001):
    for cid in (1, own):
        peer = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        peer.settimeout(10)
        try:
            peer.connect((cid, port))
            peer.send(b"PRI * HTTP/2.0")
            answer = peer.recv(100)
        except OSError:
            answer = b""
        print(cid, port, answer)
"""


@pytest.fixture(scope="module")
def vm(
    runner: asyncio.Runner,
    image: GuestImage,
    image_server: ImageServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Vm]:
    """A VM that has just said VmReady."""
    directory = tmp_path_factory.mktemp("maitred")
    stack = contextlib.AsyncExitStack()

    async def start() -> Vm:
        test_vm = await stack.enter_async_context(new_vm(image, directory, image_server))
        await boot(test_vm.vm)
        return test_vm.vm

    try:
        yield runner.run(start())
    finally:
        runner.run(stack.aclose())


async def _logged(vm: Vm, message: str) -> vm_host_pb2.LogRecord:
    """Has a program of the VM log this; its record, once it and all before it have arrived."""
    await run_in_guest(vm, ["logger", "-p", "daemon.warning", "-t", "test", message])
    content = f"test: {message}".encode()
    async with asyncio.timeout(60):
        await vm.recorder.wait_for_log(lambda record: record.content == content)
    found: list[vm_host_pb2.LogRecord]
    found = [record for record in vm.recorder.logs if record.content == content]
    assert len(found) == 1
    return found[0]


def test_the_kernel_and_programs_log_to_the_host(vm: Vm, runner: asyncio.Runner) -> None:
    """Both arrive, with their severities and times of today."""

    async def scenario() -> tuple[vm_host_pb2.LogRecord, vm_host_pb2.LogRecord]:
        async with asyncio.timeout(90):
            banner = await vm.recorder.wait_for_log(lambda one: b"Linux version" in one.content)
        return banner, await _logged(vm, "hello host")

    banner, hello = runner.run(scenario())
    assert hello.severity == vm_host_pb2.WARNING
    assert abs(hello.timestamp.seconds - time.time()) < 300
    assert banner.severity == vm_host_pb2.NOTICE
    assert abs(banner.timestamp.seconds - time.time()) < 300


def test_nobody_in_the_vm_gets_in_over_vsock(vm: Vm, runner: asyncio.Runner) -> None:
    """Neither maitred nor the shell answers a process of the VM, whichever CID it calls."""
    # Without this module a process of the VM cannot even knock.
    assert runner.run(run_in_guest(vm, ["modprobe", "vsock_loopback"])).code == 0
    done = runner.run(run_in_guest(vm, ["python3", "-I", "-c", _KNOCK], timeout=90))
    answers = [line.split(None, 2)[2] for line in done.output.splitlines()]
    assert answers == ["b''"] * 4, done.output
    assert "refused a connection to vsock:8888 from CID" in vm.console.text


def test_the_clock_is_set(vm: Vm, runner: asyncio.Runner) -> None:
    """To the nanosecond; and not to the epoch."""

    async def scenario() -> None:
        then = int(time.time()) + 3 * 86_400
        request = vm_guest_pb2.SetTimeRequest(time=Timestamp(seconds=then, nanos=5))
        await vm.maitred.SetTime(request)
        done = await run_in_guest(vm, ["date", "+%s"])
        assert 0 <= int(done.output) - then < 120
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await vm.maitred.SetTime(vm_guest_pb2.SetTimeRequest(time=Timestamp(seconds=60)))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        now = vm_guest_pb2.SetTimeRequest(time=Timestamp(seconds=int(time.time())))
        await vm.maitred.SetTime(now)

    runner.run(scenario())


def test_users_and_timezone_work_on_a_read_only_root(vm: Vm, runner: asyncio.Runner) -> None:
    """/etc and /home are writable layers there; no log has the user's name."""

    async def scenario() -> None:
        for group in ("audio", "video"):
            request = vm_guest_pb2.SetUpUserRequest(username="tux", uid=1000, group_names=[group])
            answer = await vm.maitred.SetUpUser(request)
            assert (answer.success, answer.failure_reason) == (True, "")
        done = await run_in_guest(vm, ["id", "tux"])
        assert done.output.startswith("uid=1000(tux)")
        assert "(audio)" in done.output
        assert "(video)" in done.output
        await _logged(vm, "the user is set up")
        assert [record for record in vm.recorder.logs if b"tux" in record.content] == []
        for use_bind_mount in (True, False):
            zone = vm_guest_pb2.SetTimezoneRequest(
                timezone_name="Asia/Tokyo", use_bind_mount=use_bind_mount
            )
            await vm.maitred.SetTimezone(zone)
            assert (await run_in_guest(vm, ["date", "+%Z"])).output.strip() == "JST"
        await vm.maitred.SetTimezone(vm_guest_pb2.SetTimezoneRequest())

    runner.run(scenario())


def test_programs_of_the_vm_read_the_name_servers_of_the_host(
    vm: Vm, runner: asyncio.Runner
) -> None:
    async def scenario() -> None:
        config = vm_guest_pb2.ResolvConfig(nameservers=["192.0.2.1"], search_domains=["test"])
        await vm.maitred.SetResolvConfig(vm_guest_pb2.SetResolvConfigRequest(resolv_config=config))
        path = "/etc/resolv.conf"
        assert (await run_in_guest(vm, ["readlink", "-f", path])).output == "/run/resolv.conf\n"
        done = await run_in_guest(vm, ["cat", path])
        assert done.output == "nameserver 192.0.2.1\nsearch test\n"

    runner.run(scenario())


def test_a_remote_shell_over_vsock(vm: Vm, runner: asyncio.Runner) -> None:
    """A terminal with its size, streams apart without one, and exit codes."""

    async def open_session(*argv: str, pty: bool) -> shell.Session:
        request = vsh_pb2.SetupConnectionRequest(
            target="vm", argv=argv, nopty=not pty, window_rows=33, window_cols=99
        )
        return await shell.open_session(await vm.vsock.connect(shell.PORT), request)

    async def result(session: shell.Session) -> tuple[int, bytes, bytes]:
        outputs = {1: b"", 2: b""}
        async for item in session.output():
            if isinstance(item, int):
                await session.close()
                return item, outputs[1], outputs[2]
            outputs[item[0]] += item[1]
        raise AssertionError("no exit code")

    async def scenario() -> None:
        async with asyncio.timeout(120):
            session = await open_session("sh", "-c", "tty; stty size; exit 4", pty=True)
            code, out, _ = await result(session)
            assert code == 4
            assert out.startswith(b"/dev/pts/")
            assert b"33 99" in out
            session = await open_session("sh", "-c", "cat; echo err >&2", pty=False)
            await session.send_input(b"x" * 500_000)
            await session.send_input(b"")
            assert await result(session) == (0, b"x" * 500_000, b"err\n")
            # The host goes away in the middle.
            session = await open_session("sleep", "4711", pty=False)
            await session.close()
            while "4711" in (await run_in_guest(vm, ["ps", "-e", "-o", "args"])).output:
                await asyncio.sleep(0.2)

    runner.run(scenario())
