"""The initial RAM filesystem: a static init and a handful of modules, uncompressed."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import TYPE_CHECKING

from image.build import run
from image.kernel import copy_module

if TYPE_CHECKING:
    from collections.abc import Iterable

INIT_SOURCE = Path(__file__).with_name("init.c")


def write(target: Path, *, now: Iterable[Path], later: Iterable[Path], work: Path) -> None:
    """Writes the cpio archive.

    now, later: module files in the order to load them in, before and after /sbin/init starts;
    work: a folder for what is compiled.
    """
    init = work / "init"
    run(["gcc", "-static", "-Os", "-Wall", "-Wextra", "-Werror", "-s", "-o", init, INIT_SOURCE])
    members: list[tuple[str, int, bytes]] = [
        (name, stat.S_IFDIR | 0o755, b"") for name in ("dev", "proc", "sys", "root")
    ]
    members.append(("init", stat.S_IFREG | 0o755, init.read_bytes()))
    lines: list[str] = []
    for modules in (now, later):
        for path in modules:
            if f"/{path.name}" not in lines:
                lines.append(f"/{path.name}")
                copy_module(path, work / path.name)
                members.append((path.name, stat.S_IFREG | 0o644, (work / path.name).read_bytes()))
        lines.append("later")
    lines.pop()
    members.append(("modules", stat.S_IFREG | 0o644, ("\n".join(lines) + "\n").encode()))
    target.write_bytes(cpio(members))


def cpio(members: Iterable[tuple[str, int, bytes]]) -> bytes:
    """Packs files in the newc archive format, owned by root, of the year 1970.

    members: name, mode and content of each file.
    """
    whole = bytearray()
    for number, (name, mode, content) in enumerate([*members, ("TRAILER!!!", 0, b"")], 1):
        path = name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(path), 0)
        whole += b"070701" + b"".join(b"%08X" % field for field in fields) + path
        whole += b"\0" * (-len(whole) % 4) + content
        whole += b"\0" * (-len(whole) % 4)
    return bytes(whole)
