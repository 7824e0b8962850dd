"""SetTimezone: the local time of containers, running or not. Blocking: for a worker thread."""

from __future__ import annotations

import re

from agent.tremplin.container_files import ContainerFiles

_NAME = re.compile(r"[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+)*")
_POSIX = re.compile(r"[A-Za-z0-9<>+,./:-]+")
_ZONES = "/usr/share/zoneinfo"
_NEW = "/etc/.localtime.new-by-tremplin"


def timezone_problem(name: str, posix: str) -> str:
    """Why these cannot be a time zone, or ""; posix may be empty."""
    if _NAME.fullmatch(name) is None:
        return "the name of a time zone reads like Europe/Berlin"
    if posix and _POSIX.fullmatch(posix) is None:
        return "the POSIX string of a time zone reads like CET-1CEST,M3.5.0,M10.5.0/3"
    return ""


def set_timezone(socket_path: str, container: str, name: str) -> bool:
    """Points /etc/localtime to the zone; whether the container knows it.

    socket_path: LXD's; name: checked. Raises OSError. Source: localtime(5).
    """
    with ContainerFiles(socket_path, container) as files:
        if files.stat(f"{_ZONES}/{name}") is None:
            return False
        files.remove(_NEW)
        files.make_link(_NEW, f"{_ZONES}/{name}")
        files.rename(_NEW, "/etc/localtime")
        if files.stat("/etc/timezone") is not None:
            # Debian's copy of the name.
            files.remove(_NEW)
            files.write(_NEW, f"{name}\n".encode(), mode=0o644, uid=0, gid=0)
            files.rename(_NEW, "/etc/timezone")
        return True
