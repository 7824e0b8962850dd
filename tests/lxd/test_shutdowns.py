"""ContainerShutdown on every way a container can go down, and not on a reboot."""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING

import pytest

from agent.option_table import TREMPLIN
from agent.options import parse
from agent.pb import tremplin_pb2 as pb
from agent.tremplin.lxd_client import LxdClient
from agent.tremplin.reporter import Reporter
from agent.tremplin.session import Session, Settings
from tests.lxd.machine import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.lxd.host import Tremplin
    from tests.lxd.machine import Machine

_LONG = pytest.mark.skipif(
    os.environ.get("TERMINA_LONG") != "1", reason="half a minute; TERMINA_LONG=1"
)


@pytest.fixture
def running(tremplin: Tremplin) -> Tremplin:
    """Tremplin with a running container `life`."""
    tremplin.create("life")
    tremplin.start_container("life")
    return tremplin


def _init_pid(machine: Machine) -> str:
    return str(machine.api.instances["life"].state.get().json()["metadata"]["pid"])


WAYS: dict[str, Callable[[Machine], object]] = {
    "powered off inside": lambda m: m.run("lxc", "exec", "life", "--", "poweroff", "-f"),
    "stopped cleanly": lambda m: m.run("lxc", "stop", "life"),
    "stopped by force": lambda m: m.run("lxc", "stop", "--force", "life"),
    "init killed": lambda m: m.run("kill", "-KILL", _init_pid(m)),
    "deleted": lambda m: m.run("lxc", "delete", "--force", "life"),
    "stopped while frozen": lambda m: (
        m.run("lxc", "pause", "life"),
        m.run("lxc", "stop", "--force", "life"),
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_goes_down(running: Tremplin, way: str) -> None:
    """The host hears of it, once."""
    WAYS[way](running.machine)
    running.host.wait_for("ContainerShutdown", container="life")
    running.call("GetContainerInfo", container_name="life")
    assert len(running.host.of("ContainerShutdown", "life")) == 1


@pytest.mark.parametrize(
    "command",
    [("lxc", "exec", "life", "--", "reboot", "-f"), ("lxc", "restart", "--force", "life")],
    ids=["inside", "outside"],
)
def test_reboot(running: Tremplin, command: tuple[str, ...]) -> None:
    """Not a word while it reboots, and the next shutdown counts again."""
    machine = running.machine
    before = _init_pid(machine)
    machine.run(*command)
    wait_until(lambda: _init_pid(machine) not in {"0", before}, "the reboot")
    machine.run("lxc", "stop", "--force", "life")
    running.host.wait_for("ContainerShutdown", container="life")
    assert len(running.host.of("ContainerShutdown", "life")) == 1


def test_down_and_up_at_once(running: Tremplin) -> None:
    """A start in the middle of a stop waits for it; the order of the reports is that of things."""
    stop = running.stub.StopContainer.future(
        pb.StopContainerRequest(container_name="life"), timeout=60
    )
    assert stop.result().status == pb.StopContainerResponse.STOPPING
    before = len(running.host.reports)
    start = running.call("StartContainer", container_name="life")
    assert start.status in {
        pb.StartContainerResponse.STARTED,
        pb.StartContainerResponse.STARTING,
    }
    running.host.wait_for("UpdateStartStatus", container="life", after=before)
    names = [report.method for report in running.host.reports[before:]]
    assert names.index("ContainerShutdown") < names.index("UpdateStartStatus")
    assert running.machine.containers() == {"life": "Running"}


def test_stop_that_is_ignored(running: Tremplin) -> None:
    """A container whose init does not listen is stopped by force; here by a second request."""
    machine = running.machine
    machine.run("lxc", "exec", "life", "--", "sh", "-c", "kill -STOP 1; true")
    machine.run("lxc", "pause", "life")
    before = len(running.host.reports)
    running.call("StopContainer", container_name="life")
    stopped = running.host.wait_for("UpdateStopStatus", container="life", after=before)
    assert stopped.message.status == pb.ContainerStopProgress.STOPPED


@_LONG
def test_stop_with_a_deadline(running: Tremplin) -> None:
    """An init that does not end what it should has 30 s; then it is stopped by force."""
    machine = running.machine
    machine.run("kill", "-STOP", _init_pid(machine))
    before = len(running.host.reports)
    began = time.monotonic()
    running.call("StopContainer", container_name="life")
    stopped = running.host.wait_for("UpdateStopStatus", container="life", after=before)
    assert stopped.message.status == pb.ContainerStopProgress.STOPPED
    assert 29 < stopped.at - began < 45
    assert machine.containers() == {"life": "Stopped"}


def test_start_races(tremplin: Tremplin) -> None:
    """Many starts at once: one start, every answer a good one."""
    tremplin.create("race")
    calls = [
        tremplin.stub.StartContainer.future(
            pb.StartContainerRequest(container_name="race"), timeout=60
        )
        for _ in range(8)
    ]
    good = {
        pb.StartContainerResponse.STARTED,
        pb.StartContainerResponse.STARTING,
        pb.StartContainerResponse.RUNNING,
    }
    assert all(call.result().status in good for call in calls)
    tremplin.host.wait_for("UpdateStartStatus", container="race")
    assert len(tremplin.host.of("UpdateStartStatus", "race")) == 1


@pytest.mark.parametrize("runs", [True, False])
def test_clock_set_back_a_little(running: Tremplin, runs: bool) -> None:
    """Where the order of events is not that of their times, LXD is asked how it is."""
    machine = running.machine
    if not runs:
        machine.run("lxc", "stop", "--force", "life")

    async def run() -> None:
        lxd = LxdClient(f"/proc/{machine.init_pid}/root{machine.lxd_dir}")
        settings = Settings.from_options(parse([], TREMPLIN))
        lifecycle = Session(settings, lxd, Reporter(None)).lifecycle
        names = ("stopped", "started") if runs else ("started", "stopped")
        for second, name in zip((30, 27), names, strict=True):
            lifecycle.on_event(
                {"action": f"instance-{name}", "source": "/1.0/instances/life"},
                f"2026-11-21T10:00:{second}.123456789Z",
            )
        assert lifecycle.up == (set() if runs else {"life"})
        async with asyncio.timeout(60):
            while lifecycle.up != ({"life"} if runs else set()):
                lifecycle.changed.clear()
                await lifecycle.changed.wait()
        lxd.close()

    asyncio.run(run())
