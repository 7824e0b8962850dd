"""The stateful disk: a btrfs that keeps the containers; formatted when blank, mounted, grown."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import struct

from agent import mount_table, syscalls
from agent.maitred import block_device, storage_balloon
from agent.maitred.errors import CallError
from agent.places import open_place

_log = logging.getLogger(__name__)

SECTOR = 4096
"""Bytes; a btrfs is a whole number of these long."""

_FSTYPE = "btrfs"
_OPTIONS = "user_subvol_rm_allowed,discard"
_APPEAR_SECONDS = 5.0
"""How long a device that is not there yet is waited for."""

# linux/btrfs.h: _IOW(BTRFS_IOCTL_MAGIC, 3, struct btrfs_ioctl_vol_args)
_BTRFS_IOC_RESIZE = 0x50009403
_VOL_ARGS = struct.Struct("q4088s")

# What mount(2) says when a filesystem is damaged, in contrast to missing or busy.
_DAMAGED = frozenset({errno.EINVAL, errno.EIO, errno.EUCLEAN, errno.EROFS, errno.EBADMSG})


class DiskError(CallError):
    """The disk cannot be used; str() says why and what a person can do.

    mount_failed: whether it is the filesystem's fault, and not that of the request.
    """

    def __init__(self, text: str, *, mount_failed: bool = False) -> None:
        super().__init__(text)
        self.mount_failed = mount_failed


async def mount(device: str, target: str) -> bool:
    """Mounts device at target, formatted first when it holds nothing at all, and as large as it is.

    Does nothing but grow it when it is mounted there already.
    The result is True when an older state had to be taken (usebackuproot): the last changes are
    lost. Raises DiskError.
    """
    await _wait_for(device)
    target = os.path.realpath(target)
    mounted = await asyncio.to_thread(mount_table.at, target)
    lost_data = False
    if mounted is not None:
        await asyncio.to_thread(_check_same, mounted, device)
    else:
        await _prepare(device)
        lost_data = await asyncio.to_thread(_mount, device, target)
    try:
        if mounted is None:  # how much room the host has, it says anew after each boot
            storage_balloon.remove(target)
        await asyncio.to_thread(_grow, target, device)
    except OSError as error:
        _log.warning("cannot use all of the stateful disk: %s", error.strerror)
    return lost_data


async def _wait_for(device: str) -> None:
    try:
        await block_device.wait_for(device, seconds=_APPEAR_SECONDS)
    except FileNotFoundError:
        raise DiskError(
            f"there is no device {device} (waited {_APPEAR_SECONDS:.0f} s for it); attach a disk "
            "to the VM, or name the right one as stateful_device"
        ) from None
    except OSError as error:
        raise DiskError(f"cannot use {device}: {error.strerror}") from None


def _check_same(mounted: mount_table.Mount, device: str) -> None:
    try:
        is_same = os.stat(mounted.source).st_rdev == os.stat(device).st_rdev
    except OSError:
        is_same = False
    if mounted.fstype != _FSTYPE or not is_same:
        raise DiskError(
            f"cannot mount {device} at {mounted.target}: {mounted.source} ({mounted.fstype}) "
            "is mounted there"
        )


async def _prepare(device: str) -> None:
    try:
        content = await block_device.content(device)
        if content == "":
            await block_device.format_empty(device, _FSTYPE)
            _log.info("formatted %s, which was blank", device)
            return
    except (CallError, OSError) as error:
        raise DiskError(str(error), mount_failed=True) from None
    if content == "btrfs without its first superblock":
        raise DiskError(
            f"{device} holds a {content}; repair it with btrfs rescue super-recover {device}",
            mount_failed=True,
        )
    if content != _FSTYPE:
        raise DiskError(
            f"{device} holds {content}, not {_FSTYPE}, and is not formatted over; use another "
            f"disk, or empty this one with wipefs --all {device}",
            mount_failed=True,
        )


def _mount(device: str, target: str) -> bool:
    try:
        with open_place(target, create=True) as place:
            try:
                syscalls.mount(device, place.path, _FSTYPE, 0, _OPTIONS)
            except OSError as error:
                if error.errno not in _DAMAGED:
                    raise
                _log.warning("cannot mount %s: %s; trying an older state", device, error.strerror)
                syscalls.mount(device, place.path, _FSTYPE, 0, f"{_OPTIONS},usebackuproot")
                _log.warning("mounted an older state of %s: the last changes are lost", device)
                return True
    except OSError as error:
        hint = (
            "; the filesystem is damaged: see the kernel's log and btrfs check"
            if error.errno in _DAMAGED
            else ""
        )
        raise DiskError(
            f"cannot mount {device} at {target}: {error.strerror}{hint}", mount_failed=True
        ) from None
    return False


def _grow(target: str, device: str) -> None:
    # btrfs refuses to resize below 256 MiB, even to the size that it has.
    room = block_device.size(device)
    if total_bytes(target) < room - room % SECTOR:
        resize(target, "max")


def resize(target: str, size: str) -> None:
    """Grows or shrinks the mounted btrfs, online; blocks until it is done.

    size: bytes, or "max" for all of the device. Raises OSError, ENOSPC when the files do not fit.
    """
    descriptor = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        syscalls.ioctl(descriptor, _BTRFS_IOC_RESIZE, _VOL_ARGS.pack(0, size.encode()))
    finally:
        os.close(descriptor)


def total_bytes(target: str) -> int:
    """Bytes of the mounted filesystem, used ones included. Raises OSError."""
    status = os.statvfs(target)
    return status.f_blocks * status.f_frsize


def free_bytes(target: str) -> int:
    """Bytes that can still be written. Raises OSError."""
    status = os.statvfs(target)
    return status.f_bavail * status.f_frsize
