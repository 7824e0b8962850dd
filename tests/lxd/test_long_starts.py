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
_GATE = "/run/gate"


@pytest.fixture(scope="module")
def beating(shared_tremplin: Tremplin) -> Iterator[None]:
    """Long starts are reported every 0.6 s."""
    shared_tremplin.restart(start_heartbeat="0.6")
    yield
    shared_tremplin.restart()


@pytest.fixture
def held(tremplin: Tremplin, beating: None) -> Iterator[Tremplin]:
    """Tremplin with a container `held`, stopped and once started, which does not start before there
    is the file _GATE.
    """
    machine = tremplin.machine
    script = f"#!/bin/sh\\nwhile [ ! -e {_GATE} ]; do sleep 0.05; done\\n"
    machine.run("sh", "-c", f"printf '{script}' >/run/held; chmod 755 /run/held")
    tremplin.create("held")
    assert _start_to_the_end(tremplin) == _PROGRESS.STARTED
    machine.run("lxc", "stop", "--force", "held")
    machine.run("lxc", "config", "set", "held", "raw.lxc=lxc.hook.pre-start = /run/held")
    try:
        yield tremplin
    finally:
        _open(tremplin)
        machine.remove_containers()
        machine.run("rm", _GATE)


def _open(tremplin: Tremplin) -> None:
    tremplin.machine.run("touch", _GATE)


def _start_to_the_end(tremplin: Tremplin) -> int:
    before = len(tremplin.host.reports)
    tremplin.call("StartContainer", container_name="held")
    status: int = _ended(tremplin, before).message.status
    return status


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
    held: Tremplin, level: pb.StartContainerRequest.PrivilegeLevel.ValueType, answered: int
) -> None:
    """Answered after 2 s, REMAPPING where ids are shifted; then STARTING again and again, and one
    STARTED as the last word.
    """
    host = held.host
    before = len(host.reports)
    began = time.monotonic()
    answer = held.call("StartContainer", container_name="held", privilege_level=level)
    assert answer.status == answered
    assert answer.os_release.id
    assert time.monotonic() - began > 1.9
    beats: list[Report] = []
    for _ in range(3):
        after = host.reports.index(beats[-1]) + 1 if beats else before
        beats.append(
            host.wait_for(
                "UpdateStartStatus", container="held", status=_PROGRESS.STARTING, after=after
            )
        )
    # Of those that waited for the answer there is one.
    assert beats[0].at - began > 1.9
    _open(held)
    assert _ended(held, before).message.status == _PROGRESS.STARTED
    assert held.machine.containers() == {"held": "Running"}
    told = [r.message.status for r in host.reports[before:] if r.method == "UpdateStartStatus"]
    assert told == [_PROGRESS.STARTING] * (len(told) - 1) + [_PROGRESS.STARTED]
