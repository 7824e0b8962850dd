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


def _line(pattern: str, *, later: float = 0.0) -> Moment:
    async def moment(test_vm: TestVm, text_before: int) -> None:
        await test_vm.vm.console.wait_for(pattern, start=text_before)
        await asyncio.sleep(later)

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


def _created(*, later: float) -> Moment:
    async def moment(test_vm: TestVm, _: int) -> None:
        await test_vm.vm.recorder.wait_for(
            "UpdateCreateStatus",
            lambda message: message.status == _Progress.CREATED,
            since=test_vm.vm.boot_events,
        )
        await asyncio.sleep(later)

    return moment


def _event(method: str, *, later: float = 0.0) -> Moment:
    async def moment(test_vm: TestVm, _: int) -> None:
        since = test_vm.vm.boot_events
        await test_vm.vm.recorder.wait_for(method, lambda _: True, since=since)
        await asyncio.sleep(later)

    return moment


def _deleting(*, later: float) -> Moment:
    """While the container is deleted that the flow has brought up."""

    async def moment(test_vm: TestVm, _: int) -> None:
        request = tremplin_pb2.DeleteContainerRequest(container_name="penguin")
        answer = await test_vm.vm.tremplin.DeleteContainer(request, timeout=20)
        assert answer.status == tremplin_pb2.DeleteContainerResponse.DELETING, answer
        await asyncio.sleep(later)

    return moment


_MOMENTS: dict[str, Moment] = {
    "disk mounted": _line("maitred: stateful disk"),
    "LXD starts": _line("tremplin: LXD answers"),
    "bridge": _line("LXD has its bridge"),
    "LXD starts + 0.4": _line("tremplin: LXD answers", later=0.4),
    **{f"ready + {s}": _event("TremplinReady", later=s) for s in (0.0, 0.2, 0.6)},
    "0 %": _percent(0),
    "half downloaded": _percent(50),
    "90 %": _percent(90),
    "100 %": _percent(100),
    "100 % + 0.15": _percent(100, later=0.15),
    "unpacking": _percent(100, later=0.3),
    **{f"100 % + {s}": _percent(100, later=s) for s in (0.5, 0.8, 1.2)},
    **{f"created + {s}": _created(later=s) for s in (0.0, 0.3, 0.8)},
    "user set up": _line("has its user"),
    **{f"user + {s}": _line("has its user", later=s) for s in (0.2, 0.5, 1.0, 1.7)},
    **{f"started + {s}": _event("UpdateStartStatus", later=s) for s in (0.0, 0.5)},
}
"""From the first use of the disk to a container that runs. What comes only once on a disk is early:
the bridge, which may be there 0.4 s after LXD, and downloads, as an image that was flushed to the
disk is not downloaded again."""
_RISKIEST = ("LXD starts", "unpacking", "user set up")

_WHEN_READY: dict[str, Moment] = {f"delete + {s}": _deleting(later=s) for s in (0.0, 0.3, 0.8, 1.5)}
"""After the flow; with these it is 30."""

# TERMINA_POWER_CUTS=all: every moment; names, separated by commas: those; else the riskiest.
_ALL = _MOMENTS | _WHEN_READY
_WANTED = os.environ.get("TERMINA_POWER_CUTS", "")
_CHOSEN = tuple(_ALL) if _WANTED == "all" else tuple(filter(None, _WANTED.split(","))) or _RISKIEST


@pytest.mark.timeout(300 + 60 * len(_CHOSEN))
def test_power_cuts(
    runner: asyncio.Runner, image: GuestImage, image_server: ImageServer, tmp_path: Path
) -> None:
    """One disk, cut again and again; then the whole flow, with one whole container on it."""

    async def cut(test_vm: TestVm, moment: Moment) -> None:
        before = test_vm.vm.console.position
        if moment in _WHEN_READY.values():
            await test_vm.bring_up()
            await moment(test_vm, before)
            await test_vm.vm.kill()
            return
        await boot(test_vm.vm)
        flow = asyncio.ensure_future(test_vm.host().bring_up())
        waiting = asyncio.ensure_future(moment(test_vm, before))
        await asyncio.wait([flow, waiting], timeout=120, return_when=asyncio.FIRST_COMPLETED)
        if flow.done():
            flow.result()
            await asyncio.wait([waiting], timeout=30)  # a moment may come soon after
        assert waiting.done(), "the moment did not come"
        await test_vm.vm.kill()
        with contextlib.suppress(VmDiedError):
            await flow

    async def scene() -> None:
        async with new_vm(image, tmp_path, image_server) as test_vm:
            for name in _CHOSEN:
                await cut(test_vm, _ALL[name])
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
