"""Several containers at once, and what tremplin does not get slower or larger by."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

from agent.pb import tremplin_pb2 as pb

if TYPE_CHECKING:
    from tests.lxd.host import Tremplin

_MANY = 8
_ROUNDS = 3
_CREATION = pb.ContainerCreationProgress


def _resident_kib(tremplin: Tremplin) -> int:
    pid = tremplin.machine.inner_pid(tremplin.process)
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


def _all_report(tremplin: Tremplin, call: str, report: str, names: list[str], final: int) -> None:
    after = len(tremplin.host.reports)
    request = getattr(pb, f"{call}Request")
    calls = [
        getattr(tremplin.stub, call).future(request(container_name=name), timeout=60)
        for name in names
    ]
    for one in calls:
        one.result()
    for name in names:
        told = tremplin.host.wait_for(report, container=name, after=after)
        assert told.message.status == final, told


def _life_of_many(tremplin: Tremplin, server: str) -> None:
    names = [f"many{number}" for number in range(_MANY)]
    host = tremplin.host
    before = len(host.reports)
    for name in names:
        tremplin.call(
            "CreateContainer", container_name=name, image_server=server, image_alias="busybox"
        )
    for name in names:
        made = host.wait_for(
            "UpdateCreateStatus", container=name, after=before, not_status=_CREATION.DOWNLOADING
        )
        assert made.message.status == _CREATION.CREATED, made
    started = pb.ContainerStartProgress.STARTED
    _all_report(tremplin, "StartContainer", "UpdateStartStatus", names, started)
    before = len(host.reports)
    for name in names:
        tremplin.run_in(name, "sh", "-c", "nc -l -p 8124 </dev/null >/dev/null 2>&1 &")
    host.wait_for(
        "UpdateListeningPorts",
        after=before,
        condition=lambda report: set(report.message.container_ports) == set(names),
    )
    stopped = pb.ContainerStopProgress.STOPPED
    _all_report(tremplin, "StopContainer", "UpdateStopStatus", names, stopped)
    deleted = pb.ContainerDeletionProgress.DELETED
    _all_report(tremplin, "DeleteContainer", "UpdateDeletionStatus", names, deleted)
    assert tremplin.machine.containers() == {}


def test_many(tremplin: Tremplin) -> None:
    """Create, start, list ports, stop, delete, again and again: no memory stays behind."""
    server = tremplin.machine.new_server()
    resident = []
    for _ in range(_ROUNDS):
        _life_of_many(tremplin, server)
        resident.append(_resident_kib(tremplin))
    # What the first round needs stays: threads, connections, modules.
    assert resident[-1] - resident[0] < 1536, resident


def _info_ms(tremplin: Tremplin) -> float:
    began = time.monotonic()
    answer = tremplin.call("GetContainerInfo", container_name="asked")
    assert answer.status == pb.GetContainerInfoResponse.STOPPED
    return 1000 * (time.monotonic() - began)


def test_info_during_download(tremplin: Tremplin) -> None:
    """GetContainerInfo is answered as fast while an image is downloaded."""
    machine = tremplin.machine
    tremplin.create("asked")
    machine.forget_images()
    idle = [_info_ms(tremplin) for _ in range(60)]
    with machine.slow_down(1e6):
        before = len(tremplin.host.reports)
        tremplin.call(
            "CreateContainer",
            container_name="loading",
            image_server=machine.new_server(),
            image_alias="big",
        )
        tremplin.host.wait_for("UpdateCreateStatus", container="loading", after=before)
        busy = [_info_ms(tremplin) for _ in range(60)]
        (last,) = tremplin.host.of("UpdateCreateStatus", "loading")[-1:]
        assert last.status == _CREATION.DOWNLOADING
    tremplin.call("DeleteContainer", container_name="loading")
    deleted = pb.ContainerDeletionProgress.DELETED
    tremplin.host.wait_for("UpdateDeletionStatus", container="loading", status=deleted)
    # Twice: other programs use the processors too.
    assert statistics.median(busy) < 2 * statistics.median(idle), (idle, busy)
