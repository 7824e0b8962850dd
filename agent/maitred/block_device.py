"""What is on a block device, and formatting one that holds nothing. A device that holds anything
at all is never written to from here.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import time

from agent.maitred.commands import run
from agent.maitred.errors import Failed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# btrfs keeps copies of its superblock here, which are found by nobody when the first one is gone.
_BTRFS_MAGIC = b"_BHRfS_M"
_BTRFS_MAGIC_OFFSET = 64
_BTRFS_SUPERBLOCKS = (64 << 10, 64 << 20, 256 << 30)

_POLL_SECONDS = 0.05
_NOTHING_FOUND = 2  # exit code of blkid(8) -p
_AMBIVALENT = 8  # likewise

_MKFS_TIMEOUT = 100.0
"""Seconds; below the 150 s that hosts give StartTermina."""


async def wait_for(
    path: str, *, seconds: float, clock: Callable[[], float] = time.monotonic
) -> None:
    """Returns when there is a block device at path; one that was just plugged in takes a while.

    Raises OSError: after that many seconds there is none (ENOENT), or it is something else
    (ENOTBLK).
    """
    deadline = clock() + seconds
    while True:
        try:
            found = os.stat(path)
        except FileNotFoundError:
            if clock() >= deadline:
                raise
            await asyncio.sleep(_POLL_SECONDS)
            continue
        if not stat.S_ISBLK(found.st_mode):
            raise OSError(errno.ENOTBLK, os.strerror(errno.ENOTBLK), path)
        return


def size(path: str) -> int:
    """Bytes. Raises OSError."""
    with open(path, "rb", buffering=0) as device:
        return device.seek(0, os.SEEK_END)


async def content(path: str) -> str:
    """What libblkid finds on the device: "btrfs", "ext4", "crypto_LUKS", "dos partition table",
    "" for a device that holds nothing at all.

    Raises Failed: it cannot be read, or holds several things at once.
    """
    probe = await run("blkid", "-p", "-o", "export", path)
    if probe.code == _AMBIVALENT:
        raise Failed(f"{path} holds signatures of several filesystems (see wipefs {path})")
    if probe.code not in {0, _NOTHING_FOUND}:
        raise Failed(f"cannot read what is on {path}: {probe.reason}")
    found = dict(line.split("=", 1) for line in probe.output.splitlines() if "=" in line)
    if kind := found.get("TYPE"):
        return kind
    if kind := found.get("PTTYPE"):
        return f"{kind} partition table"
    # blkid(8) answers the same for an empty device and for one that it cannot open.
    await asyncio.to_thread(_read_first_byte, path)
    signatures = await run("wipefs", "--no-act", "--noheadings", "--output", "TYPE", path)
    if signatures.code != 0:
        raise Failed(f"cannot read what is on {path}: {signatures.reason}")
    if kinds := signatures.output.split():
        return kinds[0]
    if await asyncio.to_thread(has_btrfs_superblock, path):
        return "btrfs without its first superblock"
    return ""


def _read_first_byte(path: str) -> None:
    try:
        with open(path, "rb", buffering=0) as device:
            if not device.read(1):
                raise Failed(f"{path} has no room at all")
    except OSError as error:
        raise Failed(f"cannot read {path}: {error.strerror}") from None


def has_btrfs_superblock(path: str) -> bool:
    """Whether any of the places for a btrfs superblock holds one. Raises OSError."""
    with open(path, "rb", buffering=0) as device:
        for offset in _BTRFS_SUPERBLOCKS:
            # A block device refuses to seek past its end; reading there finds nothing.
            magic = os.pread(device.fileno(), len(_BTRFS_MAGIC), offset + _BTRFS_MAGIC_OFFSET)
            if magic == _BTRFS_MAGIC:
                return True
    return False


async def format_empty(path: str, fstype: str) -> None:
    """Formats a device that content() says holds nothing. fstype: as in mkfs.FSTYPE.

    Raises Failed: it cannot be formatted, being too small for instance; OSError: there is no
    program for this filesystem; TimeoutError.
    """
    made = await run(f"mkfs.{fstype}", path, timeout=_MKFS_TIMEOUT)
    if made.code != 0:
        reason = _first_error(made.errors) or made.reason
        raise Failed(f"cannot format {path} as {fstype}: {reason}")


def _first_error(text: str) -> str:
    for line in text.splitlines():
        if line.startswith("ERROR: "):
            return line.removeprefix("ERROR: ")
    return ""
