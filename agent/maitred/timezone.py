"""SetTimezone: /etc/localtime, as a link to a zone of the system's or as a mount on top of it."""

from __future__ import annotations

import os
import re
import stat

from agent import atomic_file, mount_table, syscalls
from agent.maitred.errors import BadRequest, Failed

_ZONES = "/usr/share/zoneinfo"
_LOCALTIME = "/etc/localtime"
_UTC = "Etc/UTC"
_MAGIC = b"TZif"  # RFC 8536
_NAME = re.compile(r"[A-Za-z0-9+_-]+(/[A-Za-z0-9+_-]+)*\Z")


def check(name: str) -> str:
    """The file of a zone, `Europe/Zurich`; UTC's for "". Raises BadRequest."""
    name = name or _UTC
    path = f"{_ZONES}/{name}"
    try:
        if not _NAME.match(name) or not os.path.realpath(path).startswith(f"{_ZONES}/"):
            raise OSError
        with open(path, "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode) or file.read(4) != _MAGIC:
                raise OSError
    except OSError:
        raise BadRequest(f"cannot set the timezone: there is no zone {name[:100]!r}") from None
    return path


def set_timezone(zone: str, *, use_bind_mount: bool) -> None:
    """Makes the zone, a path from check(), the local time; blocks. Raises Failed."""
    try:
        if use_bind_mount:
            _mount(zone)
        else:
            _unmount()
            _link(zone)
    except OSError as error:
        raise Failed(f"cannot set the timezone: {error}") from None


def _link(zone: str) -> None:
    temporary = f"{_LOCALTIME}.{os.getpid()}.new"
    os.symlink(zone, temporary)
    try:
        os.replace(temporary, _LOCALTIME)
    except OSError:
        os.unlink(temporary)
        raise


def _mount(zone: str) -> None:
    # What a link points to is the system's own file, which is not to be covered.
    if os.path.islink(_LOCALTIME) or not os.path.exists(_LOCALTIME):
        atomic_file.replace(_LOCALTIME, "")
    _unmount()
    syscalls.mount(zone, _LOCALTIME, "", syscalls.MS_BIND)


def _unmount() -> None:
    while mount_table.at(_LOCALTIME) is not None:
        syscalls.umount(_LOCALTIME, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
