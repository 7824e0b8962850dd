"""Images that somebody has made who wants more than a container."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from agent.pb import tremplin_pb2 as pb
from image import container

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.lxd.host import Tremplin


@pytest.fixture
def with_nodes(tremplin: Tremplin) -> Iterator[Path]:
    """A root filesystem that holds a device node for everybody: the kernel's /dev/zero."""
    machine = tremplin.machine
    root = machine.directory / "nodes"
    shutil.copytree(machine.directory / "small/root", root, symlinks=True)
    machine.run("mknod", "--mode=666", root / "zero", "c", "1", "5")
    target = machine.directory / "nodes.squashfs"
    container.squash(root, target)
    yield target
    target.unlink()
    shutil.rmtree(root)


def test_device_nodes(tremplin: Tremplin, with_nodes: Path) -> None:
    """They are there and cannot be opened; those that LXD gives to the container can."""
    _, metadata = tremplin.machine.image_files("busybox")
    before = tremplin.begin_create_from_files("nodes", rootfs=with_nodes, metadata=metadata)
    created = tremplin.end_of_create("nodes", before)
    assert created.message.status == pb.ContainerCreationProgress.CREATED, created
    tremplin.start_container("nodes")
    opened = "for each in /zero /dev/zero /dev/net/tun; do (: <$each) 2>&1 && echo opened; done"
    lines = tremplin.run_in("nodes", "sh", "-c", opened).splitlines()
    assert [line.rpartition(": ")[2] for line in lines] == ["Permission denied", "opened", "opened"]


def test_a_pool_of_before(tremplin: Tremplin) -> None:
    """One that an earlier tremplin has made, or LXD found, is mounted anew, once."""
    machine = tremplin.machine
    options = ("btrfs.mount_options", "user_subvol_rm_allowed")
    machine.run("lxc", "storage", "set", "default", *options)

    def mounted() -> list[str]:
        pool = f"{machine.lxd_dir}/storage-pools/default"
        return machine.run("findmnt", "-n", "-o", "OPTIONS", "--mountpoint", pool).splitlines()

    assert ["nodev" in each.split(",") for each in mounted()] == [False]
    tremplin.restart()
    assert ["nodev" in each.split(",") for each in mounted()] == [True]
    machine.kill_lxd()
    machine.start_lxd()
    assert ["nodev" in each.split(",") for each in mounted()] == [True]
