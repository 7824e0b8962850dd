"""CreateContainer from an image server: progress, and every way a download can go wrong."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING

import pytest

from agent.pb import tremplin_pb2 as pb
from tests.lxd.machine import wait_until

if TYPE_CHECKING:
    from tests.lxd.host import Report, Tremplin

CREATION = pb.ContainerCreationProgress


@pytest.fixture(autouse=True)
def _no_images(tremplin: Tremplin) -> None:
    tremplin.machine.forget_images()


def _nothing_is_left(tremplin: Tremplin) -> None:
    machine = tremplin.machine
    assert machine.containers() == {}
    assert machine.images() == []
    assert machine.run("ls", machine.lxd_dir / "images").split() == []


def _works_now(tremplin: Tremplin, name: str) -> None:
    tremplin.machine.behave()
    assert tremplin.create(name, alias="big").message.status == CREATION.CREATED
    assert tremplin.machine.containers() == {name: "Stopped"}


def test_progress(tremplin: Tremplin) -> None:
    """Percentages rise and never fall, and none stays away for longer than about a second."""
    with tremplin.machine.slow_down(4e6):
        before = tremplin.begin_create("progress")
        assert tremplin.end_of_create("progress", before).message.status == CREATION.CREATED
    reports = [r for r in tremplin.host.reports[before:] if r.method == "UpdateCreateStatus"]
    percents = [r.message.download_progress for r in reports[:-1]]
    assert percents == sorted(percents)
    assert percents[-1] == 100
    assert len(set(percents)) > 20
    downloading = [r.at for r in reports[:-1]]
    assert max(b - a for a, b in itertools.pairwise(downloading)) < 1.5


def test_same_image_twice_at_once(tremplin: Tremplin) -> None:
    """The second one shows progress too, and both are whole."""
    with tremplin.machine.slow_down(4e6):
        server = tremplin.machine.new_server()
        before = tremplin.begin_create("one", server=server)
        tremplin.host.wait_for("UpdateCreateStatus", container="one", after=before)
        tremplin.begin_create("two", server=server)
        for name in ("one", "two"):
            assert tremplin.end_of_create(name, before).message.status == CREATION.CREATED
    percents = [
        message.download_progress for message in tremplin.host.of("UpdateCreateStatus", "two")
    ]
    assert len(set(percents)) > 10
    assert percents[:-1] == sorted(percents[:-1])
    assert set(tremplin.machine.containers()) == {"one", "two"}


def test_different_images_at_once(tremplin: Tremplin) -> None:
    """Each has its own progress."""
    before = tremplin.begin_create("small", alias="busybox")
    tremplin.begin_create("large", alias="big")
    for name in ("small", "large"):
        assert tremplin.end_of_create(name, before).message.status == CREATION.CREATED
    assert set(tremplin.machine.containers()) == {"small", "large"}


def test_server_stalls(tremplin: Tremplin) -> None:
    """DOWNLOAD_TIMED_OUT after the time of the option (3 s here) without a byte."""
    tremplin.machine.behave(stall_after=2_000_000)
    before = tremplin.begin_create("stall")
    began = time.monotonic()
    end = tremplin.end_of_create("stall", before)
    assert end.message.status == CREATION.DOWNLOAD_TIMED_OUT
    assert "cannot create container stall: no byte came" in end.message.failure_reason
    assert 2.5 < end.at - began < 8
    _nothing_is_left(tremplin)
    _works_now(tremplin, "stall")


def test_slow_is_not_stalled(tremplin: Tremplin) -> None:
    """A download of which one percent takes longer than the option is left alone."""
    with tremplin.machine.slow_down(20_000):
        before = tremplin.begin_create("slow")
        time.sleep(5)  # longer than the option; that nothing happens cannot be waited for
        ends = [
            message
            for message in tremplin.host.of("UpdateCreateStatus", "slow")
            if message.status != CREATION.DOWNLOADING
        ]
        assert ends == []
    assert tremplin.end_of_create("slow", before).message.status == CREATION.CREATED


def test_wrong_checksum(tremplin: Tremplin) -> None:
    """The image is thrown away."""
    tremplin.machine.behave(corrupt=True)
    before = tremplin.begin_create("checksum")
    end = tremplin.end_of_create("checksum", before)
    assert end.message.status == CREATION.FAILED
    assert "Hash mismatch" in end.message.failure_reason
    _nothing_is_left(tremplin)
    _works_now(tremplin, "checksum")


@pytest.mark.parametrize(
    ("alias", "server", "reason"),
    [
        ("debian/nonexistent", "", "couldn't be found"),
        ("busybox", "http://127.0.0.1:9", "connection refused"),
        ("busybox", "http://nowhere.invalid", "nowhere.invalid"),
    ],
)
def test_no_such_image(tremplin: Tremplin, alias: str, server: str, reason: str) -> None:
    """An unknown alias, a server that is not there, a name that means nothing."""
    before = tremplin.begin_create("missing", alias=alias, server=server)
    end = tremplin.end_of_create("missing", before)
    assert end.message.status == CREATION.FAILED
    assert reason in end.message.failure_reason
    assert end.message.failure_reason.startswith("cannot create container missing: ")
    _nothing_is_left(tremplin)
    _works_now(tremplin, "missing")


def test_cancelled_by_delete(tremplin: Tremplin) -> None:
    """DeleteContainer gives up a creation: CANCELLED, then DELETED."""
    with tremplin.machine.slow_down(500_000):
        before = tremplin.begin_create("given-up")
        tremplin.host.wait_for("UpdateCreateStatus", container="given-up", after=before)
        delete = tremplin.call("DeleteContainer", container_name="given-up")
        assert delete.status == pb.DeleteContainerResponse.DELETING
        assert tremplin.end_of_create("given-up", before).message.status == CREATION.CANCELLED
        deleted = tremplin.host.wait_for("UpdateDeletionStatus", container="given-up", after=before)
        assert deleted.message.status == pb.ContainerDeletionProgress.DELETED
    _nothing_is_left(tremplin)
    _works_now(tremplin, "given-up")


def test_cancelled_in_lxd(tremplin: Tremplin) -> None:
    """An operation that somebody cancels with lxc ends as CANCELLED."""
    machine = tremplin.machine
    with machine.slow_down(500_000):
        before = tremplin.begin_create("cancelled")
        tremplin.host.wait_for("UpdateCreateStatus", container="cancelled", after=before)
        (operation,) = machine.api.operations.get().json()["metadata"]["running"]
        machine.run("lxc", "operation", "delete", operation.rsplit("/", 1)[1])
        assert tremplin.end_of_create("cancelled", before).message.status == CREATION.CANCELLED
    _nothing_is_left(tremplin)
    _works_now(tremplin, "cancelled")


def test_asked_twice(tremplin: Tremplin) -> None:
    """A second CreateContainer of the same name joins the first."""
    with tremplin.machine.slow_down(4e6):
        before = tremplin.begin_create("asked")
        tremplin.begin_create("asked")
        assert tremplin.end_of_create("asked", before).message.status == CREATION.CREATED
    finals = [m for m in tremplin.host.of("UpdateCreateStatus", "asked") if m.status != 1]
    assert len(finals) == 1


def test_name_taken_meanwhile(tremplin: Tremplin) -> None:
    """Somebody else's container keeps the name; nothing of ours is left."""
    machine = tremplin.machine
    tremplin.create("other")
    (image,) = machine.images()
    with machine.slow_down(4e6):
        before = tremplin.begin_create("taken")
        tremplin.host.wait_for("UpdateCreateStatus", container="taken", after=before)
        machine.run("lxc", "init", image, "taken")
        machine.run("lxc", "config", "set", "taken", "user.mine=yes")
        end = tremplin.end_of_create("taken", before)
    assert end.message.status == CREATION.FAILED
    assert "already in use" in end.message.failure_reason
    assert machine.containers() == {"other": "Stopped", "taken": "Stopped"}
    assert machine.run("lxc", "config", "get", "taken", "user.mine").strip() == "yes"


