"""The properties in a container's image metadata that say who made it and whether it was ever
started: a container of ours that never was is made again.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agent.tremplin.lxd_client import LxdClient

CREATED = "createdByTremplin"
SET_UP = "tremplinSetupFinished"


async def mark(lxd: LxdClient, container: str, marker: str) -> None:
    """Sets a marker on a container, if it is not there yet. Raises LxdError."""
    metadata = await lxd.get("instances", container, "metadata")
    properties = metadata.get("properties") or {}
    if marker not in properties:
        metadata["properties"] = properties | {marker: "true"}
        await lxd.request("put", "instances", container, "metadata", json=metadata)


async def is_ours(lxd: LxdClient, container: str) -> bool:
    """Whether a container was made by tremplin and is whole. Raises LxdError."""
    metadata = await lxd.get("instances", container, "metadata")
    return CREATED in (metadata.get("properties") or {})


async def is_unfinished(lxd: LxdClient, container: str) -> bool:
    """Whether a container is ours and was never started. Raises LxdError."""
    metadata = await lxd.get("instances", container, "metadata")
    properties = metadata.get("properties") or {}
    return CREATED in properties and SET_UP not in properties
