"""The ids of a container's files, when a start is to shift them: at the first start, and when the
privilege level has changed.

LXD shifts in place, file by file, and notes only that it is done: one that was killed in the middle
shifts some files twice the next time, and the container is lost. So a container that has been in
use is copied first, which a copy-on-write pool does at once, and is swapped for the copy when the
start did not come to its end. The copy is a snapshot of LXD's. It counts only under its final name;
under the other one it is being made or removed.
"""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import os

from agent.tremplin.lxd_client import LxdError, LxdNotFoundError
from agent.tremplin.retry import now_or_later

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from agent.tremplin.session import Session

_log = logging.getLogger(__name__)

_COPY = "tremplin-remap"
_DISK, _NEXT = "volatile.last_state.idmap", "volatile.idmap.next"


def is_needed(config: dict[str, str]) -> bool:
    """Whether the next start shifts ids; config: of the instance."""
    return _map(config, _DISK) != _map(config, _NEXT)


def is_torn(session: Session, container: str, config: dict[str, str]) -> bool:
    """Whether a shift of a container that was never shifted before has begun; blocks.

    Raises OSError.
    """
    roots = {
        entry["Hostid"] for entry in _map(config, _NEXT) if entry["Isuid"] and entry["Nsid"] == 0
    }
    # LXD begins with the root directory.
    owner = os.stat(f"{session.lxd.container_directory(container)}/rootfs").st_uid
    return not _map(config, _DISK) and owner != 0 and owner in roots


async def keep_copy(session: Session, container: str, config: dict[str, str]) -> None:
    """Copies a container that is stopped; config: its own. Raises LxdError, OSError."""
    await session.lxd.in_thread(_forget, _note(session, container))
    await _remove(session, container)
    body = {"name": _COPY, "stateful": False}
    await session.lxd_operations.run("post", "instances", container, "snapshots", json=body)
    await session.lxd.in_thread(session.flush)
    await _count(session, container, _map(config, _DISK))


def has_copy(session: Session, container: str) -> bool:
    """Whether there is a copy that counts; blocks. Raises OSError."""
    return os.path.exists(_note(session, container))


async def swap_back(session: Session, container: str) -> bool:
    """Makes a stopped container what the copy holds, its settings too, if that is better.

    Whether that was done. It is not done when the container has come through its shift: one that
    runs, or of which LXD knows so. Raises LxdError, OSError.
    """
    # A tremplin that was killed may have left a start to LXD.
    for operation in await session.lxd_operations.under_way(lambda name: name == container):
        with contextlib.suppress(LxdError):
            await operation.wait()
    instance = await session.instance(container)
    if instance is None or instance["status"] != "Stopped":
        return False
    note = await session.lxd.in_thread(_read, _note(session, container))
    # LXD notes the new ids when all files have them. Which of the two are on the disk after a power
    # cut nobody knows.
    if note.get("boot") == _boot() and note.get("ids") != _map(instance["config"], _DISK):
        return False
    if not await session.lxd.exists("instances", container, "snapshots", _COPY):
        return False
    await session.lxd_operations.run("put", "instances", container, json={"restore": _COPY})
    await _count(session, container, note.get("ids"))
    _log.info("container %s is as it was before its ids were to be shifted", container)
    return True


async def let_go(session: Session, container: str) -> None:
    """Removes the copy of a container that needs it no more; what it is now goes to the disk first.

    What cannot be done now is done later, unless another start has taken over.
    """
    starting = session.latest.get(container)

    async def attempt() -> None:
        latest = session.latest.get(container)
        if latest is not starting and latest is not None and latest.method == "StartContainer":
            return
        await session.lxd.in_thread(session.flush)
        await session.lxd.in_thread(_forget, _note(session, container))
        await _remove(session, container)

    await now_or_later(session, f"remove the copy of container {container}", attempt)


async def tidy(session: Session) -> None:
    """Removes copies that a tremplin that was killed has left, of containers that run or that it
    had only begun to copy. Raises LxdError, OSError.
    """
    for container in await session.lxd.in_thread(_copied, session.settings.lxd_dir):
        if container in session.latest:
            continue
        instance = await session.instance(container)
        note = await session.lxd.in_thread(_read, _note(session, container))
        if instance is None:
            await session.lxd.in_thread(_forget, _note(session, container))
        elif not note or (note.get("boot") == _boot() and instance["status"] != "Stopped"):
            await let_go(session, container)


def _copied(lxd_dir: str) -> set[str]:
    snapshots = f"{glob.escape(lxd_dir)}/storage-pools/*/containers-snapshots/*/{_COPY}"
    notes = f"{glob.escape(lxd_dir)}/{_COPY}/*"
    return {path.split("/")[-2] for path in glob.glob(snapshots)} | {
        os.path.basename(path) for path in glob.glob(notes)
    }


async def _count(session: Session, container: str, ids: Any) -> None:
    # From here on the copy counts. ids: those that the files have, as LXD notes them.
    note = json.dumps({"boot": _boot(), "ids": ids})
    await session.lxd.in_thread(_write, _note(session, container), note)


async def _remove(session: Session, container: str) -> None:
    with contextlib.suppress(LxdNotFoundError):
        await session.lxd_operations.run("delete", "instances", container, "snapshots", _COPY)


def _note(session: Session, container: str) -> str:
    return f"{session.settings.lxd_dir}/{_COPY}/{container}"


def _boot() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def _read(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="ascii") as file:
            found = json.load(file)
    except (FileNotFoundError, ValueError):
        found = None
    return found if isinstance(found, dict) else {}


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    _sync_directory(os.path.dirname(path))


def _forget(path: str) -> None:
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    _sync_directory(os.path.dirname(path))


def _sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _map(config: dict[str, str], key: str) -> list[dict[str, Any]]:
    found = json.loads(config.get(key) or "[]")
    return found if isinstance(found, list) else []
