"""How LXD is set up, and what of it is seen in a container."""

from __future__ import annotations

import io
import json
import tarfile
from typing import TYPE_CHECKING, Any

import pytest

from agent.pb import tremplin_pb2 as pb

if TYPE_CHECKING:
    from pathlib import Path

    from tests.lxd.host import Tremplin

_IDS = (1000, 1001, 655360, 665357)


def _object(tremplin: Tremplin, *path: str) -> Any:
    node = tremplin.machine.api
    for segment in path:
        node = node[segment]
    return node.get().json()["metadata"]


def _settings(tremplin: Tremplin) -> list[Any]:
    paths = (("storage-pools", "default"), ("networks", "lxdbr0"), ("profiles", "default"))
    found = [_object(tremplin, *path) for path in paths]
    return [(each["config"], each.get("devices")) for each in found]


def test_settings(tremplin: Tremplin) -> None:
    """The pool, the bridge and the profile of the contract."""
    pool = _object(tremplin, "storage-pools", "default")
    assert pool["driver"] == "btrfs"
    assert pool["config"]["source"] == f"{tremplin.machine.lxd_dir}/storage-pools/default"
    bridge = _object(tremplin, "networks", "lxdbr0")
    assert (bridge["type"], bridge["managed"]) == ("bridge", True)
    config = bridge["config"]
    assert config["ipv4.address"] == "100.115.92.1/24"
    assert config["ipv4.dhcp.expiry"] == "infinite"
    assert config["ipv6.address"] == "none"
    assert config["raw.dnsmasq"].split() == [
        "resolv-file=/run/resolv.conf", "dhcp-authoritative", "no-ping"
    ]  # fmt: skip
    profile = _object(tremplin, "profiles", "default")
    config, devices = profile["config"], profile["devices"]
    assert config["security.nesting"] == "true"
    assert config["boot.autostart"] == "false"
    assert config["boot.host_shutdown_timeout"] == "9"
    assert sorted(config["raw.idmap"].splitlines()) == sorted(
        f"{kind} {number} {number}" for kind in ("uid", "gid") for number in _IDS
    )
    assert devices["eth0"] | {"name": "eth0"} == devices["eth0"]
    assert devices["eth0"]["parent"] == "lxdbr0"
    assert (devices["root"]["path"], devices["root"]["pool"]) == ("/", "default")
    for name, path in (("fuse", "/dev/fuse"), ("tun", "/dev/net/tun")):
        assert (devices[name]["path"], devices[name]["mode"]) == (path, "0666")
    assert devices["shared"]["path"] == "/mnt/chromeos"


def test_seen_inside(tremplin: Tremplin) -> None:
    """The devices, the directory shared with the host, and the ids that are the same."""
    machine = tremplin.machine
    tremplin.create("inside")
    tremplin.start_container("inside")
    modes = tremplin.run_in("inside", "stat", "-c", "%a", "/dev/fuse", "/dev/net/tun")
    assert modes.split() == ["666", "666"]
    machine.run("sh", "-c", "echo hello >/run/shared/file")
    assert tremplin.run_in("inside", "cat", "/mnt/chromeos/file") == "hello\n"
    for kind in ("uid", "gid"):
        lines = tremplin.run_in("inside", "cat", f"/proc/self/{kind}_map").splitlines()
        ranges = [[int(field) for field in line.split()] for line in lines]
        same = {
            number for inside, outside, count in ranges for number in _IDS
            if inside == outside and inside <= number < inside + count
        }  # fmt: skip
        assert same == set(_IDS)
        assert [outside for inside, outside, _ in ranges if inside == 0] == [1_000_000]


def test_markers(tremplin: Tremplin) -> None:
    """The properties of the image's metadata in a container: ours, and after the first start."""

    def properties() -> dict[str, str]:
        found = _object(tremplin, "instances", "marked", "metadata")["properties"]
        return {key: value for key, value in found.items() if "remplin" in key}

    tremplin.create("marked")
    assert properties() == {"createdByTremplin": "true"}
    tremplin.start_container("marked")
    assert properties() == {"createdByTremplin": "true", "tremplinSetupFinished": "true"}


