"""Writes romfs images, the format hosts use for the small read-only share /mnt/shared.
Format: Documentation/filesystems/romfs.rst of the Linux kernel. Directories and regular files.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_ALIGN = 16
_HARD_LINK, _DIRECTORY, _REGULAR = 0, 1, 2
_IMAGE_BLOCK = 1024


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % _ALIGN)


def _checksum(data: bytes) -> int:
    data += b"\0" * (-len(data) % 4)
    total: int = sum(struct.unpack(f">{len(data) // 4}I", data))
    return -total & 0xFFFFFFFF


def _header(kind: int, spec: int, size: int, name: bytes, following: int) -> bytes:
    head = struct.pack(">IIII", following | kind, spec, size, 0) + _padded(name + b"\0")
    return head[:12] + struct.pack(">I", _checksum(head)) + head[16:]


def build(files: Mapping[str, bytes], *, volume: str = "shared") -> bytes:
    """An image with these files in its root directory.

    files: content by name; names without slashes.
    Returns the image, padded to 1024 bytes. Raises ValueError for a name that cannot be.
    """
    for name in files:
        if not name or "/" in name or "\0" in name or name in {".", ".."}:
            raise ValueError(f"not a file name: {name!r}")
    start = 16 + len(_padded(volume.encode() + b"\0"))
    # The root directory's own "." comes first; its spec field points at the first entry, itself.
    entries: list[tuple[int, int, bytes, bytes]] = [
        (_DIRECTORY | 8, start, b".", b""),
        (_HARD_LINK, start, b"..", b""),
        *((_REGULAR, 0, name.encode(), data) for name, data in sorted(files.items())),
    ]
    body = b""
    for index, (kind, spec, entry, data) in enumerate(entries):
        size = 16 + len(_padded(entry + b"\0")) + len(_padded(data))
        last = index == len(entries) - 1
        following = 0 if last else start + len(body) + size
        body += _header(kind, spec, len(data), entry, following) + _padded(data)
    total = start + len(body)
    head = struct.pack(">8sII", b"-rom1fs-", total, 0) + _padded(volume.encode() + b"\0")
    image = head + body
    head = head[:12] + struct.pack(">I", _checksum(image[:512])) + head[16:]
    image = head + body
    return image + b"\0" * (-len(image) % _IMAGE_BLOCK)
