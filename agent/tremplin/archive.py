"""The file of an exported container, looked at before LXD gets it. Nobody knows who has written it:
what is read has bounds, and what LXD would do at once, without being asked again, is not let in.

Source: an LXD backup is a tar file, packed or not, whose first member is its index, in YAML as Go
writes it; GetInfo() in lxd/backup/backup_info.go of LXD.
"""

from __future__ import annotations

import bz2
import lzma
import os
import re
import tarfile
import zlib

from agent.tremplin.operation import OperationError
from agent.tremplin.paths import open_file

HEAD_BYTES = 512 * 1024
"""How much of a file architecture() wants to see, in which every index has room."""

_INDEX = "backup/index.yaml"
_HEADER = 512
"""Bytes of a tar header."""
_LARGEST_DICTIONARY = 128 * 1024 * 1024
"""Bytes that unpacking xz may take; its own presets need 65 MiB at most."""
_TOP_LEVEL = re.compile(
    r"(name|backend|pool): [A-Za-z0-9._-]+|optimized(_header)?: false|type: container"
)
_NOT_OPTIMIZED = "optimized: false"
_CONFIG = "config:"


def read_architecture(path: str) -> str:
    """The architecture of the container in a file. Raises OSError; OperationError."""
    with open_file(path) as file:
        return architecture(file.read(HEAD_BYTES))


def architecture(head: bytes) -> str:
    """The architecture of an exported container that we would import.

    head: the first HEAD_BYTES of its file. Raises OperationError: it is none, or asks LXD for more
    than to unpack the files of one container.
    """
    index = _index(_unpacked(head))
    found = re.search(r"^ +architecture: ([a-z0-9_]{1,32})$", index, re.MULTILINE)
    if found is None:
        raise OperationError("the file does not hold an exported container")
    if not _is_plain(index.splitlines()):
        raise OperationError("the file holds more than the files of one container")
    return found[1]


def _is_plain(index: list[str]) -> bool:
    # A stream for btrfs-receive(8) and snapshots could have names that lead out of the pool. Where
    # it does not say that it is not optimized, LXD goes on to look for another index. What could
    # hide one of these keys, a text of several lines for one, may stand in the last value only.
    if _CONFIG not in index:
        return False
    at = index.index(_CONFIG)
    first, last = index[:at], index[at + 1 :]
    return (
        _NOT_OPTIMIZED in first
        and all(_TOP_LEVEL.fullmatch(line) for line in first)
        and all(line.startswith(" ") for line in last)
    )


def _index(content: bytes) -> str:
    try:
        # One header only: what may come before a member in tar's many dialects has no bounds.
        first = tarfile.TarInfo.frombuf(content[:_HEADER], "utf-8", "surrogateescape")
    except tarfile.TarError:
        return ""
    end = _HEADER + first.size
    if first.name != _INDEX or not first.isreg() or not _HEADER <= end <= len(content):
        return ""
    return content[_HEADER:end].decode(errors="replace")


def _unpacked(head: bytes) -> bytes:
    # As much as there is in it, "" when it is damaged; however much it would unpack to.
    try:
        if head.startswith(b"\x1f\x8b"):
            return zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(head, HEAD_BYTES)
        if head.startswith(b"BZh"):
            return bz2.BZ2Decompressor().decompress(head, HEAD_BYTES)
        if head.startswith(b"\xfd7zXZ\0"):
            xz = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_LARGEST_DICTIONARY)
            return xz.decompress(head, HEAD_BYTES)
    except (zlib.error, lzma.LZMAError, OSError):
        return b""
    return head


def sizes(path: str) -> tuple[int, int]:
    """The bytes of an exported file, and of what it holds as far as can be seen from outside.

    Raises OSError.

    Source: RFC 1952: a gzip file ends with its unpacked size modulo 2^32.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if file.read(2) != b"\x1f\x8b" or size < 18:
            return size, size
        file.seek(-4, os.SEEK_END)
        length = int.from_bytes(file.read(4), "little")
    while length < size:
        length += 1 << 32
    return size, length
