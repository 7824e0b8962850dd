"""GetDebugInfo: what a person who looks for a fault wants to know first, as text."""

from __future__ import annotations

import asyncio
import os

from agent.tremplin.lxd_client import LxdError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from agent.tremplin.session import Session

_LOG_LINES = 20
_LOG_BYTES = 64 * 1024
_CONTAINERS = 50


async def debug_info(session: Session) -> str:
    """The text; what cannot be found out is said in its place."""
    parts = [
        _section("system", _system()),
        _section("disk", _disk(session.settings.lxd_dir)),
        _section("operations", _operations(session)),
    ]
    try:
        parts += await _lxd(session)
    except LxdError as error:
        parts.append(_section("LXD", [f"cannot ask LXD: {error}"]))
    log = await asyncio.to_thread(_tail, f"{session.settings.lxd_dir}/lxd.log")
    parts.append(_section("log of LXD", log))
    return "\n".join(parts)


async def _lxd(session: Session) -> list[str]:
    server = await session.lxd.get()
    environment = server["environment"]
    instances = await session.instances()
    groups = await session.lxd.get("operations", params={"recursion": "1"})
    parts = [
        _section(
            "LXD",
            [
                f"LXD {environment['server_version']}, LXC {environment['driver_version']}, "
                f"storage {environment['storage']} {environment['storage_version']}",
                *(
                    f"operation: {found['description']}, {found['status']}"
                    for group in groups.values()
                    for found in group
                ),
                *(f"container {found['name']}: {found['status']}" for found in instances),
            ],
        )
    ]
    for found in instances[:_CONTAINERS]:
        name = found["name"]
        try:
            text = await session.lxd.container_log(name)
            log = text.splitlines()[-_LOG_LINES:]
        except LxdError as error:
            log = [f"cannot read it: {error}"]
        parts.append(_section(f"log of container {name}", log))
    return parts


def _system() -> Iterator[str]:
    name = os.uname()
    yield f"{name.sysname} {name.release} {name.version} {name.machine}"
    with open("/proc/uptime", encoding="ascii") as file:
        yield f"up {file.read().split()[0]} s"
    with open("/proc/meminfo", encoding="ascii") as file:
        yield from (" ".join(line.split()) for line in file if line.startswith("Mem"))


def _disk(path: str) -> Iterator[str]:
    try:
        found = os.statvfs(path)
    except OSError as error:
        yield f"cannot look at {path}: {error.strerror}"
        return
    unit = found.f_frsize / (1024 * 1024)
    yield f"{path}: {found.f_bavail * unit:.0f} of {found.f_blocks * unit:.0f} MiB free"


def _operations(session: Session) -> Iterator[str]:
    for operation in session.running:
        yield f"{operation.verb} {operation.subject}: under way"


def _tail(path: str) -> list[str]:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_BYTES))
            return file.read().decode(errors="replace").splitlines()[-_LOG_LINES:]
    except OSError as error:
        return [f"cannot read {path}: {error.strerror}"]


def _section(title: str, lines: Iterator[str] | list[str]) -> str:
    return "\n".join([f"[{title}]", *(lines or ["nothing"]), ""])
