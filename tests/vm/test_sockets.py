"""The agent's vsock ports belong to PID 1: nobody else in the VM can ever bind one, and who calls
while maitred is away is answered by the next one.
"""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path

import grpc.aio
import pytest

from agent.pb import common_pb2, vm_guest_pb2, vm_guest_pb2_grpc, vsh_pb2
from host import shell
from host.build_files import GuestImage
from host.image_server import ImageServer
from host.vm import Vm
from tests.vm.vms import boot, new_vm, output_of

pytestmark = pytest.mark.timeout(300)

_EMPTY = common_pb2.EmptyMessage()
_CALL_SECONDS = 120

_STRANGER = """
import errno, fcntl, os, socket, struct, sys, time
with open("/dev/vsock", "rb") as device:
    (own,) = struct.unpack("I", fcntl.ioctl(device, 0x7B9, bytes(4)))
os.setuid(65534)
outcomes = set()
deadline = time.monotonic() + float(sys.argv[1])
while True:
    for port in (8888, 8890, 9001, 4711):
        for cid in (socket.VMADDR_CID_ANY, own):
            with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as stranger:
                try:
                    stranger.bind((cid, port))
                    outcomes.add(f"{port} bound")
                except OSError as error:
                    outcomes.add(f"{port} {errno.errorcode[error.errno]}")
    if time.monotonic() > deadline:
        break
print(*sorted(outcomes), sep=", ")
"""

_IN_VAIN = "4711 bound, 8888 EADDRINUSE, 8890 EADDRINUSE, 9001 EADDRINUSE\n"


def _stranger(seconds: float = 0) -> list[str]:
    return ["python3", "-I", "-c", _STRANGER, str(seconds)]


async def _through_the_shell(vm: Vm, *argv: str) -> str:
    """The output of a command that does not need maitred."""
    request = vsh_pb2.SetupConnectionRequest(target="vm", argv=argv, nopty=True)
    session = await shell.open_session(await vm.vsock.connect(shell.PORT), request)
    output = b""
    try:
        async with asyncio.timeout(60):
            async for item in session.output():
                if isinstance(item, int):
                    assert item == 0, (argv, output)
                    return output.decode()
                output += item[1]
    finally:
        await session.close()
    raise AssertionError(f"no exit code of {argv}")


async def _call(vm: Vm) -> str:
    """What a host gets that has not spoken to the VM before and calls it once."""
    # gRPC gives up an attempt to connect after 20 s, in which a slow VM has not even run what is
    # to happen meanwhile.
    options = [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.min_reconnect_backoff_ms", 1000 * _CALL_SECONDS),
    ]
    async with grpc.aio.insecure_channel(f"unix:{vm.maitred_socket}", options=options) as channel:
        maitred = vm_guest_pb2_grpc.MaitredStub(channel)
        answer = await maitred.GetKernelVersion(_EMPTY, timeout=_CALL_SECONDS)
    return str(answer.kernel_release)


async def _nobody_answers_for_a_stopped_maitred(vm: Vm) -> None:
    await _through_the_shell(vm, "termina-ctl", "stop", "maitred")
    calling = asyncio.ensure_future(_call(vm))
    assert await _through_the_shell(vm, *_stranger(1)) == _IN_VAIN
    assert not calling.done()
    await _through_the_shell(vm, "termina-ctl", "start", "maitred")
    assert await calling


async def _nobody_is_faster_than_the_next_maitred(vm: Vm) -> None:
    trying = asyncio.ensure_future(_through_the_shell(vm, *_stranger(8)))
    for _ in range(2):
        await _through_the_shell(vm, "termina-ctl", "signal", "maitred", "KILL")
        assert await _call(vm)
    assert await trying == _IN_VAIN


def test_the_ports_are_nobody_elses(
    runner: asyncio.Runner, image: GuestImage, image_server: ImageServer, tmp_path: Path
) -> None:
    async def scenario() -> None:
        async with new_vm(image, tmp_path, image_server) as test_vm:
            vm = test_vm.vm
            await boot(vm)
            guest = functools.partial(output_of, vm)

            assert await guest(*_stranger()) == _IN_VAIN  # tremplin was not even launched yet
            assert "listens on vsock:8888\n" in await guest("termina-ctl", "show", "maitred")
            await _nobody_answers_for_a_stopped_maitred(vm)
            await _through_the_shell(vm, "termina-ctl", "upgrade")
            await _nobody_is_faster_than_the_next_maitred(vm)
            await guest("termina-ctl", "stop", "shell")
            assert await guest(*_stranger()) == _IN_VAIN
            await guest("termina-ctl", "start", "shell")

            request = vm_guest_pb2.StartTerminaRequest(
                lxd_ipv4_subnet="100.115.92.1/24", stateful_device="/dev/vdc"
            )
            started = await vm.maitred.StartTermina(request, timeout=90, wait_for_ready=True)
            assert started.status == vm_guest_pb2.StartTerminaResponse.SUCCESS, started
            assert "listens on vsock:8890\n" in await guest("termina-ctl", "show", "tremplin")
            await guest("termina-ctl", "stop", "tremplin")
            assert await guest(*_stranger()) == _IN_VAIN
            await guest("termina-ctl", "start", "tremplin")
            assert await vm.shut_down()
            assert "cannot listen" not in vm.boot_text
            assert "Traceback" not in vm.boot_text

    runner.run(scenario())
