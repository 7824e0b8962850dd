"""Processes of the VM that are nobody's, and what they can do to the VM, its agent and its host."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import grpc.aio
import pytest

from agent.pb import tremplin_pb2
from host.build_files import GuestImage
from host.commands import run_in_container, run_in_guest
from host.errors import HostError, VmDiedError
from host.image_server import ImageServer
from host.vm import Vm
from tests.vm.vms import new_vm

pytestmark = pytest.mark.timeout(420)

_NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--"]

_FORGED = "Kernel panic - not syncing: says nobody"
_CLEAN = "maitred: power off: clean"


async def _as_nobody(vm: Vm, *argv: str) -> str:
    done = await run_in_guest(vm, [*_NOBODY, *argv])
    return str(done.output + done.errors)


async def _says_on_the_console(vm: Vm, text: str) -> None:
    # tmpfs has the kernel log options that it does not know.
    mount = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-n", "-t", "tmpfs"]
    await _as_nobody(vm, *mount, "-o", f"x\n{text}", "none", "/tmp")
    await vm.alive(vm.console.wait_for(text), timeout=30, what="hear the kernel")


async def _is_believed_dead(vm: Vm) -> None:
    async with asyncio.timeout(60):
        while vm.running and vm.console.panicked.is_set():
            await asyncio.sleep(0.05)


async def _fill_the_memory(vm: Vm) -> None:
    # Files of a tmpfs are no process's: killing a large process makes no room.
    hog = "mkdir /hog; mount -t tmpfs -o size=64g none /hog; dd if=/dev/zero of=/hog/x bs=1M"
    with contextlib.suppress(HostError):  # the answer goes with LXD
        await run_in_container(vm, "penguin", ["sh", "-c", hog], timeout=20)
    request = tremplin_pb2.GetContainerInfoRequest(container_name="penguin")
    async with asyncio.timeout(150):
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                info = await vm.tremplin.GetContainerInfo(request, timeout=60)
                if info.status == tremplin_pb2.GetContainerInfoResponse.STOPPED:
                    return
            await asyncio.sleep(0.5)


def test_nobody_ends_the_vm(
    runner: asyncio.Runner, image: GuestImage, image_server: ImageServer, tmp_path: Path
) -> None:
    """A container that takes all memory ends by it, and not the agent; and nobody makes the host
    believe that the VM has ended, or how.
    """

    async def scenario() -> None:
        async with new_vm(image, tmp_path, image_server) as test_vm:
            vm = test_vm.vm
            await test_vm.bring_up()
            await _fill_the_memory(vm)
            done = await run_in_guest(vm, ["termina-ctl", "list"])
            starts = {line.split()[0]: line for line in done.output.splitlines() if line.strip()}
            for each in ("maitred", "tremplin", "log-forwarder"):
                assert "signal 9" not in starts[each], done.output

            await _says_on_the_console(vm, _FORGED)
            await _is_believed_dead(vm)
            assert vm.running, vm.death()
            await _says_on_the_console(vm, _CLEAN)
            with pytest.raises(VmDiedError, match="panicked"):
                await run_in_guest(vm, ["sh", "-c", "echo c >/proc/sysrq-trigger"])
            assert not await vm.shut_down()

    runner.run(scenario())
