"""What a container says of itself, os-release(5): read from its files in the storage pool, so that
neither a file server of LXD has to be started nor the container to run.
"""

from __future__ import annotations

import os
import shlex
import stat

from agent.pb import tremplin_pb2 as pb
from agent.syscalls import open_in_root

_PATHS = ("etc/os-release", "usr/lib/os-release")
_LARGEST = 64 * 1024


def read_os_release(directory: str) -> pb.OsRelease:
    """The os-release(5) of the container whose directory it is, empty when it has none that can be
    read; blocks.
    """
    try:
        root = os.open(f"{directory}/rootfs", os.O_PATH | os.O_DIRECTORY)
    except OSError:
        return pb.OsRelease()
    try:
        for path in _PATHS:
            try:
                return parse_os_release(_read_below(root, path))
            except OSError:
                continue
    finally:
        os.close(root)
    return pb.OsRelease()


def parse_os_release(text: str) -> pb.OsRelease:
    """os-release(5) as a message; lines that are not understood are passed over."""
    values = {}
    for line in text.splitlines():
        key, equals, value = line.partition("=")
        try:
            words = shlex.split(value)
        except ValueError:
            continue
        if equals and len(words) == 1 and words[0].isprintable():
            values[key.strip()] = words[0]
    return pb.OsRelease(
        pretty_name=values.get("PRETTY_NAME", ""),
        name=values.get("NAME", ""),
        version=values.get("VERSION", ""),
        version_id=values.get("VERSION_ID", ""),
        id=values.get("ID", ""),
    )


def _read_below(directory: int, path: str) -> str:
    # The container decides what is there: a link must not lead out of it, nor a FIFO block.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    descriptor = open_in_root(directory, path, flags)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is not a file")
        return file.read(_LARGEST).decode(errors="replace")
