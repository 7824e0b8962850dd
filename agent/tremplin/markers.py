"""The properties in a container's image metadata that say who made it and whether it was ever
started: a container of ours that never was is made again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat

from agent import atomic_file
from agent.tremplin.lxd_client import LxdNotFoundError
from agent.tremplin.retry import until_done

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agent.tremplin.lxd_client import LxdClient

CREATED = "createdByTremplin"
SET_UP = "tremplinSetupFinished"

_LARGEST_METADATA = 64 * 1024
_FIRST_PROPERTY = re.compile(r"^properties:[ ]*\n(?P<indent> +)(?=\w)", re.MULTILINE)


async def mark(lxd: LxdClient, container: str, *markers: str) -> None:
    """Sets markers on a container. Raises LxdError."""
    path = f"{lxd.container_directory(container)}/metadata.yaml"
    if await lxd.in_thread(_write, path, markers):
        return
    # LXD merges what it is given into what is there.
    properties = dict.fromkeys(markers, "true")
    await lxd.request("patch", "instances", container, "metadata", json={"properties": properties})


def _write(path: str, markers: tuple[str, ...]) -> bool:
    # LXD reads this file whenever it is asked for the metadata, and writes it when told to, which
    # takes it as long as a tenth of a creation. False: this is not a file to change by ourselves.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, encoding="utf-8") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return False
            text = with_markers(file.read(_LARGEST_METADATA + 1), markers)
        if text is None:
            return False
        atomic_file.replace(path, text)
    except (OSError, UnicodeError):
        return False
    return True


def with_markers(metadata: str, markers: tuple[str, ...]) -> str | None:
    """An image's metadata, YAML or JSON, with markers among its properties; None if it is laid out
    in a way that this does not understand.
    """
    if len(metadata) > _LARGEST_METADATA or any(marker in metadata for marker in markers):
        return None
    if metadata.startswith("{"):
        try:
            found = json.loads(metadata)
            found["properties"] |= dict.fromkeys(markers, "true")
        except (ValueError, LookupError, TypeError, RecursionError):
            return None
        return json.dumps(found)

    def first(match: re.Match[str]) -> str:
        lines = "".join(f'{match["indent"]}{marker}: "true"\n' for marker in markers)
        return f"properties:\n{lines}{match['indent']}"

    text, found = _FIRST_PROPERTY.subn(first, metadata)
    return text if found == 1 else None


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
