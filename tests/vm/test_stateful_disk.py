"""StartTermina on virtio disks of every kind: blank, grown, damaged, somebody else's, late. One
boot; a program that sleeps stands in for tremplin, so that a disk can make room for the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.pb import common_pb2, vm_guest_pb2
from host.build_files import GuestImage
from host.qemu import Disk, Machine
from host.vm import Vm
from tests.vm.vms import boot, output_of

pytestmark = pytest.mark.timeout(240)

MIB = 1 << 20
MAITRED_PID = "$(pgrep -of agent.maitred)"
EMPTY = common_pb2.EmptyMessage()
Response = vm_guest_pb2.StartTerminaResponse

_BLANK, _EXT4, _TINY, _GROWN, _DAMAGED, _LATE = (f"/dev/vd{letter}" for letter in "bcdefg")
_SIZES = {_BLANK: 200, _EXT4: 64, _TINY: 4, _GROWN: 300, _DAMAGED: 300, _LATE: 300}

# Several states of one filesystem, and then zeros where the newest tree of trees begins.
_DAMAGE = f"""
mkfs.btrfs -q -m single -d single --nodiscard {_DAMAGED}
mount -o nodiscard {_DAMAGED} /mnt/stateful
for n in 1 2 3 4; do echo $n >/mnt/stateful/file$n; sync -f /mnt/stateful; done
umount /mnt/stateful
root=$(btrfs inspect-internal dump-super {_DAMAGED} | awk '$1 == "root" {{print $2}}')
place=$(btrfs-map-logical -l "$root" {_DAMAGED} | sed -n 's/.*physical \\([0-9]*\\).*/\\1/p')
dd if=/dev/zero of={_DAMAGED} bs=4096 seek=$((place / 4096)) count=4 conv=notrunc,fsync status=none
"""


class _Scene:
    def __init__(self, runner: asyncio.Runner, vm: Vm, images: dict[str, Path]) -> None:
        self.runner = runner
        self.vm = vm
        self.images = images

    async def start(self, device: str) -> vm_guest_pb2.StartTerminaResponse:
        """StartTermina; a refusal has come to the console, too, when it returns."""
        since = self.vm.console.position
        request = vm_guest_pb2.StartTerminaRequest(
            lxd_ipv4_subnet="100.115.92.1/24", stateful_device=device
        )
        response = await self.vm.maitred.StartTermina(request, timeout=150, wait_for_ready=True)
        if response.failure_reason:
            await self.vm.console.wait_for(re.escape(response.failure_reason), start=since)
        return response

    async def start_well(self, device: str) -> vm_guest_pb2.StartTerminaResponse:
        """StartTermina, without a word of warning."""
        since = self.vm.console.position
        response = await self.start(device)
        assert (response.status, response.failure_reason) == (Response.SUCCESS, "")
        assert "cannot" not in self.vm.console.since(since)
        return response

    async def sh(self, script: str) -> str:
        """What a script in the VM says; it must succeed."""
        return await output_of(self.vm, "sh", "-euc", script)

    async def size(self) -> int:
        """Bytes of the stateful filesystem."""
        return (await self.vm.maitred.GetResizeStatus(EMPTY)).current_size


@pytest.fixture(scope="module")
def scene(
    runner: asyncio.Runner, image: GuestImage, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[_Scene]:
    """A VM with all disks but the late one, on which nothing is mounted."""
    directory = tmp_path_factory.mktemp("disks")
    images = {device: directory / f"{device[-1]}.img" for device in _SIZES}
    for device, path in images.items():
        with path.open("wb") as file:
            file.truncate(_SIZES[device] * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", images[_EXT4]], check=True)
    machine = Machine(
        disks=tuple(
            Disk(path, writable=True) for device, path in images.items() if device != _LATE
        ),
        words=("tremplin.command=/run/idle",),
        spare_slots=1,
    )
    stack = contextlib.AsyncExitStack()

    async def start() -> _Scene:
        vm = await stack.enter_async_context(Vm(image, machine))
        await boot(vm)
        scene = _Scene(runner, vm, images)
        idle = r"printf '#!/bin/sh\nexec sleep infinity\n' >/run/idle; chmod +x /run/idle"
        await scene.sh(f"{idle}; mkdir -p /mnt/stateful; {_DAMAGE}")
        return scene

    try:
        yield runner.run(start())
    finally:
        runner.run(stack.aclose())


def test_a_disk_that_holds_something_else_is_refused_and_untouched(scene: _Scene) -> None:
    """Another filesystem, byte for byte as before; nothing is started."""
    before = hashlib.blake2b(scene.images[_EXT4].read_bytes()).digest()

    async def scenario() -> None:
        response = await scene.start(_EXT4)
        assert (response.status, response.mount_result) == (Response.FAILED, Response.MOUNT_FAILURE)
        assert f"{_EXT4} holds ext4" in response.failure_reason
        await scene.sh(f"sync {_EXT4}; ! pgrep sleep; ! findmnt /mnt/stateful")

    scene.runner.run(scenario())
    assert hashlib.blake2b(scene.images[_EXT4].read_bytes()).digest() == before


def test_a_disk_that_is_too_small_or_missing_is_named(scene: _Scene) -> None:
    """With what a person can do about it."""

    async def scenario() -> None:
        small, missing = await asyncio.gather(scene.start(_TINY), scene.start("/dev/vdy"))
        assert (small.status, small.mount_result) == (Response.FAILED, Response.MOUNT_FAILURE)
        assert "too small" in small.failure_reason
        assert missing.status == Response.FAILED
        assert "there is no device /dev/vdy" in missing.failure_reason

    scene.runner.run(scenario())


def test_a_blank_disk_is_used_and_kept_by_later_calls(scene: _Scene) -> None:
    """Once more, after maitred was killed, and when another disk is named; one so small that btrfs
    would not resize it.
    """

    async def scenario() -> None:
        first = await scene.start_well(_BLANK)
        assert first.mount_result == Response.MOUNT_SUCCESS
        assert first.free_bytes > 50 * MIB
        mount = await scene.sh("echo kept >/mnt/stateful/file; grep /mnt/stateful /proc/mounts")
        assert mount.startswith(f"{_BLANK} /mnt/stateful btrfs ")
        assert {"user_subvol_rm_allowed", "discard"} <= set(mount.split()[3].split(","))
        assert await scene.size() == _SIZES[_BLANK] * MIB
        space = await scene.vm.maitred.GetAvailableSpace(EMPTY)
        assert abs(space.available_space - first.free_bytes) < 10 * MIB
        sleeper = await scene.sh("pgrep sleep")

        await scene.start_well(_BLANK)
        await scene.sh(f"kill -KILL {MAITRED_PID}")
        await scene.start_well(_BLANK)
        other = await scene.start(_GROWN)
        assert other.status == Response.FAILED
        assert f"{_BLANK} (btrfs) is mounted there" in other.failure_reason
        found = await scene.sh("grep /mnt/stateful /proc/mounts; pgrep sleep; cat /mnt/stateful/*")
        assert found == f"{mount}{sleeper}kept\n"
        await scene.sh("umount /mnt/stateful")

    scene.runner.run(scenario())


def test_a_grown_disk_is_used_whole(scene: _Scene) -> None:
    """Grown while it was not mounted, and while it was."""

    async def grow(size: int) -> None:
        async with scene.vm.monitor() as monitor:
            await monitor.run("block_resize", device="disk4", size=size * MIB)
        await scene.sh(
            f"for n in $(seq 100); do test $(blockdev --getsize64 {_GROWN}) = {size * MIB} && "
            "exit; sleep 0.1; done; exit 1"
        )

    async def scenario() -> None:
        await scene.sh(f"mkfs.btrfs -q {_GROWN}; mount {_GROWN} /mnt/stateful;")
        await scene.sh("echo kept >/mnt/stateful/file; umount /mnt/stateful")
        for size in (500, 900):
            await grow(size)
            await scene.start_well(_GROWN)
            assert await scene.size() == size * MIB
        assert await scene.sh("cat /mnt/stateful/file; umount /mnt/stateful") == "kept\n"

    scene.runner.run(scenario())


def test_a_damaged_disk_is_mounted_in_an_older_state(scene: _Scene) -> None:
    """And the host is told that something is lost."""

    async def scenario() -> None:
        response = await scene.start(_DAMAGED)
        assert (response.status, response.failure_reason) == (Response.SUCCESS, "")
        assert response.mount_result == Response.PARTIAL_DATA_LOSS
        assert "file1" in await scene.sh("ls /mnt/stateful; umount /mnt/stateful")

    scene.runner.run(scenario())


def test_a_disk_that_is_plugged_in_late_is_waited_for(scene: _Scene) -> None:
    """Two seconds after the call; and the VM, with that disk, ends cleanly."""

    async def scenario() -> None:
        call = asyncio.ensure_future(scene.start_well(_LATE))
        await asyncio.sleep(2)  # how late it is, is what is tested
        assert not call.done()
        async with scene.vm.monitor() as monitor:
            file = {"driver": "file", "filename": str(scene.images[_LATE])}
            await monitor.run(
                "blockdev-add", **{"driver": "raw", "node-name": "late", "file": file}
            )
            await monitor.run("device_add", driver="virtio-blk-pci", drive="late", bus="slot0")
        assert (await call).mount_result == Response.MOUNT_SUCCESS
        assert await scene.vm.shut_down(), scene.vm.console.last_lines(20)

    scene.runner.run(scenario())
