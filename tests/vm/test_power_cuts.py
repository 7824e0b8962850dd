"""Power cuts: QEMU is killed at moments spread over the first boot's work, and the next boot on the
same disk gets to a ready container each time.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from agent.pb import tremplin_pb2
from host.build_files import GuestImage
from host.commands import LXC_ENVIRONMENT, run_in_container, run_in_guest
from host.errors import VmDiedError
from host.image_server import ImageServer
from tests.vm.vms import TestVm, boot, new_vm

_Progress = tremplin_pb2.ContainerCreationProgress

Moment = Callable[[TestVm, int], Awaitable[object]]


def _line(pattern: str) -> Moment:
    async def moment(test_vm: TestVm, text_before: int) -> None:
        await test_vm.vm.console.wait_for(pattern, start=text_before)

    return moment


def _percent(percent: int, *, later: float = 0.0) -> Moment:
    async def moment(test_vm: TestVm, _: int) -> None:
        recorder = test_vm.vm.recorder
        await recorder.wait_for(
            "UpdateCreateStatus",
            lambda message: message.download_progress >= percent or message.status != 1,
            since=test_vm.vm.boot_events,
        )
        await asyncio.sleep(later)

    return moment


_MOMENTS: dict[str, Moment] = {
    "disk mounted": _line("maitred: stateful disk"),
    "LXD starts": _line("tremplin: LXD answers"),
    "bridge": _line("LXD has its bridge"),
    "half downloaded": _percent(50),
    "unpacking": _percent(100, later=0.3),
    "user set up": _line("has its user"),
}

# All moments, and some more between them: TERMINA_POWER_CUTS=all; by default the riskiest ones.
_CHOSEN = (
    list(_MOMENTS)
    if os.environ.get("TERMINA_POWER_CUTS") == "all"
    else ["LXD starts", "unpacking", "user set up"]
)


@pytest.mark.timeout(800)
def test_power_cuts(
    runner: asyncio.Runner, image: GuestImage, image_server: ImageServer, tmp_path: Path
) -> None:
    """One disk, cut again and again; then the whole flow, with one whole container on it."""

    async def cut(test_vm: TestVm, moment: Moment) -> None:
        before = test_vm.vm.console.position
        await boot(test_vm.vm)
        flow = asyncio.ensure_future(test_vm.host().bring_up())
        waiting = asyncio.ensure_future(moment(test_vm, before))
        await asyncio.wait([flow, waiting], timeout=120, return_when=asyncio.FIRST_COMPLETED)
        if flow.done():
            flow.result()  # a flow that was not stopped failed; or the moment was missed
        assert waiting.done(), "the moment did not come"
        await test_vm.vm.kill()
        with contextlib.suppress(VmDiedError):
            await flow

    async def scene() -> None:
        async with new_vm(image, tmp_path, image_server) as test_vm:
            for name in _CHOSEN:
                await cut(test_vm, _MOMENTS[name])
            reached = await test_vm.bring_up()
            assert reached.user == "tux"
            done = await run_in_container(test_vm.vm, "penguin", ["id", "-un"], user="tux")
            assert done.output == "tux\n"
            listed = await run_in_guest(
                test_vm.vm, ["lxc", "list", "--format=csv", "--columns=ns"], env=LXC_ENVIRONMENT
            )
            assert listed.output.split() == ["penguin,RUNNING"]
            assert "Traceback" not in test_vm.vm.console.text
            assert await test_vm.vm.shut_down(), test_vm.vm.console.last_lines(20)

    runner.run(scene())
