"""Starts that take long, as the test wants it: what is answered, and what the host is told."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from agent.pb import tremplin_pb2 as pb

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
