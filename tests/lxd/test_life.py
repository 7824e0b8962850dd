"""A container's life through both flows of hosts: create, set up, start, look, stop, delete."""

from __future__ import annotations

import json
import re
import socket
import struct
import time
from typing import TYPE_CHECKING, Any

import pytest

from agent.pb import tremplin_pb2 as pb
from tests.lxd.machine import wait_until

if TYPE_CHECKING:
    from tests.lxd.host import Tremplin

CREATION = pb.ContainerCreationProgress
START = pb.StartContainerResponse


def test_lxd_runs_already(tremplin: Tremplin) -> None:
    """A host that calls StartLxd goes on at once."""
    assert tremplin.call("StartLxd").status == pb.StartLxdResponse.ALREADY_RUNNING


def test_newer_flow(tremplin: Tremplin) -> None:
    """The user is set up and the container started from inside the handler of CREATED."""
    answers: list[Any] = []

    def on_create(message: Any) -> None:
        if message.status == CREATION.CREATED:
            answers.append(
                tremplin.call("SetUpUser", container_name="penguin", container_username="emma")
            )
            answers.append(
                tremplin.call("StartContainer", container_name="penguin", token="a-token")
            )

    tremplin.host.hooks["UpdateCreateStatus"] = on_create
    assert tremplin.create("penguin").message.status == CREATION.CREATED
    started = tremplin.host.wait_for("UpdateStartStatus", container="penguin")
    assert started.message.status == pb.ContainerStartProgress.STARTED
    user, start = answers
    assert (user.status, user.username) == (pb.SetUpUserResponse.SUCCESS, "emma")
    assert start.status in {START.STARTED, START.STARTING}
    assert start.os_release.id

    assert tremplin.run_in("penguin", "cat", "/dev/.container_token") == "a-token"
    assert "uid=1000(emma) gid=1000(emma)" in tremplin.run_in("penguin", "id", "emma")
    user = tremplin.call("GetContainerUsername", container_name="penguin")
    assert user.status == pb.GetContainerUsernameResponse.SUCCESS
    assert (user.username, user.homedir) == ("emma", "/home/emma")
    address = wait_until(
        lambda: tremplin.call("GetContainerInfo", container_name="penguin").ipv4_address,
        "an address",
    )
    text = socket.inet_ntoa(struct.pack("<I", address))
    assert text.startswith("100.115.92.")
    assert text in tremplin.run_in("penguin", "ip", "addr", "show", "eth0")

    again = tremplin.call("SetUpUser", container_name="penguin", container_username="emma")
    assert (again.status, again.username) == (pb.SetUpUserResponse.EXISTS, "emma")
    assert tremplin.call("StartContainer", container_name="penguin").status == START.RUNNING
    assert (
        tremplin.call(
            "CreateContainer",
            container_name="penguin",
            image_server=tremplin.machine.new_server(),
            image_alias="busybox",
        ).status
        == pb.CreateContainerResponse.EXISTS
    )


def test_configured_like_any_other(tremplin: Tremplin) -> None:
    """What a creation decides in LXD's place is what LXD decides, a random address included."""
    machine = tremplin.machine

    def volatile(name: str) -> dict[str, str]:
        found = json.loads(machine.run("lxc", "query", f"/1.0/instances/{name}"))["config"]
        return {key: value for key, value in found.items() if key.startswith("volatile.")}

    tremplin.create("ours")
    tremplin.create("another")
    (image,) = machine.images()
    machine.run("lxc", "init", image, "theirs")
    ours, another, theirs = (volatile(name) for name in ("ours", "another", "theirs"))
    assert ours.keys() == theirs.keys()
    once = {"volatile.uuid", "volatile.cloud-init.instance-id", "volatile.eth0.hwaddr"}
    assert {key for key in ours if ours[key] != theirs[key]} == once
    addresses = {found["volatile.eth0.hwaddr"] for found in (ours, another, theirs)}
    assert len(addresses) == 3
    assert all(re.fullmatch("00:16:3e(:[0-9a-f]{2}){3}", address) for address in addresses)

    templates = {"templates": {"/etc/made": {"when": ["create"], "template": "made.tpl"}}}
    metadata = "/1.0/instances/ours/metadata"
    machine.run("lxc", "query", "-X", "PATCH", "-d", json.dumps(templates), metadata)
    machine.run("lxc", "config", "template", "create", "ours", "made.tpl")
    machine.run("sh", "-c", "echo {{ trigger }} | lxc config template edit ours made.tpl")
    tremplin.start_container("ours")
    assert tremplin.run_in("ours", "cat", "/etc/made").split() == ["create"]
    assert "volatile.apply_template" not in volatile("ours")
    inside = tremplin.run_in("ours", "cat", "/sys/class/net/eth0/address").strip()
    assert inside == ours["volatile.eth0.hwaddr"]


