"""ResizeFilesystem and what belongs to it: the size of the mounted btrfs of the stateful disk."""

from __future__ import annotations

import asyncio
import logging
import os
import re

from agent import mount_table
from agent.maitred import block_device, stateful_disk, storage_balloon
from agent.maitred.commands import run
from agent.maitred.errors import CallError, Failed, NotNow
from agent.pb import vm_guest_pb2

_log = logging.getLogger(__name__)

_STEP = 1 << 30
"""Bytes shrunk at a time, so that a shrink shows how far it is and keeps what it has reached."""

Status = vm_guest_pb2.ResizeFilesystemResponse


class FilesystemSize:
    """Grows and shrinks in the background; at most one resize at a time."""

    def __init__(self, directory: str) -> None:
        """directory: where the stateful disk is mounted."""
        self._directory = os.path.realpath(directory)
        self._resizing: asyncio.Task[None] | None = None
        self._target = 0

    def resize(self, size: int) -> vm_guest_pb2.ResizeFilesystemResponse.ResizeStatus.ValueType:
        """Begins to give the filesystem this many bytes, down to a whole sector."""
        if self._resizing is not None:
            return Status.ALREADY_IN_PROGRESS
        target = size - size % stateful_disk.SECTOR
        try:
            mount = self._mounted()
            limit = block_device.size(mount.source)
            if not 0 < target <= limit:
                raise Failed(f"{size} bytes are not from 1 to the {limit} of {mount.source}")
            now = self._size()
        except (CallError, OSError) as error:
            _log.warning("cannot resize the stateful disk: %s", error)
            return Status.FAILED
        self._target = target
        self._resizing = asyncio.get_running_loop().create_task(self._resize(now, target))
        return Status.STARTED

    async def _resize(self, now: int, target: int) -> None:
        try:
            while now != target:
                step = target if target > now else max(target, now - _STEP)
                await asyncio.to_thread(stateful_disk.resize, self._directory, str(step))
                now = step
            _log.info("the stateful disk has %d MiB", now >> 20)
        except OSError as error:
            _log.warning(
                "cannot resize the stateful disk to %d MiB, it has %d: %s",
                target >> 20,
                now >> 20,
                error.strerror,
            )
        finally:
            self._resizing = None

    def status(self) -> vm_guest_pb2.GetResizeStatusResponse:
        """How far the resize is, or the size when there is none. Raises NotNow."""
        self._mounted()
        size = self._size()
        in_progress = self._resizing is not None
        return vm_guest_pb2.GetResizeStatusResponse(
            resize_in_progress=in_progress,
            current_size=size,
            target_size=self._target if in_progress else size,
        )

    async def minimum(self) -> int:
        """The bytes that a shrink could come down to. Raises NotNow, Failed."""
        self._mounted()
        asked = await run("btrfs", "inspect-internal", "min-dev-size", self._directory)
        match = re.match(r"(\d+) bytes", asked.output)
        if asked.code != 0 or match is None:
            raise Failed(f"cannot say how small the stateful disk can be: {asked.reason}")
        return int(match[1])

    def available(self) -> int:
        """The bytes that can still be written. Raises NotNow."""
        self._mounted()
        return stateful_disk.free_bytes(self._directory)

    async def adjust_balloon(self, host_free_bytes: int) -> bool:
        """Lets the guest see no more room than the host has; whether that worked. Raises NotNow."""
        self._mounted()
        try:
            await asyncio.to_thread(storage_balloon.adjust, self._directory, host_free_bytes)
        except OSError as error:
            _log.warning("cannot adjust the storage balloon: %s", error.strerror)
            return False
        return True

    def _mounted(self) -> mount_table.Mount:
        mount = mount_table.at(self._directory)
        if mount is None or mount.fstype != "btrfs":
            raise NotNow("the stateful disk is not mounted; StartTermina does it")
        return mount

    def _size(self) -> int:
        return stateful_disk.total_bytes(self._directory)