def test_image_there(tremplin: Tremplin) -> None:
    """What an alias was found to mean a moment ago needs no server, nor what LXD keeps of its
    index; an image that somebody has removed is downloaded again.
    """
    machine = tremplin.machine
    server = machine.new_server()
    assert tremplin.create("first", server=server).message.status == CREATION.CREATED
    (image,) = machine.images()
    wait_until(lambda: machine.is_on_disk(image), "the image on the disk")

    machine.run("find", machine.lxd_dir / "cache", "-name", "*.json", "-delete")
    machine.behave(down=True)
    assert tremplin.create("second", server=server).message.status == CREATION.CREATED
    other = tremplin.create("third", server=server, alias="busybox/1").message
    assert other.status == CREATION.FAILED
    assert "404" in other.failure_reason

    machine.behave()
    machine.forget_images()
    assert tremplin.create("fourth", server=server).message.status == CREATION.CREATED
    assert machine.images() == [image]
    assert set(machine.containers()) == {"first", "second", "fourth"}


def test_broken_files(tremplin: Tremplin) -> None:
    """A root filesystem that is none: FAILED, nothing is left, and the right file works."""
    rootfs, metadata = tremplin.machine.image_files("busybox")

    def create(rootfs: str) -> Report:
        before = tremplin.begin_create_from_files("broken", rootfs=rootfs, metadata=metadata)
        return tremplin.end_of_create("broken", before)

    assert create("/etc/services").message.status == CREATION.FAILED
    _nothing_is_left(tremplin)
    assert create(rootfs).message.status == CREATION.CREATED
    assert tremplin.machine.containers() == {"broken": "Stopped"}