def test_names_that_somebody_else_uses(tremplin: Tremplin) -> None:
    """A container of whatever maker is there as soon as lxc says so, and not there any more."""
    machine = tremplin.machine
    tremplin.create("made")
    (image,) = machine.images()

    def answer(name: str) -> int:
        before = len(tremplin.host.reports)
        response = tremplin.call(
            "CreateContainer",
            container_name=name,
            image_server=machine.new_server(),
            image_alias="busybox",
        )
        if response.status == pb.CreateContainerResponse.CREATING:
            assert tremplin.end_of_create(name, before).message.status == CREATION.CREATED
        return int(response.status)

    exists, creating = pb.CreateContainerResponse.EXISTS, pb.CreateContainerResponse.CREATING
    machine.run("lxc", "init", image, "theirs")
    assert answer("theirs") == exists
    machine.run("lxc", "rename", "theirs", "renamed")
    assert answer("renamed") == exists
    assert answer("theirs") == creating
    machine.run("lxc", "copy", "renamed", "copied")
    assert answer("copied") == exists
    machine.run("lxc", "delete", "renamed")
    assert answer("renamed") == creating
    assert set(machine.containers()) == {"made", "theirs", "renamed", "copied"}
    machine.kill_lxd()
    machine.start_lxd()
    assert answer("copied") == exists


def test_older_flow(tremplin: Tremplin) -> None:
    """No StartLxd; started first, set up afterwards; STARTED in the response to a quick start."""
    assert tremplin.create("older").message.status == CREATION.CREATED
    before = len(tremplin.host.reports)
    began = time.monotonic()
    start = tremplin.call("StartContainer", container_name="older", token="t")
    report = tremplin.host.wait_for("UpdateStartStatus", container="older", after=before)
    assert report.message.status == pb.ContainerStartProgress.STARTED
    took = report.at - began
    assert start.status == START.STARTED or took > 1.9, took
    assert start.status == START.STARTING or took < 2.5, took
    user = tremplin.call("SetUpUser", container_name="older", container_username="lee")
    assert (user.status, user.username) == (pb.SetUpUserResponse.SUCCESS, "lee")
    assert "lee" in tremplin.run_in("older", "su", "-", "lee", "-c", "id -un")


def test_stop_start_delete(tremplin: Tremplin) -> None:
    """Each answer, each report, and files that are reachable in every state."""
    tremplin.create("cycle")
    host = tremplin.host
    tremplin.start_container("cycle")
    for _ in range(2):
        before = len(host.reports)
        stop = tremplin.call("StopContainer", container_name="cycle")
        assert stop.status == pb.StopContainerResponse.STOPPING
        # LXD has not let go of it yet when this arrives.
        wait_until(lambda: tremplin.machine.containers()["cycle"] == "Stopped", "the stop")
        start = tremplin.call("StartContainer", container_name="cycle")
        assert start.status in {START.STARTED, START.STARTING}
        host.wait_for("UpdateStartStatus", container="cycle", after=before)
        stopped = host.wait_for("UpdateStopStatus", container="cycle", after=before)
        assert stopped.message.status == pb.ContainerStopProgress.STOPPED
        host.wait_for("ContainerShutdown", container="cycle", after=before)
    before = len(host.reports)
    tremplin.call("StopContainer", container_name="cycle")
    host.wait_for("UpdateStopStatus", container="cycle", after=before)
    again = tremplin.call("StopContainer", container_name="cycle")
    assert again.status == pb.StopContainerResponse.STOPPED
    info = tremplin.call("GetContainerInfo", container_name="cycle")
    assert info.status == pb.GetContainerInfoResponse.STOPPED
    user = tremplin.call("SetUpUser", container_name="cycle", container_username="kim")
    assert (user.status, user.username) == (pb.SetUpUserResponse.SUCCESS, "kim")
    name = tremplin.call("GetContainerUsername", container_name="cycle")
    assert name.status == pb.GetContainerUsernameResponse.CONTAINER_NOT_RUNNING

    delete = tremplin.call("DeleteContainer", container_name="cycle")
    assert delete.status == pb.DeleteContainerResponse.DELETING
    deleted = host.wait_for("UpdateDeletionStatus", container="cycle")
    assert deleted.message.status == pb.ContainerDeletionProgress.DELETED
    delete = tremplin.call("DeleteContainer", container_name="cycle")
    assert delete.status == pb.DeleteContainerResponse.DOES_NOT_EXIST
    assert "cycle" not in tremplin.machine.containers()
    assert "cycle_token" not in tremplin.machine.run("ls", "/run/tokens")


def test_from_files(tremplin: Tremplin) -> None:
    """An image in two files of the VM becomes a container and leaves no image behind."""
    tremplin.machine.forget_images()
    rootfs, metadata = tremplin.machine.image_files("busybox")
    before = tremplin.begin_create_from_files("files", rootfs=rootfs, metadata=metadata)
    end = tremplin.end_of_create("files", before)
    assert end.message.status == CREATION.CREATED, end
    assert tremplin.machine.containers() == {"files": "Stopped"}
    assert tremplin.machine.images() == []


