"""Starts that take long, as the test wants it: what is answered, and what the host is told."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from agent.pb import tremplin_pb2 as pb
from tests.lxd.machine import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.lxd.host import Report, Tremplin

_ANSWER = pb.StartContainerResponse
_PROGRESS = pb.ContainerStartProgress


@pytest.fixture(scope="module")
def beating(shared_tremplin: Tremplin) -> Iterator[None]:
    """Long starts are reported every 0.6 s."""
    shared_tremplin.restart(start_heartbeat="0.6")
    yield
    shared_tremplin.restart()


@pytest.fixture
def stopped(tremplin: Tremplin, beating: None) -> Tremplin:
    """Tremplin with a container `held`, stopped and once started."""
    tremplin.create("held")
    before = len(tremplin.host.reports)
    tremplin.call("StartContainer", container_name="held")
    assert _ended(tremplin, before).message.status == _PROGRESS.STARTED
    tremplin.machine.run("lxc", "stop", "--force", "held")
    return tremplin


def _ended(tremplin: Tremplin, after: int) -> Report:
    return tremplin.host.wait_for(
        "UpdateStartStatus", container="held", not_status=_PROGRESS.STARTING, after=after
    )


@pytest.mark.parametrize(
    ("level", "answered"),
    [
        (pb.StartContainerRequest.UNCHANGED, _ANSWER.STARTING),
        (pb.StartContainerRequest.PRIVILEGED, _ANSWER.REMAPPING),
    ],
)
def test_long_start(
    stopped: Tremplin, level: pb.StartContainerRequest.PrivilegeLevel.ValueType, answered: int
) -> None:
    """Answered after 2 s, REMAPPING where ids are shifted; then STARTING again and again, and one
    STARTED as the last word.
    """
    host, machine = stopped.host, stopped.machine
    before = len(host.reports)
    with machine.gate("held"):
        began = time.monotonic()
        answer = stopped.call("StartContainer", container_name="held", privilege_level=level)
        assert answer.status == answered
        assert answer.os_release.id
        assert time.monotonic() - began > 1.9
        after = before
        for beat in range(3):
            found = host.wait_for(
                "UpdateStartStatus", container="held", status=_PROGRESS.STARTING, after=after
            )
            after = host.reports.index(found) + 1
            # Of those that waited for the answer there is one, after it.
            assert beat or found.at - began > 1.9
    assert _ended(stopped, before).message.status == _PROGRESS.STARTED
    assert machine.containers() == {"held": "Running"}
    told = [r.message.status for r in host.reports[before:] if r.method == "UpdateStartStatus"]
    assert told == [_PROGRESS.STARTING] * (len(told) - 1) + [_PROGRESS.STARTED]


def test_while_it_is_deleted(stopped: Tremplin) -> None:
    """A start is refused, a creation waits its turn. What holds the deletion up is a start by a
    stranger.
    """
    host, machine = stopped.host, stopped.machine
    with machine.gate("held") as gate:
        stranger = machine.spawn("lxc", "start", "held", stderr=subprocess.DEVNULL)
        wait_until(gate.reached, "the stranger's start")
        before = len(host.reports)
        deletion = stopped.call("DeleteContainer", container_name="held")
        assert deletion.status == pb.DeleteContainerResponse.DELETING
        answer = stopped.call("StartContainer", container_name="held")
        assert answer.status == _ANSWER.FAILED
        assert answer.failure_reason == "cannot start container held: it is being deleted"
        created = len(host.reports)
        creation = stopped.call(
            "CreateContainer",
            container_name="held",
            image_server=machine.new_server(),
            image_alias="busybox",
        )
        assert creation.status == pb.CreateContainerResponse.CREATING
    told = host.wait_for("UpdateDeletionStatus", container="held", after=before)
    assert told.message.status == pb.ContainerDeletionProgress.DELETED
    made = host.wait_for(
        "UpdateCreateStatus",
        container="held",
        not_status=pb.ContainerCreationProgress.DOWNLOADING,
        after=created,
    )
    assert made.message.status == pb.ContainerCreationProgress.CREATED
    stranger.wait()
    assert machine.containers() == {"held": "Stopped"}


_HOLD_PORT = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as holder:
    holder.bind(("100.115.92.1", 53))
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(os.environ.get("TERMINA_LONG") != "1", reason="a minute; TERMINA_LONG=1")
def test_network_comes_later(stopped: Tremplin) -> None:
    """An LXD that came back without its bridge tries again after a minute; the start waits."""
    host, machine = stopped.host, stopped.machine
    machine.kill_lxd()
    machine.run("sh", "-c", "kill $(pidof dnsmasq)")
    holder = machine.spawn(
        "sh", "-c", f"sleep 20 | {sys.executable} -c '{_HOLD_PORT}'", stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    with holder.stdout:
        assert holder.stdout.readline() == "ready\n"
    machine.start_lxd(network=False)
    assert machine.api.networks["lxdbr0"].get().json()["metadata"]["status"] == "Unavailable"
    before = len(host.reports)
    answer = stopped.call("StartContainer", container_name="held")
    assert answer.status == _ANSWER.STARTING
    end = host.wait_for(
        "UpdateStartStatus", container="held", not_status=_PROGRESS.STARTING, after=before,
        seconds=140,
    )  # fmt: skip
    assert end.message.status == _PROGRESS.STARTED, end
