"""What is mounted, from /proc/self/mountinfo, proc(5)."""

from __future__ import annotations

import re

_OCTAL = re.compile(r"\\([0-7]{3})")


class Mount:
    """One line of it; device is "major:minor", target the mount point."""

    __slots__ = (
        "device",
        "fstype",
        "mount_id",
        "options",
        "parent_id",
        "root",
        "source",
        "super_options",
        "target",
    )

    def __init__(self, line: str) -> None:
        left, _, right = line.partition(" - ")
        words, more = left.split(), right.split(" ")
        self.mount_id, self.parent_id = int(words[0]), int(words[1])
        self.device = words[2]
        self.root, self.target, self.options = _plain(words[3]), _plain(words[4]), words[5]
        self.fstype, self.source = more[0], _plain(more[1])
        self.super_options = more[2].strip() if len(more) > 2 else ""


def read() -> list[Mount]:
    """Every mount of this mount namespace, in the order in which they were made."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return [Mount(line) for line in file]


def at(target: str) -> Mount | None:
    """The topmost mount at exactly this path, None when there is none."""
    found = [mount for mount in read() if mount.target == target]
    return found[-1] if found else None


def _plain(text: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text)
