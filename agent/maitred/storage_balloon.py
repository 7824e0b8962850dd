"""UpdateStorageBalloon: a file that takes up the room on the stateful disk that the host, whose
disk it really is, could not back. Nothing is written into it, so it costs the host nothing.
"""

from __future__ import annotations

import os

from agent.syscalls import syncfs

BALLOON = ".storage-balloon"
"""Its name in the root of the stateful disk."""

_TOLERANCE = 8 << 20
_ROUNDS = 5


def adjust(directory: str, host_free_bytes: int) -> None:
    """Makes the balloon so large that the guest sees no more room than the host has; blocks.

    directory: where the stateful disk is mounted. Raises OSError.
    """
    path = f"{directory}/{BALLOON}"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        syncfs(descriptor)
        # What btrfs keeps for itself changes with what is allocated, so it takes a few rounds.
        for _ in range(_ROUNDS):
            if not _adjust(directory, descriptor, host_free_bytes):
                break
            syncfs(descriptor)  # only now it counts what was allocated and freed
    finally:
        os.close(descriptor)


def _adjust(directory: str, descriptor: int, host_free_bytes: int) -> bool:
    size = os.fstat(descriptor).st_size
    status = os.statvfs(directory)
    room = status.f_bavail * status.f_frsize + size
    wanted = max(0, room - host_free_bytes)
    if abs(wanted - size) < _TOLERANCE and wanted:
        return False
    if wanted > size:
        os.posix_fallocate(descriptor, size, wanted - size)
    elif wanted < size:
        os.ftruncate(descriptor, wanted)
    return wanted != size


def remove(directory: str) -> None:
    """Takes the balloon away, if there is one. Raises OSError."""
    try:
        os.unlink(f"{directory}/{BALLOON}")
    except FileNotFoundError:
        pass
