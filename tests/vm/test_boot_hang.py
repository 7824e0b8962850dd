"""A VM whose emulated kernel hangs while it boots, or fails, or whose QEMU fails, is booted again
by the launcher.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import psutil
import pytest

from agent.pb import vm_guest_pb2
from host.build_files import GuestImage
from host.image_server import ImageServer
from tests.vm.vms import TestVm, new_vm

pytestmark = pytest.mark.timeout(240)


@contextlib.asynccontextmanager
async def _booting(
    image: GuestImage, directory: Path, image_server: ImageServer, told: list[str]
) -> AsyncIterator[TestVm]:
    # An emulated VM that was just started; told: gets what its launcher says.
    async with new_vm(image, directory, image_server) as test_vm:
        if test_vm.vm.accelerator != "tcg":
            pytest.skip("only emulated boots are taken for hung, and emulated kernels for failed")
        test_vm.vm.tell = told.append
        await test_vm.vm.boot()
        yield test_vm


def test_a_hung_boot_is_repeated(
    runner: asyncio.Runner, image: GuestImage, image_server: ImageServer, tmp_path: Path
) -> None:
    """QEMU's monitor stops the processors, which looks like the real thing to a host."""
    told: list[str] = []

    async def scene() -> None:
        async with _booting(image, tmp_path, image_server, told) as test_vm:
            vm = test_vm.vm
            await vm.console.wait_for("initrd")
            async with vm.monitor() as monitor:
                await monitor.run("stop")
            await vm.ready(silence=10)
            assert "booting again" in told[0]
            assert "the console was silent for 10 s; last: " in told[0]
            assert "initrd: /dev/vda mounted" in told[0]
            assert vm.boot_text.count("initrd: /dev/vda mounted") == 1
            assert await vm.shut_down(), vm.console.last_lines(20)

    runner.run(scene())


def test_after_a_qemu_that_failed_comes_another(
    runner: asyncio.Runner, image: GuestImage, image_server: ImageServer, tmp_path: Path
) -> None:
    """The signal is that of an assertion that failed."""
    told: list[str] = []

    async def scene() -> None:
        async with _booting(image, tmp_path, image_server, told) as test_vm:
            vm = test_vm.vm
            await vm.console.wait_for("initrd")
            (qemu,) = (
                process
                for process in psutil.Process().children()
                if process.name().startswith("qemu-system")
            )
            qemu.send_signal(signal.SIGABRT)
            await vm.ready()
            (line,) = told
            assert re.fullmatch(r"QEMU failed: '.+'; booting again", line)
            assert await vm.shut_down(), vm.console.last_lines(20)

    runner.run(scene())


def test_a_kernel_that_failed_is_booted_again(
    runner: asyncio.Runner, image: GuestImage, image_server: ImageServer, tmp_path: Path
) -> None:
    """In the middle of bringing up a container; the fault's line is ours, the panic is real."""
    told: list[str] = []
    fail = "echo '<2>kernel BUG at a test' >/dev/kmsg; echo c >/proc/sysrq-trigger"

    async def scene() -> None:
        async with _booting(image, tmp_path, image_server, told) as test_vm:
            vm = test_vm.vm
            flow = asyncio.ensure_future(test_vm.host().bring_up())
            await vm.console.wait_for("LXD is being started")
            with contextlib.suppress(grpc.aio.AioRpcError):
                await vm.maitred.LaunchProcess(
                    vm_guest_pb2.LaunchProcessRequest(argv=["/bin/sh", "-c", fail]), timeout=20
                )
            assert (await flow).user == "tux"
            (line,) = told
            assert re.fullmatch(
                r"the emulated kernel failed: '\[.*\] kernel BUG at a test'; booting again", line
            )
            assert await vm.shut_down(), vm.console.last_lines(20)

    runner.run(scene())
