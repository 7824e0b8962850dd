"""Shifted ids: LXD shifts a container's files in place, and is killed in the middle of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from agent.pb import tremplin_pb2 as pb
from tests.lxd.host import start_is_cut_off
from tests.lxd.machine import wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.lxd.host import Report, Tremplin

_FILES = 10_000
_START = pb.StartContainerRequest
_STARTED = pb.ContainerStartProgress.STARTED
_STARTING = pb.ContainerStartProgress.STARTING
_FAILED = pb.ContainerStartProgress.FAILED


@pytest.fixture
def made(tremplin: Tremplin) -> Tremplin:
    """Tremplin with a container `ids` of many files, which was never started."""
    tremplin.create("ids")
    many = f"mkdir {_rootfs(tremplin)}/many; cd {_rootfs(tremplin)}/many; touch $(seq {_FILES})"
    tremplin.machine.run("sh", "-c", many)
    return tremplin


def _rootfs(tremplin: Tremplin) -> Path:
    return tremplin.machine.lxd_dir / "storage-pools/default/containers/ids/rootfs"


def _outside(tremplin: Tremplin) -> Path:
    inside = str(_rootfs(tremplin))
    return type(_rootfs(tremplin))(f"/proc/{tremplin.machine.init_pid}/root{inside}")


def _first_shifted(tremplin: Tremplin) -> Path:
    # LXD goes by the names' order; the folder itself comes before any file in it.
    return _outside(tremplin) / "many/1"


def _start(tremplin: Tremplin, level: _START.PrivilegeLevel.ValueType = _START.UNCHANGED) -> Report:
    before = len(tremplin.host.reports)
    tremplin.call("StartContainer", container_name="ids", privilege_level=level)
    return tremplin.host.wait_for("UpdateStartStatus", container="ids", after=before)


def _stop(tremplin: Tremplin) -> None:
    tremplin.machine.run("lxc", "stop", "--force", "ids")


def _owners(tremplin: Tremplin) -> set[int]:
    return {path.stat().st_uid for path in (_outside(tremplin) / "many").iterdir()}


def _kill_in_the_middle(tremplin: Tremplin, level: _START.PrivilegeLevel.ValueType) -> int:
    # The number of reports from before.
    before = len(tremplin.host.reports)
    file = _first_shifted(tremplin)
    old = file.stat().st_uid
    request = _START(container_name="ids", privilege_level=level)
    call = tremplin.stub.StartContainer.future(request, timeout=60)
    wait_until(lambda: file.stat().st_uid != old, "the shift")
    tremplin.machine.kill_lxd()
    call.result()
    assert len(_owners(tremplin)) == 2, "LXD was killed too late or too early"
    return before


def _whole_inside(tremplin: Tremplin) -> bool:
    lines = tremplin.run_in("ids", "sh", "-c", "ls -ln /many | sed 1d | awk '{print $3, $4}'")
    return set(lines.splitlines()) == {"0 0"}


def _snapshots(tremplin: Tremplin) -> str:
    return tremplin.machine.run("lxc", "query", "/1.0/instances/ids/snapshots").strip()


def test_privilege_changes(made: Tremplin) -> None:
    """The ids are shifted there and back, and no copy stays behind."""
    assert _start(made).message.status == _STARTED
    for level, owner in ((_START.PRIVILEGED, 0), (_START.UNPRIVILEGED, 1_000_000)):
        _stop(made)
        assert _start(made, level).message.status == _STARTED
        assert _owners(made) == {owner}
        assert _whole_inside(made)
        assert _snapshots(made) == "[]"


def test_lxd_killed_in_the_middle(made: Tremplin) -> None:
    """FAILED; the container is what it was before, and the next start is a good one."""
    assert _start(made, _START.PRIVILEGED).message.status == _STARTED
    _stop(made)
    before = _kill_in_the_middle(made, _START.UNPRIVILEGED)
    made.machine.start_lxd()
    end = made.host.wait_for("UpdateStartStatus", container="ids", after=before)
    assert end.message.status == _FAILED
    assert _owners(made) == {0}
    assert _start(made, _START.UNPRIVILEGED).message.status == _STARTED
    assert _whole_inside(made)
    assert _snapshots(made) == "[]"


def test_power_cut_in_the_middle(made: Tremplin) -> None:
    """Nobody remembers that it was started; the next start begins with the copy."""
    assert _start(made).message.status == _STARTED
    made.run_in("ids", "sh", "-c", "echo mine >/root/mine; sync")
    _stop(made)
    _kill_in_the_middle(made, _START.PRIVILEGED)
    made.kill()
    made.machine.run("rm", "/run/maitred/tremplin-operations.json")
    made.machine.start_lxd()
    made.start()
    assert len(_owners(made)) == 2
    assert _start(made).message.status == _STARTED
    assert _whole_inside(made)
    assert made.run_in("ids", "cat", "/root/mine") == "mine\n"
    assert _snapshots(made) == "[]"


def test_tremplin_killed_in_the_middle(made: Tremplin) -> None:
    """LXD goes on, and the tremplin that comes after ends it."""
    assert _start(made).message.status == _STARTED
    _stop(made)
    before = len(made.host.reports)
    file = _first_shifted(made)
    request = _START(container_name="ids", privilege_level=_START.PRIVILEGED)
    call = made.stub.StartContainer.future(request, timeout=60)
    wait_until(lambda: file.stat().st_uid == 0, "the shift")
    made.restart()
    assert start_is_cut_off(call)
    end = made.host.wait_for("UpdateStartStatus", container="ids", after=before)
    assert end.message.status == _STARTED
    assert _owners(made) == {0}
    assert _snapshots(made) == "[]"


def test_first_start_cut_short(made: Tremplin) -> None:
    """There is no copy of what was never used: it is refused, and made again."""
    before = _kill_in_the_middle(made, _START.UNCHANGED)
    made.machine.start_lxd()
    made.host.wait_for("UpdateStartStatus", container="ids", after=before)
    end = _start(made)
    assert end.message.status == _FAILED
    assert "its first start was cut short" in end.message.failure_reason
    assert made.create("ids").message.status == pb.ContainerCreationProgress.CREATED
    assert _start(made).message.status == _STARTED


def test_disk_full_at_the_end(made: Tremplin) -> None:
    """The start may fail or not; when there is room again, nothing is lost and no copy stays."""
    machine = made.machine
    assert _start(made).message.status == _STARTED
    made.run_in("ids", "sh", "-c", "echo mine >/root/mine")
    _stop(made)
    before = len(made.host.reports)
    with machine.gate("ids") as gate:
        request = _START(container_name="ids", privilege_level=_START.PRIVILEGED)
        call = made.stub.StartContainer.future(request, timeout=60)
        wait_until(gate.reached, "the end of the shift")
        with machine.full_disk():
            gate.open()
            call.result()
            end = made.host.wait_for(
                "UpdateStartStatus", container="ids", not_status=_STARTING, after=before
            )
            assert end.message.status == _STARTED or end.message.failure_reason
    if end.message.status == _FAILED:
        assert _start(made, _START.PRIVILEGED).message.status == _STARTED
    wait_until(lambda: _snapshots(made) == "[]", "the end of the copy")
    assert machine.containers() == {"ids": "Running"}
    assert made.run_in("ids", "cat", "/root/mine") == "mine\n"
    assert _owners(made) == {0}
    assert _whole_inside(made)


@pytest.mark.parametrize("state", ["Stopped", "Running"])
def test_copy_that_stayed(made: Tremplin, state: str) -> None:
    """Whoever forgot the copy: what the container has done since its start is not swapped away."""
    machine = made.machine
    assert _start(made).message.status == _STARTED
    _stop(made)
    with machine.gate("ids") as gate:
        request = _START(container_name="ids", privilege_level=_START.PRIVILEGED)
        call = made.stub.StartContainer.future(request, timeout=60)
        wait_until(gate.reached, "the end of the shift")
        made.kill()
        assert start_is_cut_off(call)
        machine.run("rm", "/run/maitred/tremplin-operations.json")
    assert "tremplin-remap" in _snapshots(made)
    wait_until(lambda: machine.containers() == {"ids": "Running"}, "the start")
    made.run_in("ids", "sh", "-c", "echo mine >/root/mine")
    if state == "Stopped":
        _stop(made)
    made.start()
    if state == "Stopped":
        assert _start(made).message.status == _STARTED
    wait_until(lambda: _snapshots(made) == "[]", "the end of the copy")
    assert machine.containers() == {"ids": "Running"}
    assert made.run_in("ids", "cat", "/root/mine") == "mine\n"
    assert _owners(made) == {0}


def test_in_another_pool(tremplin: Tremplin) -> None:
    """A container that somebody has put into a storage pool of their own starts like any other."""
    machine = tremplin.machine
    tremplin.create("ours")
    (image,) = machine.images()
    machine.run("lxc", "storage", "create", "other", "dir")
    machine.run("lxc", "init", image, "ids", "--storage", "other")
    assert _start(tremplin).message.status == _STARTED
    running = tremplin.call("StartContainer", container_name="ids")
    assert (running.status, running.os_release.id) == (
        pb.StartContainerResponse.RUNNING,
        "busybox",
    )
    _stop(tremplin)
    assert _start(tremplin, _START.PRIVILEGED).message.status == _STARTED
    assert tremplin.run_in("ids", "cat", "/proc/self/uid_map").split() == ["0", "0", "4294967295"]
    _stop(tremplin)
    machine.run("lxc", "delete", "ids")
    machine.run("lxc", "storage", "delete", "other")
