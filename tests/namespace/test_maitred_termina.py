"""StartTermina on real block devices (loop devices) and the kernel's own btrfs."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agent.pb import vm_guest_pb2
from tests.namespace.vm_in_namespaces import EMPTY, Vm, in_vm

if TYPE_CHECKING:
    from collections.abc import Iterator

Response = vm_guest_pb2.StartTerminaResponse

pytestmark = pytest.mark.skipif(
    "btrfs" not in Path("/proc/filesystems").read_text(), reason="this kernel has no btrfs"
)

MIB = 1 << 20
# One partition of type 0x83 from sector 2048 on, 131072 sectors long, and the boot signature.
_MBR = r"\0\0\0\0\203\0\0\0\0\010\0\0\0\0\002\0" + r"\0" * 48 + r"\125\252"


occupied = pytest.mark.parametrize(
    "occupy",
    [
        ["mkfs.ext4", "-q"],
        ["mkswap"],
        ["sh", "-c", f"printf '{_MBR}' | dd of=$0 bs=1 seek=446 conv=notrunc status=none"],
        ["sh", "-c", "mkfs.btrfs -q $0; dd if=/dev/zero of=$0 bs=4k seek=16 count=1 status=none"],
    ],
    ids=["ext4", "swap", "partitions", "btrfs without first superblock"],
)
"""For tests of what must not be formatted: `occupy` and a device is a command that fills it."""


def _run(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


@contextlib.contextmanager
def _loop_device(image: Path, size: int) -> Iterator[str]:
    with image.open("ab") as file:
        file.truncate(size)
    device = _run("losetup", "--find", "--show", str(image)).strip()
    try:
        yield device
    finally:
        _run("losetup", "--detach", device)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[str]:
    with _loop_device(tmp_path / "disk.img", 320 * MIB) as device:
        yield device


def _in_vm(tmp_path: Path, scenario: object, *, before: str = "") -> None:
    # It notes that it is up, and then the signal that ends it.
    stand_in = tmp_path / "tremplin"
    stand_in.write_text(
        "#!/bin/sh\n"
        f'for name in PWR TERM; do trap "echo $name >>{tmp_path}/signals; exit" $name; done\n'
        f"echo up >>{tmp_path}/signals\n"
        "while :; do sleep 1000 & wait; done\n"
    )
    stand_in.chmod(0o755)
    in_vm(
        tmp_path,
        scenario,  # type: ignore[arg-type]  # a coroutine function of one Vm
        before=f"mount -t tmpfs tmpfs /run; {before}",
        options=[f"tremplin.listen=unix:{tmp_path}/tremplin.sock", f"tremplin.command={stand_in}"],
    )


async def _start(
    vm: Vm, device: str, subnet: str = "100.115.92.1/24"
) -> vm_guest_pb2.StartTerminaResponse:
    return await vm.maitred.StartTermina(
        vm_guest_pb2.StartTerminaRequest(lxd_ipv4_subnet=subnet, stateful_device=device)
    )


def _line(vm: Vm) -> str:
    (line,) = [
        line
        for line in vm.inside("cat", "/proc/self/mountinfo").splitlines()
        if line.split()[4] == str(vm.directory / "stateful")
    ]
    return line


def _digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes()).hexdigest()


def test_a_blank_disk_is_formatted_mounted_and_kept_by_later_calls(
    tmp_path: Path, disk: str
) -> None:
    async def scenario(vm: Vm) -> None:
        response = await _start(vm, disk)
        assert (response.status, response.failure_reason) == (Response.SUCCESS, "")
        assert response.mount_result == Response.MOUNT_SUCCESS
        assert response.free_bytes > 50 * MIB
        line = _line(vm)
        assert f" btrfs {disk} " in line
        assert "user_subvol_rm_allowed" in line
        assert "discard" in line
        assert (
            "tremplin.lxd_subnet=100.115.92.1/24"
            in vm.processes()[vm.pid_of(str(tmp_path / "tremplin"))]
        )

        vm.inside("touch", f"{tmp_path}/stateful/kept")
        processes = vm.processes()
        again = await _start(vm, disk)
        assert again.status == Response.SUCCESS
        assert vm.processes() == processes

        await vm.restart_maitred()
        after = await _start(vm, disk)
        assert (after.status, after.failure_reason) == (Response.SUCCESS, "")
        assert "kept" in vm.inside("ls", f"{tmp_path}/stateful")
        assert _line(vm) == line

    _in_vm(tmp_path, scenario)


def test_two_calls_at_once_format_once(tmp_path: Path, disk: str) -> None:
    async def scenario(vm: Vm) -> None:
        one, other = await asyncio.gather(_start(vm, disk), _start(vm, disk))
        assert one.status == other.status == Response.SUCCESS
        assert vm.console.read_text().count("which was blank") == 1
        _line(vm)

    _in_vm(tmp_path, scenario)


@pytest.mark.parametrize("allowed", [False, True])
def test_privileged_containers_are_the_hosts_to_allow(
    tmp_path: Path, disk: str, allowed: bool
) -> None:
    async def scenario(vm: Vm) -> None:
        request = vm_guest_pb2.StartTerminaRequest(
            lxd_ipv4_subnet="100.115.92.1/24",
            stateful_device=disk,
            allow_privileged_containers=allowed,
        )
        assert (await vm.maitred.StartTermina(request)).status == Response.SUCCESS
        words = vm.processes()[vm.pid_of(str(tmp_path / "tremplin"))]
        assert ("tremplin.allow_privileged=yes" in words) is allowed

    _in_vm(tmp_path, scenario)


@pytest.mark.parametrize(
    ("subnet", "allowed"), [("100.115.93.1/24", True), ("100.115.92.1/24", False)]
)
def test_while_it_runs_neither_subnet_nor_privilege_can_change(
    tmp_path: Path, disk: str, subnet: str, allowed: bool
) -> None:
    async def scenario(vm: Vm) -> None:
        def request(subnet: str, *, allowed: bool) -> vm_guest_pb2.StartTerminaRequest:
            return vm_guest_pb2.StartTerminaRequest(
                lxd_ipv4_subnet=subnet, stateful_device=disk, allow_privileged_containers=allowed
            )

        first = request("100.115.92.1/24", allowed=True)
        assert (await vm.maitred.StartTermina(first)).status == Response.SUCCESS
        processes, mount = vm.processes(), _line(vm)
        response = await vm.maitred.StartTermina(request(subnet, allowed=allowed))
        assert response.status == Response.FAILED
        assert "until the VM is restarted" in response.failure_reason
        assert (vm.processes(), _line(vm)) == (processes, mount)
        assert (await vm.maitred.StartTermina(first)).status == Response.SUCCESS

    _in_vm(tmp_path, scenario)


@occupied
def test_a_disk_that_holds_anything_is_refused_and_untouched(
    tmp_path: Path, disk: str, occupy: list[str]
) -> None:
    _run(*occupy, disk)
    _run("sync", disk)
    before = _digest(tmp_path / "disk.img")

    async def scenario(vm: Vm) -> None:
        response = await _start(vm, disk)
        assert response.status == Response.FAILED
        assert response.mount_result == Response.MOUNT_FAILURE
        assert f"{disk} holds " in response.failure_reason
        assert len(vm.processes()) == 1

    _in_vm(tmp_path, scenario)
    _run("sync", disk)
    assert _digest(tmp_path / "disk.img") == before


def test_a_disk_that_has_grown_is_used_whole(tmp_path: Path, disk: str) -> None:
    async def scenario(vm: Vm) -> None:
        first = await _start(vm, disk)
        with (tmp_path / "disk.img").open("ab") as image:
            image.truncate(640 * MIB)
        _run("losetup", "--set-capacity", disk)
        second = await _start(vm, disk)
        assert second.status == Response.SUCCESS
        assert second.free_bytes - first.free_bytes > 150 * MIB

    _in_vm(tmp_path, scenario)


def test_a_disk_that_is_too_small_is_refused_with_the_size_it_needs(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        with _loop_device(tmp_path / "small.img", 4 * MIB) as device:
            response = await _start(vm, device)
        assert response.status == Response.FAILED
        assert "too small" in response.failure_reason

    _in_vm(tmp_path, scenario)


def test_a_device_that_appears_late_is_waited_for(tmp_path: Path, disk: str) -> None:
    path = tmp_path / "late"

    async def scenario(vm: Vm) -> None:
        call = asyncio.ensure_future(_start(vm, str(path)))
        await asyncio.sleep(0.5)  # the time that a device takes is what is tested
        assert not call.done()
        path.symlink_to(disk)
        assert (await call).status == Response.SUCCESS

    _in_vm(tmp_path, scenario)


def test_requests_that_cannot_be_served_say_why(tmp_path: Path, disk: str) -> None:
    async def scenario(vm: Vm) -> None:
        for device, subnet, why in (
            (disk, "", "lxd_ipv4_subnet is empty"),
            (disk, "100.115.92.1", "not of the form"),
            (disk, "100.115.92.0/24", "not the address of a machine"),
            (disk, "127.0.0.1/8", "not the address of a machine"),
            (disk, "fd00::1/64", "not of the form"),
            ("vdb", "100.115.92.1/24", "not an absolute path"),
            ("/dev/null", "100.115.92.1/24", "Block device required"),
            ("/dev/no-such-disk", "100.115.92.1/24", "there is no device /dev/no-such-disk"),
        ):
            response = await _start(vm, device, subnet)
            assert response.status == Response.FAILED
            assert why in response.failure_reason
        assert len(vm.processes()) == 1
        assert not (tmp_path / "stateful").exists()

    _in_vm(tmp_path, scenario)
    assert _run("wipefs", "--no-act", disk) == ""


@pytest.mark.skipif(not os.access("/usr/bin/lxcfs", os.X_OK), reason="nothing to make room for")
def test_what_the_system_refuses_is_a_failure_of_the_call(tmp_path: Path, disk: str) -> None:
    async def scenario(vm: Vm) -> None:
        response = await _start(vm, disk)
        assert response.status == Response.FAILED
        assert response.failure_reason == "cannot use /var/lib/lxcfs: File exists"

    _in_vm(tmp_path, scenario, before="mount -t tmpfs tmpfs /var/lib; touch /var/lib/lxcfs")


def test_at_shutdown_tremplin_is_told_of_a_power_failure(tmp_path: Path, disk: str) -> None:
    signals = tmp_path / "signals"

    async def scenario(vm: Vm) -> None:
        assert (await _start(vm, disk)).status == Response.SUCCESS
        async with asyncio.timeout(20):
            while not signals.exists() or not signals.read_text():
                await asyncio.sleep(0.01)
        await vm.maitred.Shutdown(EMPTY)
        assert await asyncio.to_thread(vm.process.wait, 30) == 0

    _in_vm(tmp_path, scenario)
    assert signals.read_text() == "up\nPWR\n"


def test_a_damaged_btrfs_is_mounted_in_an_older_state(tmp_path: Path, disk: str) -> None:
    _run("mkfs.btrfs", "-q", "--metadata", "single", "--data", "single", "--nodiscard", disk)
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    # In a mount namespace of its own, so that an end in between leaves nothing mounted.
    script = (
        f"mount -o nodiscard {disk} {mounted}; cd {mounted};"
        "for n in 1 2 3 4; do echo $n >file$n; sync -f .; done"
    )
    _run("unshare", "-m", "sh", "-e", "-c", script)
    _damage_tree_root(disk)

    async def scenario(vm: Vm) -> None:
        response = await _start(vm, disk)
        assert (response.status, response.failure_reason) == (Response.SUCCESS, "")
        assert response.mount_result == Response.PARTIAL_DATA_LOSS
        assert "file1" in vm.inside("ls", f"{tmp_path}/stateful")

    _in_vm(tmp_path, scenario)


def _damage_tree_root(disk: str) -> None:
    """Zeroes the block that the newest tree of trees begins with."""
    text = _run("btrfs", "inspect-internal", "dump-super", disk)
    match = re.search(r"^root\s+(\d+)$", text, re.MULTILINE)
    assert match
    mapped = _run("btrfs-map-logical", "-l", match[1], disk)
    physical = re.search(r"physical (\d+)", mapped)
    assert physical
    descriptor = os.open(disk, os.O_WRONLY)
    os.pwrite(descriptor, bytes(16384), int(physical[1]))
    os.fsync(descriptor)
    os.close(descriptor)


def test_a_btrfs_beyond_repair_says_what_to_do(tmp_path: Path, disk: str) -> None:
    _run("mkfs.btrfs", "-q", "--nodiscard", disk)
    descriptor = os.open(disk, os.O_WRONLY)
    for megabyte in range(1, 320):  # everything but the superblocks
        if megabyte != 64:
            os.pwrite(descriptor, bytes(MIB), megabyte * MIB)
    os.fsync(descriptor)
    os.close(descriptor)

    async def scenario(vm: Vm) -> None:
        response = await _start(vm, disk)
        assert response.status == Response.FAILED
        assert response.mount_result == Response.MOUNT_FAILURE
        assert "damaged" in response.failure_reason

    _in_vm(tmp_path, scenario)