def test_disk_full(tremplin: Tremplin) -> None:
    """FAILED with the system's words; it works when there is room again."""
    machine = tremplin.machine
    with machine.full_disk(left=5 * 1024 * 1024):
        before = tremplin.begin_create("full")
        end = tremplin.end_of_create("full", before)
        assert end.message.status == CREATION.FAILED
        assert "no space left on device" in end.message.failure_reason.lower()
    # As long as the disk is full LXD cannot remove anything.
    wait_until(lambda: machine.containers() == {} and machine.images() == [], "the clean-up")
    _nothing_is_left(tremplin)
    _works_now(tremplin, "full")


def _is_marked(tremplin: Tremplin, name: str) -> bool:
    metadata = tremplin.machine.api.instances[name].metadata.get().json()["metadata"]
    return "tremplinSetupFinished" in metadata["properties"]


@pytest.mark.parametrize("watched", [True, False])
def test_started_by_somebody_else(tremplin: Tremplin, *, watched: bool) -> None:
    """A container that was in use is never made again, whoever started it, seen or not."""
    tremplin.create("theirs")
    if not watched:
        tremplin.kill()
    tremplin.machine.run("lxc", "start", "theirs")
    if not watched:
        tremplin.start()
    wait_until(lambda: _is_marked(tremplin, "theirs"), "the mark")
    tremplin.machine.run("lxc", "stop", "--force", "theirs")
    answer = tremplin.call(
        "CreateContainer",
        container_name="theirs",
        image_server=tremplin.machine.new_server(),
        image_alias="busybox",
    )
    assert answer.status == pb.CreateContainerResponse.EXISTS


def test_unfinished_is_made_again(tremplin: Tremplin) -> None:
    """A container of ours that was never started is made again; others are whole."""
    tremplin.create("again")
    tremplin.machine.run("lxc", "config", "set", "again", "user.old=yes")
    assert tremplin.create("again").message.status == CREATION.CREATED
    assert tremplin.machine.run("lxc", "config", "get", "again", "user.old").strip() == ""
    tremplin.machine.run("lxc", "init", tremplin.machine.images()[0], "foreign")
    response = tremplin.call(
        "CreateContainer", container_name="foreign", image_server="http://h", image_alias="a"
    )
    assert response.status == pb.CreateContainerResponse.EXISTS


def test_host_was_away(tremplin: Tremplin) -> None:
    """What happened meanwhile reaches it when it is back: the end and the last percentage."""
    host = tremplin.host
    host.stop()
    before = tremplin.begin_create("away", alias="busybox")
    wait_until(lambda: tremplin.machine.containers() == {"away": "Stopped"}, "the container")
    host.start()
    assert tremplin.end_of_create("away", before).message.status == CREATION.CREATED
    statuses = [message.status for message in host.of("UpdateCreateStatus", "away")]
    assert len(statuses) <= 4
