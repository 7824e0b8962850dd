"""The images that LXD keeps. Those that came from files go when the container is there; those from
a server stay for the next container, if they are sure to be whole.

LXD writes in its database, with fsync(2), that it has an image; the image's files and its copy in
the storage pool reach the disk whenever the kernel likes. After a power cut an image may be in the
database of which there is nothing, or half. So one that is known to be on the disk gets a property,
and one without it that was there before LXD was started in this boot is removed before it is used.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import glob
import hashlib
import json
import logging
import os
import re
from asyncio.subprocess import DEVNULL

from agent.tremplin.image_source import FromFiles, FromServer
from agent.tremplin.lxd_client import LxdError, LxdNotFoundError
from agent.tremplin.paths import open_file
from agent.tremplin.power_cut import images_are_checked, images_are_in_doubt

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from agent.tremplin.session import Session

_log = logging.getLogger(__name__)

_FILE_IMPORT = "tremplin-import"
"""The property of images that came from files."""
_ON_DISK = "tremplin-on-disk"
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


async def import_image(session: Session, source: FromFiles) -> str:
    """Gives LXD the image in two files: its fingerprint. Raises LxdError and OSError."""
    answer = await session.lxd.in_thread(_post_image, session, source)
    operation = await session.lxd_operations.follow(answer)
    try:
        state = await operation.wait()
    except LxdError as error:
        if "already exists" not in str(error):
            raise
        return await session.lxd.in_thread(_fingerprint, source)
    return str(state["metadata"]["fingerprint"])


async def remove_imported_images(session: Session, fingerprint: str | None = None) -> None:
    """Removes images that came from files, all or one. Raises LxdError."""
    await _remove_images(
        session,
        lambda image: (
            _FILE_IMPORT in _properties(image) and fingerprint in {None, image["fingerprint"]}
        ),
    )


async def remove_doubtful_images(session: Session) -> None:
    """Removes, once per boot, images that a power cut may have left incomplete.

    Raises LxdError and OSError.
    """
    run_dir = session.settings.run_dir
    # Another creation must not download an image meanwhile that is about to be removed.
    async with session.image_lock:
        if not images_are_in_doubt(run_dir):
            return
        await session.lxd.in_thread(drop_torn_indexes, session.settings.lxd_dir)
        for fingerprint in await _remove_downloads(session):
            _log.warning("image %.12s may be incomplete after a power cut; removed", fingerprint)
        await _remove_unknown_volumes(session)
        images_are_checked(run_dir)


def drop_torn_indexes(lxd_dir: str) -> None:
    """Deletes what LXD keeps of image servers' indexes and a power cut has left empty or cut off:
    LXD writes them without fsync(2), and would fail for as long as it takes them for fresh. Whole
    ones stay: with them LXD does without a server that cannot be reached. Blocks.
    """
    for path in glob.glob(f"{glob.escape(lxd_dir)}/cache/*/*.json"):
        with contextlib.suppress(OSError):
            try:
                with open(path, "rb") as file:
                    json.load(file)
            except ValueError:
                _log.warning("an index of an image server is torn after a power cut; removed")
                os.unlink(path)


async def remove_unused_images(session: Session) -> None:
    """Removes images that LXD downloaded and of which no container was made so far.

    After a failed creation, when no other runs: the image may be what there is no room for.
    Raises LxdError, OSError.
    """
    await _remove_downloads(session)
    await _remove_unknown_volumes(session)


async def keep_image_of(session: Session, container: str, source: FromServer, at: float) -> None:
    """Puts the image that a container was made of onto the disk, for good, and marks it so.

    source: where LXD was asked to take it from, and at: when, in seconds of the loop's clock.
    """
    try:
        instance = await session.instance(container)
        fingerprint = (instance or {}).get("config", {}).get("volatile.base_image", "")
        if not fingerprint:
            return
        image = await session.lxd.get("images", fingerprint)
        if _ON_DISK not in _properties(image):
            await session.lxd.in_thread(session.flush)
            properties = _properties(image) | {_ON_DISK: "true"}
            await session.lxd.request(
                "patch", "images", fingerprint, json={"properties": properties}
            )
        # LXD may have it by another alias, or the container is somebody else's by now.
        came_from = image.get("update_source") or {}
        if source == FromServer(came_from.get("server", ""), came_from.get("alias", "")):
            session.known_images.note(source, fingerprint, at)
    except LxdNotFoundError:
        pass
    except (LxdError, OSError) as error:
        _log.warning("cannot keep the image of %s for the next boot: %s", container, error)


def _post_image(session: Session, source: FromFiles) -> dict[str, Any]:
    from requests_toolbelt import MultipartEncoder

    with open_file(source.metadata_path) as metadata, open_file(source.rootfs_path) as rootfs:
        body = MultipartEncoder(
            {
                "metadata": ("metadata", metadata, "application/octet-stream"),
                "rootfs": ("rootfs", rootfs, "application/octet-stream"),
            }
        )
        headers = {
            "Content-Type": body.content_type,
            "X-LXD-properties": f"{_FILE_IMPORT}=true",
            "X-LXD-filename": os.path.basename(source.rootfs_path),
        }
        return session.lxd.answer("post", ("images",), data=body, headers=headers)


def _fingerprint(source: FromFiles) -> str:
    # LXD's fingerprint of an image in two parts: of the metadata followed by the root filesystem.
    digest = hashlib.sha256()
    for path in (source.metadata_path, source.rootfs_path):
        with open_file(path) as file:
            while chunk := file.read(1024 * 1024):
                digest.update(chunk)
    return digest.hexdigest()


async def _remove_images(session: Session, goes: Callable[[dict[str, Any]], bool]) -> list[str]:
    # The fingerprints of those that are gone.
    images = await session.lxd.get("images", params={"recursion": "1"})
    fingerprints = [str(image["fingerprint"]) for image in images if goes(image)]
    for fingerprint in fingerprints:
        with contextlib.suppress(LxdNotFoundError):
            await session.lxd_operations.run("delete", "images", fingerprint)
    return fingerprints


async def _remove_downloads(session: Session) -> list[str]:
    # Those not known to be on the disk. An image that somebody brought into the VM by himself and
    # that is all there is his to remove.
    whole = functools.partial(_files_are_whole, session.settings.lxd_dir)

    def goes(image: dict[str, Any]) -> bool:
        if _ON_DISK in _properties(image) or image["aliases"]:
            return False
        return bool(image["cached"] or image.get("update_source")) or not whole(image)

    return await _remove_images(session, goes)


async def _remove_unknown_volumes(session: Session) -> None:
    # LXD writes down that it has unpacked an image when it has: of one that was killed meanwhile
    # something stays in the pool that no LXD removes before the same image is unpacked again.
    directory = f"{session.settings.lxd_dir}/storage-pools/default/images"
    # In this order: an image is known before it is unpacked.
    there = set(await session.lxd.in_thread(_fingerprints_in, directory))
    known = {path.rpartition("/")[2] for path in await session.lxd.get("images")}
    for fingerprint in there - known:
        process = await asyncio.create_subprocess_exec(
            "btrfs", "subvolume", "delete", f"{directory}/{fingerprint}",
            stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL,
        )  # fmt: skip
        if await process.wait() == 0:
            _log.info("removed what was left of image %.12s", fingerprint)
        else:
            _log.warning("cannot remove what was left of image %.12s", fingerprint)


def _fingerprints_in(directory: str) -> list[str]:
    try:
        return [name for name in os.listdir(directory) if _FINGERPRINT.fullmatch(name)]
    except FileNotFoundError:
        return []


def _files_are_whole(lxd_dir: str, image: dict[str, Any]) -> bool:
    path = f"{lxd_dir}/images/{image['fingerprint']}"
    size = 0
    with contextlib.suppress(FileNotFoundError):  # an image may be one file, or two
        size += os.stat(path).st_size
        size += os.stat(f"{path}.rootfs").st_size
    return bool(size == image["size"])


def _properties(image: dict[str, Any]) -> dict[str, str]:
    return image.get("properties") or {}