def test_privileged(tremplin: Tremplin) -> None:
    """The privilege level is part of the start."""
    tremplin.create("level")
    for level, wanted in (
        (pb.StartContainerRequest.PRIVILEGED, "true"),
        (pb.StartContainerRequest.UNCHANGED, "true"),
        (pb.StartContainerRequest.UNPRIVILEGED, "false"),
    ):
        tremplin.start_container("level", privilege_level=level)
        found = tremplin.machine.run("lxc", "config", "get", "level", "security.privileged")
        assert found.strip() == wanted
        uids = tremplin.machine.run("lxc", "exec", "level", "--", "cat", "/proc/self/uid_map")
        roots_uid_outside = uids.split()[1]
        assert (roots_uid_outside == "0") is (wanted == "true")
        tremplin.machine.run("lxc", "stop", "--force", "level")


@pytest.mark.parametrize(
    ("method", "fields", "status", "reason"),
    [
        ("CreateContainer", {}, "FAILED", "needs a name"),
        ("CreateContainer", {"container_name": "a"}, "FAILED", "image_server"),
        ("CreateContainer", {"container_name": "a_b"}, "FAILED", "letters, digits and dashes"),
        (
            "CreateContainer",
            {"container_name": "../x", "image_server": "http://h", "image_alias": "a"},
            "FAILED",
            "letters, digits and dashes",
        ),
        (
            "CreateContainer",
            {"container_name": "crostini-inprogress-create"},
            "FAILED",
            "being made",
        ),
        (
            "CreateContainer",
            {"container_name": "a", "rootfs_path": "/nonexistent", "metadata_path": "/etc/hosts"},
            "FAILED",
            "No such file",
        ),
        (
            "CreateContainer",
            {"container_name": "a", "image_server": "ftp://h", "image_alias": "a"},
            "FAILED",
            "https://",
        ),
        ("StartContainer", {}, "FAILED", "needs a name"),
        ("StartContainer", {"container_name": "nobody"}, "FAILED", "no such container"),
        ("StopContainer", {}, "FAILED", "needs a name"),
        ("StopContainer", {"container_name": "nobody"}, "DOES_NOT_EXIST", ""),
        ("DeleteContainer", {}, "FAILED", "needs a name"),
        ("DeleteContainer", {"container_name": "nobody"}, "DOES_NOT_EXIST", ""),
        ("SetUpUser", {}, "FAILED", "needs a name"),
        (
            "SetUpUser",
            {"container_name": "nobody", "container_username": "u"},
            "FAILED",
            "no such container",
        ),
        ("GetContainerUsername", {}, "CONTAINER_NOT_FOUND", ""),
        ("GetContainerUsername", {"container_name": "nobody"}, "CONTAINER_NOT_FOUND", ""),
        ("GetContainerInfo", {}, "NOT_FOUND", ""),
        ("GetContainerInfo", {"container_name": "nobody"}, "NOT_FOUND", ""),
    ],
)
def test_bad_input(
    tremplin: Tremplin, method: str, fields: dict[str, str], status: str, reason: str
) -> None:
    """The status says so, the reason why, and nothing has changed."""
    response = tremplin.call(method, **fields)
    assert type(response).Status.Name(response.status) == status
    assert reason in response.failure_reason
    assert tremplin.machine.containers() == {}


@pytest.mark.parametrize("username", ["", "root", "a b", "-x", "x:y", "../../etc", "a" * 40])
def test_bad_username(tremplin: Tremplin, username: str) -> None:
    """No user is made, and what was given as a name is not repeated."""
    tremplin.create("names")
    before = tremplin.machine.run("lxc", "file", "pull", "names/etc/passwd", "-")
    response = tremplin.call("SetUpUser", container_name="names", container_username=username)
    assert response.status == pb.SetUpUserResponse.FAILED
    assert "$USERNAME" in response.failure_reason
    assert not username or username == "root" or username not in response.failure_reason
    assert tremplin.machine.run("lxc", "file", "pull", "names/etc/passwd", "-") == before


def test_host_refuses_reports(tremplin: Tremplin) -> None:
    """What the host answers with an error it has heard: it is not told again, but of the rest."""

    def refuse(message: Any) -> None:
        raise RuntimeError(f"the host does not want {message.container_name}")

    tremplin.host.hooks["UpdateCreateStatus"] = refuse
    assert tremplin.create("refused").message.status == CREATION.CREATED
    tremplin.start_container("refused")
    told = [message.status for message in tremplin.host.of("UpdateCreateStatus", "refused")]
    assert told.count(CREATION.CREATED) == 1
    # It would be carried on if it had not been told.
    tremplin.restart()
    told = [message.status for message in tremplin.host.of("UpdateCreateStatus", "refused")]
    assert told.count(CREATION.CREATED) == 1


def test_delete_while_running(tremplin: Tremplin) -> None:
    """It is stopped first; the host hears of both."""
    tremplin.create("busy")
    tremplin.start_container("busy")
    tremplin.call("DeleteContainer", container_name="busy")
    deleted = tremplin.host.wait_for("UpdateDeletionStatus", container="busy")
    assert deleted.message.status == pb.ContainerDeletionProgress.DELETED, deleted
    tremplin.host.wait_for("ContainerShutdown", container="busy")
    assert tremplin.machine.containers() == {}
