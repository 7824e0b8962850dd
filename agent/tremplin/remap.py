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
import json
import logging
import os

import tenacity

from agent.tremplin.lxd_client import LxdError, LxdNotFoundError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from agent.tremplin.session import Session

_log = logging.getLogger(__name__)

_COPY = "tremplin-remap"
_UNSAFE_COPY = "tremplin-remap-unsafe"
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
    rootfs = f"{session.settings.lxd_dir}/storage-pools/default/containers/{container}/rootfs"
    owner = os.stat(rootfs).st_uid
    return not _map(config, _DISK) and owner != 0 and owner in roots


async def has_copy(session: Session, container: str) -> bool:
    """Whether there is a copy from before a shift. Raises LxdError."""
    paths = await session.lxd.get("instances", container, "snapshots")
    return any(path.rpartition("/")[2] == _COPY for path in paths)


async def keep_copy(session: Session, container: str) -> None:
    """Copies a container that is stopped. Raises LxdError, OSError."""
    await _remove(session, container, _UNSAFE_COPY)
    run = session.lxd_operations.run
    body = {"name": _UNSAFE_COPY, "stateful": False}
    await run("post", "instances", container, "snapshots", json=body)
    await session.lxd.in_thread(session.flush)
    await _rename(session, container, _UNSAFE_COPY, _COPY)


async def swap_back(session: Session, container: str) -> bool:
    """Makes a stopped container what the copy holds, its settings too. Raises LxdError.

    Whether that was done: one that runs has come through its shift, and has to be let_go().
    """
    # A tremplin that was killed may have left a start to LXD.
    for operation in await session.lxd_operations.under_way(lambda name: name == container):
        with contextlib.suppress(LxdError):
            await operation.wait()
    instance = await session.instance(container)
    if instance is None or instance["status"] != "Stopped":
        return False
    await session.lxd_operations.run("put", "instances", container, json={"restore": _COPY})
    _log.info("container %s is as it was before its ids were to be shifted", container)
    return True


async def let_go(session: Session, container: str) -> None:
    """Removes the copy of a container that has started; what was shifted goes to the disk first."""

    async def attempt() -> None:
        await session.lxd.in_thread(session.flush)
        with contextlib.suppress(LxdNotFoundError):
            await _rename(session, container, _COPY, _UNSAFE_COPY)
        await _remove(session, container, _UNSAFE_COPY)

    try:
        await attempt()
    except (LxdError, OSError) as error:
        # With what the container does from now on a copy must not be mistaken for the last state.
        _log.warning("cannot remove the copy of container %s yet: %s", container, error)
        session.in_background(_repeat(attempt))


async def _repeat(attempt: Any) -> None:
    delays = tenacity.wait_exponential(multiplier=0.5, max=10.0)
    again = tenacity.retry_if_exception_type((LxdError, OSError))
    await tenacity.AsyncRetrying(wait=delays, retry=again)(attempt)


async def _rename(session: Session, container: str, old: str, new: str) -> None:
    path = ("instances", container, "snapshots", old)
    await session.lxd_operations.run("post", *path, json={"name": new})


async def _remove(session: Session, container: str, copy: str) -> None:
    with contextlib.suppress(LxdNotFoundError):
        await session.lxd_operations.run("delete", "instances", container, "snapshots", copy)


def _map(config: dict[str, str], key: str) -> list[dict[str, Any]]:
    found = json.loads(config.get(key) or "[]")
    return found if isinstance(found, list) else []
