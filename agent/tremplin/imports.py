"""ImportContainer: a file that ExportContainer wrote becomes a container again. A container of that
name is replaced only when the new one is whole; a kill in between is put right at the next start.

Nobody knows who has written the file. Of what it says about the container's settings, which could
be root's rights in the VM, next to nothing is taken over.
"""

from __future__ import annotations

import asyncio
import os
import threading
from typing import NamedTuple

from agent.pb import tremplin_pb2 as pb
from agent.tremplin import archive, markers
from agent.tremplin.names import IMPORTING, REPLACED
from agent.tremplin.operation import Operation, OperationError, Outcome
from agent.tremplin.paths import open_file, path_problem
from agent.tremplin.remove import remove_container

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, BinaryIO

    from agent.tremplin.session import Session

_TICK_SECONDS = 0.5
_NAME_KEY = "user.tremplin-replaced"
_KEPT = ("image.", "volatile.base_image", "volatile.idmap.", "volatile.last_state.idmap")
"""How the settings begin that an imported container keeps. LXD sets the ids that it is to have when
it makes it, and anew when one of the settings goes that they come from.
"""


class Wrong(NamedTuple):
    """Why a file cannot be imported, told before anything is written."""

    status: pb.ContainerImportProgress.Status.ValueType
    reason: str
    details: dict[str, Any]


class Import(Operation):
    """Makes a container from an exported file."""

    verb = "import"
    method = "ImportContainer"

    def __init__(self, session: Any, request: pb.ImportContainerRequest) -> None:
        """request: checked."""
        super().__init__(session, request)
        self._wrong: Wrong | None = None
        self._sent = 0
        self._total = 0
        self._stop = threading.Event()

    async def work(self) -> None:
        """See Operation."""
        lxd = self.session.lxd
        architectures = (await lxd.get())["environment"]["architectures"]
        self._wrong = await lxd.in_thread(self._find_wrong, architectures)
        if self._wrong is not None:
            raise OperationError(self._wrong.reason)
        # Two at once would need two names; nobody imports two containers at once.
        async with self.session.import_lock:
            await put_right(self.session)
            await self._upload()
            await _disarm(self.session)
            await markers.mark(lxd, IMPORTING, markers.CREATED, markers.SET_UP)
            await asyncio.shield(self._replace())

    async def _upload(self) -> None:
        sending = asyncio.ensure_future(self.session.lxd.in_thread(self._send))
        try:
            while not (await asyncio.wait([sending], timeout=_TICK_SECONDS))[0]:
                self._report(pb.ContainerImportProgress.IMPORTING_UPLOAD)
            answer = await sending
        except asyncio.CancelledError:
            self._stop.set()
            await asyncio.wait([sending])
            raise
        operation = await self.session.lxd_operations.follow(answer)
        ending = asyncio.ensure_future(operation.wait())
        try:
            while not (await asyncio.wait([ending], timeout=_TICK_SECONDS))[0]:
                self._report(pb.ContainerImportProgress.IMPORTING_UNPACK)
            await ending
        except asyncio.CancelledError:
            # LXD cannot stop unpacking; what it makes is removed when it is there.
            await asyncio.wait([ending])
            raise

    def _send(self) -> dict[str, Any]:
        with open_file(self.request.import_path) as file:
            self._total = os.fstat(file.fileno()).st_size
            head = file.read(archive.HEAD_BYTES)
            # Whoever can write to the file may have changed it: what is sent is what counts.
            archive.architecture(head)
            headers = {"Content-Type": "application/octet-stream", "X-LXD-name": IMPORTING}
            return self.session.lxd.answer(
                "post", ("instances",), data=_Counted(head, file, self), headers=headers
            )

    async def _replace(self) -> None:
        session = self.session
        old = await session.instance(self.container)
        if old is not None:
            if old["status"] != "Stopped":
                stop = {"action": "stop", "force": True, "timeout": -1}
                await session.lxd_operations.run(
                    "put", "instances", self.container, "state", json=stop
                )
            await session.lxd.request(
                "patch", "instances", self.container, json={"config": {_NAME_KEY: self.container}}
            )
            await _rename(session, self.container, REPLACED)
        await _rename(session, IMPORTING, self.container)
        await remove_container(session, REPLACED)

    def _find_wrong(self, architectures: list[str]) -> Wrong | None:
        path = self.request.import_path
        architecture = archive.read_architecture(path)
        if architecture not in architectures:
            device = os.uname().machine
            return Wrong(
                pb.ContainerImportProgress.FAILED_ARCHITECTURE,
                f"it is for {architecture}, and this is {device}",
                {"architecture_device": device, "architecture_container": architecture},
            )
        found = os.statvfs(self.session.settings.lxd_dir)
        free = found.f_bavail * found.f_frsize
        # LXD writes the file down before it unpacks it.
        needed = sum(archive.sizes(path))
        if needed > free:
            return Wrong(
                pb.ContainerImportProgress.FAILED_SPACE,
                f"it takes {needed} bytes, and {free} are free",
                {"disk_space_available_bytes": free, "disk_space_required_bytes": needed},
            )
        return None

    async def clean_up(self) -> None:
        """See Operation."""
        if self._wrong is None:
            await put_right(self.session)

    def report_end(self, outcome: Outcome, reason: str) -> None:
        """See Operation."""
        status = {
            Outcome.DONE: pb.ContainerImportProgress.DONE,
            Outcome.CANCELLED: pb.ContainerImportProgress.CANCELLED,
        }.get(outcome, pb.ContainerImportProgress.FAILED)
        details = {}
        if self._wrong is not None:
            status, details = self._wrong.status, self._wrong.details
        self._report(status, reason=reason, final=True, **details)

    def _report(
        self,
        status: pb.ContainerImportProgress.Status.ValueType,
        *,
        reason: str = "",
        final: bool = False,
        **details: Any,
    ) -> None:
        percent = 100 * self._sent // self._total if self._total else 0
        self.report(
            "UpdateImportStatus",
            pb.ContainerImportProgress(
                container_name=self.container,
                status=status,
                progress_percent=percent,
                failure_reason=reason,
                **details,
            ),
            final=final,
        )


