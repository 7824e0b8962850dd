"""The properties in a container's image metadata that say who made it and whether it was ever
started: a container of ours that never was is made again.
"""

from __future__ import annotations

import contextlib

from agent.tremplin.lxd_client import LxdNotFoundError
from agent.tremplin.retry import until_done

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agent.tremplin.lxd_client import LxdClient

CREATED = "createdByTremplin"
SET_UP = "tremplinSetupFinished"


async def mark(lxd: LxdClient, container: str, *markers: str) -> None:
    """Sets markers on a container. Raises LxdError."""
    # LXD merges what it is given into what is there.
    properties = dict.fromkeys(markers, "true")
    await lxd.request("patch", "instances", container, "metadata", json={"properties": properties})


async def mark_started(lxd: LxdClient, container: str) -> None:
    """Marks a container of ours that has come up, by whatever way; others are left alone.

    Returns when that is done, which LXD may not let happen for long.
    """

    async def attempt() -> None:
        with contextlib.suppress(LxdNotFoundError):
            if await is_unfinished(lxd, container):
                await mark(lxd, container, SET_UP)

    await until_done(attempt)


async def is_ours(lxd: LxdClient, container: str) -> bool:
    """Whether a container was made by tremplin and is whole. Raises LxdError."""
    return CREATED in await _properties(lxd, container)


async def is_set_up(lxd: LxdClient, container: str) -> bool:
    """Whether a container was started before. Raises LxdError."""
    return SET_UP in await _properties(lxd, container)


async def is_unfinished(lxd: LxdClient, container: str) -> bool:
    """Whether a container is ours and was never started. Raises LxdError."""
    properties = await _properties(lxd, container)
    return CREATED in properties and SET_UP not in properties


async def _properties(lxd: LxdClient, container: str) -> dict[str, str]:
    metadata = await lxd.get("instances", container, "metadata")
    return metadata.get("properties") or {}
