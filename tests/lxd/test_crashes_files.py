"""Kills while a container is made from two files of the VM: of tremplin, and of LXD."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agent.pb import tremplin_pb2 as pb
from tests.lxd.machine import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.lxd.host import Report, Tremplin

pytestmark = pytest.mark.usefixtures("no_images")

_CREATION = pb.ContainerCreationProgress
_MOMENTS = {
    "sent": "images/lxd_build_*/lxd_post_*",
    "unpacked": "storage-pools/default/images/*/rootfs/*",
    "copied": "storage-pools/default/containers/crostini-inprogress-create*/rootfs/*",
}
"""What is in LXD's directory while the image is being sent to LXD, is being unpacked in the pool,
and the container has been made of it.
"""


def _begin(tremplin: Tremplin) -> int:
    rootfs, metadata = tremplin.machine.image_files("big")
    return tremplin.begin_create_from_files("interrupted", rootfs=rootfs, metadata=metadata)


def _end(tremplin: Tremplin, after: int) -> Report:
    return tremplin.host.wait_for(
        "UpdateCreateStatus", container="interrupted", not_status=_CREATION.DOWNLOADING, after=after
    )


@contextlib.contextmanager
def _lxd_held_at(tremplin: Tremplin, moment: str) -> Iterator[None]:
    # It cannot be over before the kill then.
    machine = tremplin.machine
    directory = Path(f"/proc/{machine.init_pid}/root{machine.lxd_dir}")
    deadline = time.monotonic() + 30
    while not next(directory.glob(_MOMENTS[moment]), None):
        assert time.monotonic() < deadline, moment
    with machine.lxd_held():
        yield


def _one_end(tremplin: Tremplin, after: int) -> int:
    status: int = _end(tremplin, after).message.status
    # Whatever else there was to tell has been told when this is answered.
    tremplin.call("GetContainerInfo", container_name="interrupted")
    ends = [
        message
        for message in tremplin.host.of("UpdateCreateStatus", "interrupted")
        if message.status != _CREATION.DOWNLOADING
    ]
    assert len(ends) == 1, ends
    return status


def _no_trace(tremplin: Tremplin, containers: dict[str, str]) -> None:
    machine = tremplin.machine
    assert machine.containers() == containers
    wait_until(lambda: machine.images() == [], "the end of the image")
    for place in ("images", "storage-pools/default/images"):
        wait_until(
            lambda place=place: machine.run("ls", machine.lxd_dir / place) == "",  # type: ignore[misc]  # bound now
            f"an empty {place}",
        )
    volumes = machine.run("ls", machine.lxd_dir / "storage-pools/default/containers")
    assert volumes.split() == list(containers)


@pytest.mark.parametrize("moment", _MOMENTS)
def test_tremplin_killed(tremplin: Tremplin, moment: str) -> None:
    """It is carried on to one CREATED."""
    before = _begin(tremplin)
    with _lxd_held_at(tremplin, moment):
        tremplin.kill()
    tremplin.start()
    assert _one_end(tremplin, before) == _CREATION.CREATED
    _no_trace(tremplin, {"interrupted": "Stopped"})


@pytest.mark.parametrize("moment", _MOMENTS)
def test_lxd_killed(tremplin: Tremplin, moment: str) -> None:
    """FAILED, nothing is left, and the next creation works."""
    before = _begin(tremplin)
    with _lxd_held_at(tremplin, moment):
        tremplin.machine.kill_lxd()
    tremplin.machine.start_lxd()
    status = _one_end(tremplin, before)
    # Of the last moment little is left when it is seen.
    if status == _CREATION.CREATED and moment == "copied":
        _no_trace(tremplin, {"interrupted": "Stopped"})
        return
    assert status == _CREATION.FAILED
    _no_trace(tremplin, {})
    before = _begin(tremplin)
    assert _end(tremplin, before).message.status == _CREATION.CREATED
    _no_trace(tremplin, {"interrupted": "Stopped"})
