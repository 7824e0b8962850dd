"""Kills in the middle: of tremplin, which carries on when it is back, and of LXD."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

from agent.pb import tremplin_pb2 as pb
from tests.lxd.host import start_is_cut_off
from tests.lxd.machine import wait_until

if TYPE_CHECKING:
    from tests.lxd.host import Tremplin

pytestmark = pytest.mark.usefixtures("no_images")

CREATION = pb.ContainerCreationProgress


def _percent_reached(tremplin: Tremplin, name: str, percent: int) -> bool:
    messages = tremplin.host.of("UpdateCreateStatus", name)
    return any(message.download_progress >= percent for message in messages)


def test_tremplin_killed_while_downloading(tremplin: Tremplin) -> None:
    """The download goes on in LXD; the percentages go on too, and end in one CREATED."""
    host = tremplin.host
    with tremplin.machine.slow_down(2e6):
        before = tremplin.begin_create("download")
        wait_until(lambda: _percent_reached(tremplin, "download", 10), "10 percent")
        tremplin.restart()
        again = tremplin.call(
            "CreateContainer",
            container_name="download",
            image_server="http://127.0.0.1:8000/0",
            image_alias="big",
        )
        assert again.status == pb.CreateContainerResponse.CREATING
        wait_until(lambda: _percent_reached(tremplin, "download", 40), "40 percent")
        tremplin.restart()
        end = host.wait_for(
            "UpdateCreateStatus",
            container="download",
            not_status=CREATION.DOWNLOADING,
            after=before,
        )
    assert end.message.status == CREATION.CREATED
    messages = host.of("UpdateCreateStatus", "download")
    percents = [message.download_progress for message in messages[:-1]]
    assert percents == sorted(percents)
    assert percents[-1] == 100
    assert tremplin.machine.containers() == {"download": "Stopped"}


@pytest.mark.parametrize("moment", range(8))
def test_tremplin_killed_at_any_moment(tremplin: Tremplin, moment: int) -> None:
    """From the call to the end of a creation, at eight moments: it always ends in CREATED."""
    with tremplin.machine.slow_down(40e6):
        before = tremplin.begin_create("moment")
        if moment:
            wait_until(lambda: _percent_reached(tremplin, "moment", moment * 14), "the moment")
        tremplin.restart()
        end = tremplin.host.wait_for(
            "UpdateCreateStatus", container="moment", not_status=CREATION.DOWNLOADING, after=before
        )
    assert end.message.status == CREATION.CREATED
    assert tremplin.machine.containers() == {"moment": "Stopped"}
    assert tremplin.create("moment", alias="big").message.status == CREATION.CREATED
    assert tremplin.machine.containers() == {"moment": "Stopped"}


def test_tremplin_killed_while_starting_and_stopping(tremplin: Tremplin) -> None:
    """Both are carried on and reported."""
    host = tremplin.host
    tremplin.create("power", alias="busybox")
    before = len(host.reports)
    with tremplin.machine.gate("power") as gate:
        start = tremplin.stub.StartContainer.future(
            pb.StartContainerRequest(container_name="power", token="t"), timeout=60
        )
        wait_until(gate.reached, "the middle of the start")
        tremplin.kill()
        assert start_is_cut_off(start)
    tremplin.start()
    started = host.wait_for("UpdateStartStatus", container="power", after=before)
    assert started.message.status == pb.ContainerStartProgress.STARTED
    assert tremplin.machine.containers() == {"power": "Running"}

    before = len(host.reports)
    tremplin.call("StopContainer", container_name="power")
    tremplin.restart()
    stopped = host.wait_for("UpdateStopStatus", container="power", after=before)
    assert stopped.message.status == pb.ContainerStopProgress.STOPPED
    before = len(host.reports)
    tremplin.call("DeleteContainer", container_name="power")
    tremplin.restart()
    deleted = host.wait_for("UpdateDeletionStatus", container="power", after=before)
    assert deleted.message.status == pb.ContainerDeletionProgress.DELETED
    assert tremplin.machine.containers() == {}


def test_lxd_killed_while_downloading(tremplin: Tremplin) -> None:
    """FAILED, nothing is left, and the next creation works."""
    machine = tremplin.machine
    with machine.slow_down(1e6):
        before = tremplin.begin_create("lost")
        wait_until(lambda: _percent_reached(tremplin, "lost", 10), "10 percent")
        machine.kill_lxd()
        machine.start_lxd()
        end = tremplin.host.wait_for(
            "UpdateCreateStatus", container="lost", not_status=CREATION.DOWNLOADING, after=before
        )
    assert end.message.status == CREATION.FAILED
    assert "LXD was restarted in the middle" in end.message.failure_reason
    assert machine.containers() == {}
    assert tremplin.create("lost", alias="big").message.status == CREATION.CREATED
    assert machine.containers() == {"lost": "Stopped"}


def test_lxd_killed_while_containers_run(tremplin: Tremplin) -> None:
    """They go on; what went down in the meantime is reported when LXD is back."""
    machine, host = tremplin.machine, tremplin.host
    for name in ("stays", "goes"):
        tremplin.create(name, alias="busybox")
        start = tremplin.call("StartContainer", container_name=name)
        assert start.status in {pb.StartContainerResponse.STARTED, 4}
        host.wait_for("UpdateStartStatus", container=name)
    init = machine.api.instances["goes"].state.get().json()["metadata"]["pid"]
    before = len(host.reports)
    machine.kill_lxd()
    info = tremplin.call("GetContainerInfo", container_name="stays")
    assert info.status == pb.GetContainerInfoResponse.FAILED
    assert "LXD does not answer" in info.failure_reason
    assert tremplin.call("StartLxd").status in {
        pb.StartLxdResponse.STARTING,
        pb.StartLxdResponse.FAILED,
    }
    machine.run("kill", "-KILL", str(init))
    # LXD 5.0.2 dies of a nil pointer (onStop) when it is told of this too early in its start.
    monitor = ("pgrep", "-f", "lxc monitor.* goes$")
    wait_until(lambda: not machine.run(*monitor, check=False), "the end of the container's monitor")
    machine.start_lxd()
    host.wait_for("ContainerShutdown", container="goes", after=before)
    info = tremplin.call("GetContainerInfo", container_name="stays")
    assert info.status == pb.GetContainerInfoResponse.RUNNING
    assert host.of("ContainerShutdown", "stays") == []


def test_sigterm_and_sigpwr(tremplin: Tremplin) -> None:
    """SIGTERM leaves the containers running, SIGPWR stops them; both end tremplin cleanly."""
    machine = tremplin.machine
    tremplin.create("signals", alias="busybox")
    tremplin.start_container("signals")
    tremplin.kill(signal.SIGTERM)
    assert tremplin.ended() == 0
    assert machine.containers() == {"signals": "Running"}
    tremplin.start()
    before = len(tremplin.host.reports)
    tremplin.kill(signal.SIGPWR)
    assert tremplin.ended() == 0
    wait_until(lambda: machine.containers() == {"signals": "Stopped"}, "the stop")
    assert tremplin.host.reports[before:] == [] or tremplin.host.of("ContainerShutdown", "signals")
