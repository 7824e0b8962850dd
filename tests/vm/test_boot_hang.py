"""A VM that does not get on while it boots is booted again by the launcher."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from host.build_files import GuestImage
from host.image_server import ImageServer
from tests.vm.vms import new_vm

pytestmark = pytest.mark.timeout(240)


def test_a_hung_boot_is_repeated(
    runner: asyncio.Runner, image: GuestImage, image_server: ImageServer, tmp_path: Path
) -> None:
    """QEMU's monitor stops the processors, which looks like the real thing to a host."""
    told: list[str] = []

    async def scene() -> None:
        async with new_vm(image, tmp_path, image_server) as test_vm:
            vm = test_vm.vm
            if vm.accelerator != "tcg":
                pytest.skip("only emulated boots are taken for hung")
            vm.tell = told.append
            await vm.boot()
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