@pytest.mark.parametrize(
    ("metadata", "has_fifo"),
    [
        ("properties:\n    os: Busybox\n    release: '1'\n", False),
        ("properties:\n    os: Busybox\n    release: '1'\n", True),
        ("properties: {os: Busybox, release: '1'}\n", False),
        ("properties:\n    os: Busybox\n    release: '1'\n    createdByTremplin: 'no'\n", False),
        ('{"properties": {"os": "Busybox", "release": "1"}}', False),
    ],
)
def test_markers_in_any_metadata(
    tremplin: Tremplin, tmp_path: Path, metadata: str, *, has_fifo: bool
) -> None:
    """The image's other properties stay, and LXD reads it all.

    has_fifo: in the image, under the name of a file that tremplin would write.
    """
    packed = tmp_path / "metadata.tar"
    content = f"architecture: x86_64\ncreation_date: 1\n{metadata}"
    if metadata.startswith("{"):
        content = json.dumps({"architecture": "x86_64", "creation_date": 1} | json.loads(metadata))
    with tarfile.open(packed, "w") as archive:
        member = tarfile.TarInfo("metadata.yaml")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content.encode()))
        if has_fifo:
            fifo = tarfile.TarInfo("metadata.yaml.new")
            fifo.type = tarfile.FIFOTYPE
            archive.addfile(fifo)
    tmp_path.chmod(0o755)
    rootfs, _ = tremplin.machine.image_files("busybox")
    before = tremplin.begin_create_from_files("laid", rootfs=rootfs, metadata=packed)
    created = tremplin.end_of_create("laid", before)
    assert created.message.status == pb.ContainerCreationProgress.CREATED, created
    found = _object(tremplin, "instances", "laid", "metadata")
    properties = {"os": "Busybox", "release": "1", "createdByTremplin": "true"}
    assert (found["creation_date"], found["properties"]) == (1, properties)
    tremplin.start_container("laid")
    found = _object(tremplin, "instances", "laid", "metadata")
    assert found["properties"] == properties | {"tremplinSetupFinished": "true"}


def test_set_up_again(tremplin: Tremplin) -> None:
    """The next tremplin changes nothing but what it is given anew: the bridge's address."""
    before = _settings(tremplin)
    tremplin.restart(lxd_subnet="100.115.93.1/24")
    try:
        after = _settings(tremplin)
        assert after[1][0]["ipv4.address"] == "100.115.93.1/24"
    finally:
        tremplin.restart()
    after[1][0]["ipv4.address"] = "100.115.92.1/24"
    assert after == before == _settings(tremplin)


def test_no_new_database_without_pid_1(tremplin: Tremplin) -> None:
    """An LXD that somebody else runs is not stopped: one FAILED, and it goes on."""
    before = len(tremplin.host.reports)
    answer = tremplin.call("StartLxd", reset_lxd_db=True)
    assert answer.status == pb.StartLxdResponse.STARTING
    end = tremplin.host.wait_for(
        "UpdateStartLxdStatus", status=pb.StartLxdProgress.FAILED, after=before
    )
    assert end.message.failure_reason.startswith("cannot reset the database of LXD: ")
    assert tremplin.call("StartLxd").status == pb.StartLxdResponse.ALREADY_RUNNING
    told = [r for r in tremplin.host.reports[before:] if r.method == "UpdateStartLxdStatus"]
    statuses = [report.message.status for report in told]
    assert statuses[-1] == pb.StartLxdProgress.FAILED
    # It may fail before the host could hear that it was begun.
    assert statuses[:-1] in ([], [pb.StartLxdProgress.RECOVERING])


def test_no_new_database_meanwhile(tremplin: Tremplin) -> None:
    """Not while a container is being made; that one goes on, and can be neither started yet."""
    machine, host = tremplin.machine, tremplin.host
    machine.forget_images()
    with machine.slow_down(4e6):
        before = len(host.reports)
        tremplin.call(
            "CreateContainer", container_name="making", image_server=machine.new_server(),
            image_alias="big",
        )  # fmt: skip
        answer = tremplin.call("StartLxd", reset_lxd_db=True)
        assert answer.status == pb.StartLxdResponse.FAILED
        assert "something else is going on" in answer.failure_reason
        start = tremplin.call("StartContainer", container_name="making")
        assert start.status == pb.StartContainerResponse.FAILED
        assert "it is being created" in start.failure_reason
        end = host.wait_for(
            "UpdateCreateStatus", container="making", after=before,
            not_status=pb.ContainerCreationProgress.DOWNLOADING,
        )  # fmt: skip
    assert end.message.status == pb.ContainerCreationProgress.CREATED
