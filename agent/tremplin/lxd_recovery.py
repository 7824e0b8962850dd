"""LXD's database, reset on request or because LXD cannot start with it, without losing a container:
LXD finds them again in its storage pool. The old database stays beside the new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil

from agent.process_supervisor.client import AsyncClient, SupervisorError
from agent.tremplin.lxd_client import LxdClient, LxdError
from agent.tremplin.lxd_setup import btrfs_source
from agent.tremplin.operation import OperationError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from agent.tremplin.session import Session

_log = logging.getLogger(__name__)

_UP_SECONDS = 120.0
_CRASHES = 4
"""An LXD that ended so often before it answered once cannot start."""


async def reset_database(session: Session) -> None:
    """Stops LXD, takes its database away, starts it, and has it find the containers again.

    Raises OperationError, LxdError. Without PID 1 of ours LXD is not ours to stop.
    """
    try:
        async with await AsyncClient.connect(session.settings.run_dir) as client:
            _log.info("stopping LXD to reset its database")
            await client.stop("lxd")
            await asyncio.to_thread(_put_database_aside, session.settings.lxd_dir)
            await client.start("lxd")
    except SupervisorError as error:
        raise OperationError(str(error)) from None
    except OSError as error:
        raise OperationError(f"cannot put the database aside: {error}") from None
    try:
        async with asyncio.timeout(_UP_SECONDS):
            await session.lxd_is_up.wait()
    except TimeoutError:
        raise OperationError("LXD does not start with a new database either") from None
    await find_containers(session)


def database_identity(session: Session) -> int:
    """A number that another database of LXD's will not have, 0 for none; blocks."""
    try:
        return os.stat(f"{session.settings.lxd_dir}/database").st_ino
    except FileNotFoundError:
        return 0


async def cannot_start(session: Session) -> bool:
    """Whether LXD ends again and again before it answers, as PID 1 sees it."""
    try:
        async with await AsyncClient.connect(session.settings.run_dir) as client:
            info = await client.info("lxd")
    except SupervisorError:
        return False
    return int(info.get("recent_starts", 0)) >= _CRASHES and not session.lxd_is_up.is_set()


async def find_containers(session: Session) -> None:
    """Has LXD take over what is in the storage pool, if it does not know the pool. Raises LxdError.

    Source: what `lxd recover` does, LXD's doc/backup.md.
    """
    if await session.lxd.exists("storage-pools", "default"):
        return
    source = btrfs_source(session.settings)
    if source is None or not os.path.isdir(source):
        return
    pool = {
        "name": "default",
        "driver": "btrfs",
        "config": {"source": source, "volatile.initial_source": source},
    }
    found = await session.lxd.in_thread(
        _internal, session.lxd, "recover/validate", {"Pools": [pool]}
    )
    volumes = found.get("UnknownVolumes") or []
    await session.lxd.in_thread(_internal, session.lxd, "recover/import", {"Pools": [pool]})
    _log.info("LXD has found %d containers again", len(volumes))


def _internal(client: LxdClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    # These calls are outside of /1.0, which is where pylxd's nodes begin.
    answer = client.internal("post", path, body).json()
    if answer.get("error"):
        raise LxdError(str(answer["error"]))
    metadata = answer.get("metadata")
    return metadata if isinstance(metadata, dict) else {}


def _put_database_aside(lxd_dir: str) -> None:
    database, aside = f"{lxd_dir}/database", f"{lxd_dir}/database.old"
    if not os.path.isdir(database):
        return
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(aside)
    os.rename(database, aside)