class _Counted:
    """A file that is being sent, for requests: it has a length and counts what was read."""

    def __init__(self, head: bytes, file: BinaryIO, operation: Import) -> None:
        """head: what was read of the file before."""
        self._head = head
        self._file = file
        self._operation = operation

    def __len__(self) -> int:
        return self._operation._total

    def read(self, size: int = -1) -> bytes:
        if self._operation._stop.is_set():
            raise OSError("it was cancelled")
        data, self._head = self._head, b""
        data = data or self._file.read(size)
        self._operation._sent += len(data)
        return data


async def put_right(session: Session) -> None:
    """Removes what an import left that did not come to its end. Raises LxdError.

    A container that was to be replaced is back under its name, or gone if the new one is there.
    """
    for operation in await session.lxd_operations.under_way(lambda name: name == IMPORTING):
        await operation.abort()
    replaced = await session.instance(REPLACED)
    if replaced is not None:
        name = replaced["config"].get(_NAME_KEY, "")
        if name and await session.instance(name) is None:
            await _rename(session, REPLACED, name)
        else:
            await remove_container(session, REPLACED)
    await remove_container(session, IMPORTING)


async def _disarm(session: Session) -> None:
    # Takes from what was imported, before anything is done with it, all that its file asks for:
    # privileges, commands for liblxc to run as root, devices and directories of the VM.
    instance = await session.lxd.get("instances", IMPORTING)
    config = {k: v for k, v in instance["config"].items() if k.startswith(_KEPT)}
    body = {
        "architecture": instance["architecture"],
        "config": config,
        "description": "",
        "devices": {},
        "ephemeral": False,
        "profiles": ["default"],
    }
    await session.lxd_operations.run("put", "instances", IMPORTING, json=body)


async def _rename(session: Session, old: str, new: str) -> None:
    await session.lxd_operations.run("post", "instances", old, json={"name": new})


def import_problem(path: str) -> str:
    """Why path cannot be imported, or ""; blocks."""
    if problem := path_problem("import_path", path):
        return problem
    try:
        archive.read_architecture(path)
    except (OSError, OperationError) as error:
        return str(error)
    return ""
