"""The older host's flow: never StartLxd, the stateful disk by default, start before user."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from host.build_files import GuestImage
from host.commands import run_in_container
from host.flows import Flow
from host.image_server import ImageServer
from tests.vm.vms import new_vm

pytestmark = pytest.mark.timeout(400)


def test_older_host(
    runner: asyncio.Runner, image: GuestImage, image_server: ImageServer, tmp_path: Path
) -> None:
    """From power-on to a command in the container, and a clean power-off."""

    async def scene() -> None:
        async with new_vm(image, tmp_path, image_server, flow=Flow.OLDER) as test_vm:
            reached = await test_vm.bring_up()
            assert reached.user == "tux"
            done = await run_in_container(test_vm.vm, "penguin", ["id", "-un"], user="tux")
            assert done.output == "tux\n"
            assert not test_vm.vm.recorder.of("UpdateStartLxdStatus")
            assert "Traceback" not in test_vm.vm.console.text
            assert await test_vm.vm.shut_down(), test_vm.vm.console.last_lines(20)

    runner.run(scene())
