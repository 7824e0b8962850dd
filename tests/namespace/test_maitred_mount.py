"""Mount in a mount namespace: the arguments of mount(2), and targets that cannot be led astray."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agent import syscalls
from agent.pb import vm_guest_pb2
from tests.namespace.test_maitred_termina import MIB, _digest, _loop_device, _run, occupied
from tests.namespace.vm_in_namespaces import Vm, in_vm

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def on_root() -> Iterator[Path]:
    """A directory on the root's filesystem, which /tmp need not be."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        yield Path(directory)


async def _mount(vm: Vm, **fields: object) -> int:
    request = vm_guest_pb2.MountRequest(**fields)  # type: ignore[arg-type]  # any of its fields
    return (await vm.maitred.Mount(request)).error


def _mounts(vm: Vm, target: Path | str) -> list[str]:
    return [
        line
        for line in vm.inside("cat", "/proc/self/mountinfo").splitlines()
        if line.split()[4] == str(target)
    ]


def test_flags_options_and_the_target_are_as_asked(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        target = tmp_path / "a" / "b"
        flags = syscalls.MS_RDONLY | syscalls.MS_NOSUID
        assert (
            await _mount(
                vm,
                source="none",
                target=str(target),
                fstype="tmpfs",
                mountflags=flags,
                options="size=1m,mode=711",
                create_target=True,
                permissions=0o750,
            )
            == 0
        )
        (line,) = _mounts(vm, target)
        assert "ro,nosuid" in line.split()[5]
        assert "size=1024k,mode=711" in line
        # Outside of the namespace the directory that was made can be seen.
        assert target.stat().st_mode & 0o7777 == 0o750
        assert target.parent.stat().st_mode & 0o7777 == 0o755

    in_vm(tmp_path, scenario)


def test_bind_remount_and_propagation(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        source, target, file = tmp_path / "source", tmp_path / "target", tmp_path / "file"
        source.mkdir()
        file.write_text("content")
        assert (
            await _mount(
                vm,
                source=str(source),
                target=str(target),
                mountflags=syscalls.MS_BIND,
                create_target=True,
            )
            == 0
        )
        remount = syscalls.MS_REMOUNT | syscalls.MS_BIND | syscalls.MS_RDONLY
        assert await _mount(vm, target=str(target), mountflags=remount) == 0
        assert _mounts(vm, target)[0].split()[5].startswith("ro")
        assert await _mount(vm, target=str(target), mountflags=syscalls.MS_SHARED) == 0
        assert "shared:" in _mounts(vm, target)[0]
        as_file = tmp_path / "made" / "file"
        assert (
            await _mount(
                vm,
                source=str(file),
                target=str(as_file),
                mountflags=syscalls.MS_BIND,
                create_target=True,
            )
            == 0
        )
        assert vm.inside("cat", str(as_file)) == "content"

    in_vm(tmp_path, scenario)


def test_errors_are_errnos_and_leave_nothing_behind(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        before = sorted(tmp_path.iterdir())
        target = str(tmp_path / "new" / "target")
        for fields, expected in (
            ({"source": "/dev/nothing-here", "fstype": "ext4"}, errno.ENOENT),
            ({"source": "/dev/null", "fstype": "ext4"}, errno.ENOTBLK),
            ({"source": "none", "fstype": "no-such-fs"}, errno.ENODEV),
            ({"source": "none", "fstype": "tmpfs", "options": "bad=1"}, errno.EINVAL),
            ({"source": "none", "fstype": "tmpfs", "options": "x" * 5000}, errno.EINVAL),
            ({"source": "no\0ne", "fstype": "tmpfs"}, errno.EINVAL),
            ({"source": "none", "fstype": "tmpfs", "permissions": 1 << 20}, errno.EINVAL),
            ({"mountflags": (1 << 64) - 1}, errno.EINVAL),
        ):
            assert await _mount(vm, target=target, create_target=True, **fields) == expected
        assert await _mount(vm, source="none", target=target, fstype="tmpfs") == errno.ENOENT
        assert await _mount(vm, source="none", target="", fstype="tmpfs") == errno.ENOENT
        assert await _mount(vm, source="none", target="a/b", fstype="tmpfs") == errno.EINVAL
        assert sorted(tmp_path.iterdir()) == before

    in_vm(tmp_path, scenario)


def test_a_link_planted_by_a_container_moves_no_mount(tmp_path: Path, on_root: Path) -> None:
    shared, elsewhere = on_root / "shared", on_root / "elsewhere"
    shared.mkdir()
    elsewhere.mkdir()
    for name, target in (("absolute", str(elsewhere)), ("relative", "../elsewhere")):
        link = shared / name
        link.symlink_to(target)
        os.chown(link, 100_000, 100_000, follow_symlinks=False)
    (shared / "roots-own").symlink_to(elsewhere)

    async def scenario(vm: Vm) -> None:
        for name in ("absolute", "relative"):
            for target in (shared / name, shared / name / "below"):
                error = await _mount(
                    vm, source="none", target=str(target), fstype="tmpfs", create_target=True
                )
                assert error == errno.ELOOP
        assert list(elsewhere.iterdir()) == []
        assert _mounts(vm, elsewhere) == []
        # A link of the machine's own is an ordinary part of a path.
        assert (
            await _mount(vm, source="none", target=str(shared / "roots-own"), fstype="tmpfs") == 0
        )
        assert len(_mounts(vm, elsewhere)) == 1

    in_vm(tmp_path, scenario)


def test_a_root_owned_link_on_another_filesystem_is_not_followed(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        shared, elsewhere = tmp_path / "shared", tmp_path / "elsewhere"
        elsewhere.mkdir()
        assert (
            await _mount(vm, source="none", target=str(shared), fstype="tmpfs", create_target=True)
            == 0
        )
        # As root of a privileged container could, whose files lie on the stateful disk.
        vm.inside("ln", "-s", str(elsewhere), f"{shared}/link")
        error = await _mount(vm, source="none", target=f"{shared}/link", fstype="tmpfs")
        assert error == errno.ELOOP
        assert _mounts(vm, elsewhere) == []

    in_vm(tmp_path, scenario)


def test_a_blank_device_is_formatted_once_and_never_again(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        with _loop_device(tmp_path / "disk.img", 16 * MIB) as device:
            target = tmp_path / "target"

            async def mount(**fields: object) -> int:
                return await _mount(
                    vm, source=device, target=str(target), create_target=True, **fields
                )

            assert await mount(fstype="ext4") == errno.EINVAL  # not asked to
            assert _run("wipefs", "--no-act", device) == ""
            assert await mount(fstype="ext4", mkfs_if_needed=True) == 0
            assert f" ext4 {device} " in _mounts(vm, target)[0]
            vm.inside("touch", f"{target}/kept")
            vm.inside("umount", str(target))
            assert await mount(fstype="ext4", mkfs_if_needed=True) == 0
            assert "kept" in vm.inside("ls", str(target))
            vm.inside("umount", str(target))

    in_vm(tmp_path, scenario)


@occupied
def test_a_device_that_holds_anything_is_not_formatted(tmp_path: Path, occupy: list[str]) -> None:
    async def scenario(vm: Vm) -> None:
        with _loop_device(tmp_path / "disk.img", 128 * MIB) as device:
            _run(*occupy, device)
            _run("sync", device)
            before = _digest(tmp_path / "disk.img")
            target = str(tmp_path / "target")
            error = await _mount(
                vm,
                source=device,
                target=target,
                fstype="xfs",
                create_target=True,
                mkfs_if_needed=True,
            )
            assert error in {errno.EINVAL, errno.EUCLEAN, errno.ENODEV}
            _run("sync", device)
            assert _digest(tmp_path / "disk.img") == before
            assert not (tmp_path / "target").exists()

    in_vm(tmp_path, scenario)


def test_what_cannot_be_formatted_is_an_errno(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        with _loop_device(tmp_path / "disk.img", 16 * MIB) as device:
            for source, fstype, expected in (
                (device, "../x", errno.ENODEV),
                (device, "nosuchfs", errno.ENOENT),
                (device, "btrfs", errno.EIO),  # too small for one
                ("/dev/null", "ext4", errno.ENOTBLK),
                ("/dev/no-such-device", "ext4", errno.ENOENT),
            ):
                error = await _mount(
                    vm, source=source, target="/mnt", fstype=fstype, mkfs_if_needed=True
                )
                assert error == expected, (source, fstype)
            assert _run("wipefs", "--no-act", device) == ""

    in_vm(tmp_path, scenario)
