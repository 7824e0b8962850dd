"""ExportContainer: LXD packs a container, running or not, from a snapshot, and the pack goes to a
file of the VM, which has its name only when it is whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading

from agent.pb import tremplin_pb2 as pb
from agent.places import open_place
from agent.tremplin.lxd_client import LxdNotFoundError
from agent.tremplin.operation import Operation, OperationError, Outcome
from agent.tremplin.paths import path_problem

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_BACKUP = "tremplin-export"
_CHUNK = 256 * 1024
_TICK_SECONDS = 0.5
# Every LXD and every host can read gzip; a better ratio would take several times as long.
_COMPRESSION = "gzip -1"
_ROOM = 16 * 1024 * 1024
"""Bytes to leave free beside an export."""


class Export(Operation):
    """Writes a container to a file."""

    verb = "export"
    method = "ExportContainer"

    def __init__(self, session: Any, request: pb.ExportContainerRequest) -> None:
        """request: checked."""
        super().__init__(session, request)
        self._written = 0
        self._total = 0
        self._stop = threading.Event()

        self._directory, self._name = os.path.split(request.export_path)
        self._partial = f"{self._name}.partial"

    async def work(self) -> None:
        """See Operation."""
        self._report(pb.ContainerExportProgress.EXPORTING_PACK)
        await self._remove_backup()
        operation = await self.session.lxd_operations.start(
            "post",
            "instances",
            self.container,
            "backups",
            json={
                "name": _BACKUP,
                "instance_only": True,
                "optimized_storage": False,
                "compression_algorithm": _COMPRESSION,
            },
        )
        ending = asyncio.ensure_future(operation.wait())
        try:
            while not (await asyncio.wait([ending], timeout=_TICK_SECONDS))[0]:
                self._report(pb.ContainerExportProgress.EXPORTING_PACK)
            await ending
        except asyncio.CancelledError:
            # LXD cannot stop packing; what it makes is removed when it is there.
            await asyncio.wait([ending])
            raise
        await self._download()
        await self._remove_backup()

    async def _download(self) -> None:
        writing = asyncio.ensure_future(self.session.lxd.in_thread(self._write))
        try:
            while not (await asyncio.wait([writing], timeout=_TICK_SECONDS))[0]:
                self._report(pb.ContainerExportProgress.EXPORTING_DOWNLOAD)
            await writing
        except asyncio.CancelledError:
            self._stop.set()
            await asyncio.wait([writing])
            raise
        self._report(pb.ContainerExportProgress.EXPORTING_DOWNLOAD)

    def _write(self) -> None:
        path = ("instances", self.container, "backups", _BACKUP, "export")
        answer = self.session.lxd.call("get", path, is_api=False, stream=True)
        with contextlib.closing(answer):
            self._total = int(answer.headers.get("Content-Length", 0))
            with open_place(self._directory) as place:
                self._write_in(place.descriptor, answer)

    def _write_in(self, directory: int, answer: Any) -> None:
        # directory: a descriptor of it; others may write there, too, and make links.
        found = os.statvfs(directory)
        free = found.f_bavail * found.f_frsize
        if free < self._total + _ROOM:
            raise OperationError(
                f"it takes {self._total} bytes, and {self._directory} has {free} free"
            )
        self._unlink(directory)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        partial = os.open(self._partial, flags, 0o644, dir_fd=directory)
        with open(partial, "wb") as file:
            for chunk in answer.iter_content(_CHUNK):
                if self._stop.is_set():
                    return
                file.write(chunk)
                self._written += len(chunk)
            file.flush()
            os.fsync(file.fileno())
        if self._written != self._total:
            raise OperationError("LXD sent less than it promised")
        os.replace(self._partial, self._name, src_dir_fd=directory, dst_dir_fd=directory)

    def _unlink(self, directory: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._partial, dir_fd=directory)

    async def clean_up(self) -> None:
        """See Operation."""
        # Whoever has put the directory out of reach has what is in it.
        with contextlib.suppress(OSError), open_place(self._directory) as place:
            self._unlink(place.descriptor)
        await self._remove_backup()

    async def _remove_backup(self) -> None:
        with contextlib.suppress(LxdNotFoundError):
            await self.session.lxd_operations.run(
                "delete", "instances", self.container, "backups", _BACKUP
            )

    def report_end(self, outcome: Outcome, reason: str) -> None:
        """See Operation."""
        status = {
            Outcome.DONE: pb.ContainerExportProgress.DONE,
            Outcome.CANCELLED: pb.ContainerExportProgress.CANCELLED,
        }.get(outcome, pb.ContainerExportProgress.FAILED)
        self._report(status, reason=reason, final=True)

    def _report(
        self,
        status: pb.ContainerExportProgress.Status.ValueType,
        *,
        reason: str = "",
        final: bool = False,
    ) -> None:
        percent = 100 * self._written // self._total if self._total else 0
        self.report(
            "UpdateExportStatus",
            pb.ContainerExportProgress(
                container_name=self.container,
                status=status,
                progress_percent=percent,
                failure_reason=reason,
                bytes_exported=self._written,
            ),
            final=final,
        )


def export_problem(path: str) -> str:
    """Why nothing can be exported to path, or ""; blocks."""
    if problem := path_problem("export_path", path):
        return problem
    directory, name = os.path.split(path)
    try:
        with open_place(directory) as place:
            if not os.path.isdir(place.path):
                return f"there is no directory {directory}"
            if not name or os.path.isdir(f"{place.path}/{name}"):
                return f"{path} is a directory"
            if not os.access(place.path, os.W_OK):
                return f"cannot write in {directory}"
    except FileNotFoundError:
        return f"there is no directory {directory}"
    except OSError as error:
        return f"cannot write in {directory}: {error.strerror}"
    return ""
