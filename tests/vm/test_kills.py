"""kill -9 of maitred and of tremplin in the middle of each stage: the host can carry on the flow,
no container is half-made, and nothing that PID 1 supervises is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc.aio
import pytest
import tenacity

from agent.pb import tremplin_pb2, vm_guest_pb2
from host.build_files import GuestImage
from host.commands import LXC_ENVIRONMENT, run_in_container, run_in_guest
from host.errors import HostError
from host.image_server import ImageServer
from host.status import ContainerStatus
from tests.vm.vms import TestVm, boot, new_vm

pytestmark = pytest.mark.timeout(800)

_SLOW_DOWNLOAD = 250_000  # bytes per second; the small image then takes 4 s
_AGAIN_SECONDS = 60.0

_Progress = tremplin_pb2.ContainerCreationProgress


async def _kill(test_vm: TestVm, program: str, *, delay: float = 0.0) -> None:
    """Kill -9 by a shell in the guest, some seconds after it was launched."""
    # The brackets keep the shell's own command line from matching.
    script = f"sleep {delay}; pkill -KILL -f -- 'start.py agent[.]{program}'"
    launch = vm_guest_pb2.LaunchProcessRequest(argv=["/bin/sh", "-c", script])
    with contextlib.suppress(grpc.aio.AioRpcError):  # maitred may be dead before it answers
        await test_vm.vm.maitred.LaunchProcess(launch, timeout=20, wait_for_ready=True)


async def _carried_on(step: Callable[[], Awaitable[None]]) -> None:
    """A step of the flow, made again as long as its service is away."""
    async for attempt in tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception(
            lambda error: isinstance(error, HostError) and "UNAVAILABLE" in str(error)
        ),
        wait=tenacity.wait_fixed(0.2),
        stop=tenacity.stop_after_delay(_AGAIN_SECONDS),
        reraise=True,
    ):
        with attempt:
            await step()


async def _killed_in_the_middle(
    test_vm: TestVm, step: Callable[[], Awaitable[None]], *, delay: float
) -> None:
    """A step of the flow during which maitred is killed, and which is then carried on."""
    running = asyncio.ensure_future(step())
    await _kill(test_vm, "maitred", delay=delay)
    with contextlib.suppress(HostError):
        await running
    await _carried_on(step)


async def _create_killed_at(test_vm: TestVm, moment: Callable[[int], Awaitable[object]]) -> None:
    """CreateContainer, and all that the host does at its end; tremplin is killed at a moment.

    moment: waits for it, given how many events there were before.
    """
    vm = test_vm.vm
    since = len(vm.recorder.events)
    creating = asyncio.ensure_future(test_vm.host().create_container())
    await vm.alive(moment(since), timeout=90, what="get to the moment")
    since = len(vm.recorder.events)
    await _kill(test_vm, "tremplin")
    await vm.alive(
        vm.recorder.wait_for("TremplinReady", since=since), timeout=90, what="see tremplin again"
    )
    creating.cancel()
    await asyncio.gather(creating, return_exceptions=True)


async def _pids(test_vm: TestVm) -> dict[str, int]:
    """The processes that nobody may lose, by name; LXD's helpers are younger than LXD."""
    done = await run_in_guest(test_vm.vm, ["ps", "-eo", "pid=,comm="])
    pids: dict[str, int] = {}
    for line in done.output.splitlines():
        pid, name = line.split(maxsplit=1)
        if name in {"tail", "lxcfs", "dhclient", "lxd"}:
            pids[name] = min(int(pid), pids.get(name, int(pid)))
    return pids


def test_killed_in_each_stage(
    runner: asyncio.Runner, image: GuestImage, image_server: ImageServer, tmp_path: Path
) -> None:
    """One flow with a kill in every stage of it ends in a whole container."""

    def downloading(test_vm: TestVm, percent: int) -> Callable[[int], Awaitable[object]]:
        # LXD may have got the image although tremplin was killed; nothing is downloaded then.
        return lambda since: test_vm.vm.recorder.wait_for(
            "UpdateCreateStatus",
            lambda message: (
                message.status != _Progress.DOWNLOADING or message.download_progress >= percent
            ),
            since=since,
        )

    def user_is_set_up(test_vm: TestVm) -> Callable[[int], Awaitable[object]]:
        start = test_vm.vm.console.position
        return lambda _: test_vm.vm.console.wait_for("penguin has its user", start=start)

    def created(test_vm: TestVm) -> Callable[[int], Awaitable[object]]:
        return lambda since: test_vm.vm.recorder.wait_for(
            "UpdateCreateStatus", lambda message: message.status == _Progress.CREATED, since=since
        )

    async def scene(test_vm: TestVm) -> None:
        vm = test_vm.vm
        host = test_vm.host()
        await boot(vm)
        await _killed_in_the_middle(test_vm, host.mount_disks, delay=0)
        await _killed_in_the_middle(test_vm, host.set_up_network, delay=0.3)
        tail = ["tail", "-f", "/dev/null"]
        await vm.maitred.LaunchProcess(
            vm_guest_pb2.LaunchProcessRequest(argv=tail, respawn=True), timeout=20
        )
        before = await _pids(test_vm)
        await _killed_in_the_middle(test_vm, host.start_termina, delay=0.5)
        await _kill(test_vm, "tremplin", delay=0.2)
        await host.wait_for_tremplin()
        await _carried_on(host.start_lxd)
        before |= await _pids(test_vm)

        await _create_killed_at(test_vm, downloading(test_vm, 20))
        # Whoever carried it out, maitred's end does not disturb a creation.
        image_server.set_rate(None)
        await _create_killed_at(test_vm, downloading(test_vm, 100))
        await _create_killed_at(test_vm, created(test_vm))
        await _create_killed_at(test_vm, user_is_set_up(test_vm))

        host = test_vm.host()
        await _kill(test_vm, "maitred")
        await _carried_on(host.create_container)
        await host.wait_until_started()
        reached = await host.find_out()
        assert reached.user == "tux"

        after = await _pids(test_vm)
        assert {name: after.get(name) for name in before} == before
        assert {"tail", "lxcfs", "dhclient", "lxd"} == before.keys()
        listed = await run_in_guest(
            vm, ["lxc", "list", "--format=csv", "--columns=ns"], env=LXC_ENVIRONMENT
        )
        assert listed.output.split() == ["penguin,RUNNING"]
        done = await run_in_container(vm, "penguin", ["id", "-un"], user="tux")
        assert done.output == "tux\n"
        assert "Traceback" not in vm.console.text
        states = [info.container_status for info in test_vm.history]
        assert ContainerStatus.FAILED not in states
        assert len(vm.recorder.of("VmReady")) == 1
        reports = vm.recorder.of("SendFailureReport")
        assert "tremplin" in {report.failed_process for report in reports}
        assert await vm.shut_down(), vm.console.last_lines(20)

    async def with_vm() -> None:
        async with new_vm(image, tmp_path, image_server) as test_vm:
            image_server.set_rate(_SLOW_DOWNLOAD)
            try:
                await scene(test_vm)
            finally:
                image_server.set_rate(None)

    runner.run(with_vm())
