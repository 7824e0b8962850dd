"""What is mounted, from /proc/self/mountinfo, proc(5). Imports next to nothing: PID 1 asks too."""

from __future__ import annotations

import os


class Mount:
    """One line of it; target is the mount point."""

    __slots__ = ("fstype", "source", "target")

    def __init__(self, line: str) -> None:
        left, _, right = line.partition(" - ")
        fstype, source = right.split(" ")[:2]
        self.target = unescape(left.split()[4])
        self.fstype = fstype
        self.source = unescape(source)


def read() -> list[Mount]:
    """Every mount of this mount namespace, in the order in which they were made."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return [Mount(line) for line in file]


def at(target: str) -> Mount | None:
    """The topmost mount at exactly this path, None when there is none."""
    found = [mount for mount in read() if mount.target == target]
    return found[-1] if found else None


def under(path: str) -> Mount | None:
    """The mount that a path lies on. path: absolute, without symbolic links.

    None in a chroot(2) whose own mount is out of sight.
    """
    found = [
        mount
        for mount in read()
        if path == mount.target or path.startswith(f"{mount.target.rstrip('/')}/")
    ]
    # Of mounts on top of each other max() would give the one that was made first.
    return max(reversed(found), key=lambda mount: len(mount.target), default=None)


def unescape(path: str) -> str:
    r"""A path as it stands in files of /proc, with \040 for a space."""
    return os.fsdecode(
        path.encode("utf-8", "surrogateescape").decode("unicode_escape").encode("latin-1")
    )
