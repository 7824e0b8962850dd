"""CreateContainer: an image becomes a container, under another name until it is whole.

A kill at any moment leaves at most a container with that other name or an unmarked one, which the
next creation takes away.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re

from agent.pb import tremplin_pb2 as pb
from agent.tremplin import images, markers
from agent.tremplin.image_source import FromFiles, FromServer, certificate, image_source
from agent.tremplin.lxd_client import LxdError, LxdGoneError, LxdNotFoundError
from agent.tremplin.lxd_operations import LxdCancelledError
from agent.tremplin.lxd_setup import NETWORK_DEVICE
from agent.tremplin.names import IN_PROGRESS, is_in_progress
from agent.tremplin.operation import Operation, OperationTimedOutError, Outcome
from agent.tremplin.remove import remove_container, token_device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from agent.tremplin.lxd_operations import LxdOperation
    from agent.tremplin.session import Session

_log = logging.getLogger(__name__)

_TICK_SECONDS = 1.0
"""While a download runs the host hears of it at least so often."""
_APART_SECONDS = 0.025
"""Between two percentages that are told: each costs both sides about a millisecond of a processor
that the download needs too.
"""
_PROGRESS = re.compile(r"(metadata|rootfs)[^:]*: (\d+)%")


class Create(Operation):
    """Makes a container."""

    verb = "create"
    method = "CreateContainer"

    def __init__(self, session: Session, request: pb.CreateContainerRequest) -> None:
        """request: checked; an unfinished container of that name is removed."""
        super().__init__(session, request)
        self._source = image_source(request)
        self._asked_at: float | None = asyncio.get_running_loop().time()
        """When LXD was to find out what the source means; None if that was known."""
        self._name = ""
        self._naming = False
        self._percent = -1
        self._told_at = 0.0
        self._telling: asyncio.TimerHandle | None = None
        """The report of a percentage that came too soon after another."""
        self._downloading = False
        self._download_over = False
        self._last_byte_at = 0.0
        self._stored_bytes = 0
        self.name_is_free = False
        """Whether LXD was seen to have no container of that name."""

    @property
    def same_download(self) -> list[Create]:
        """Every creation under way that needs the same image from the same server."""
        return [
            other
            for other in self.session.running
            if isinstance(other, Create)
            and isinstance(other._source, FromServer)
            and other._source == self._source
        ]

    async def work(self) -> None:
        """See Operation."""
        await self.session.ended("DeleteContainer", self.container)
        self._percent = self.notes.get("percent", -1)
        if self.resumed and await self._is_there():
            return
        going_on = self._name_of_before()
        self._name = going_on or self._free_name()
        self.note(name=self._name)
        operation = await self._operation_of(going_on) if going_on else None
        if not self.session.left_overs_removed or self.resumed:
            await self._remove_left_overs(also_mine=operation is None)
            if not self.session.left_overs_removed and operation is None:
                await images.remove_doubtful_images(self.session)
            self.session.left_overs_removed = True
        if not self.name_is_free:
            await self._remove_unfinished()
        if isinstance(self._source, FromServer):
            if operation is not None or not await self._create_from_known(self._source):
                await self._create_from_server(self._source, operation)
        else:
            await self._create_from_files(self._source)
        await markers.mark(self.session.lxd, self._name, markers.CREATED)
        self._naming = True
        await self.session.lxd_operations.run(
            "post", "instances", self._name, json={"name": self.container}
        )

    async def clean_up(self) -> None:
        """See Operation."""
        self.session.left_overs_removed = False
        await self._remove_left_overs(also_mine=True)
        if self._naming:
            await self._remove_unfinished()
        if not self._taken():
            await images.remove_unused_images(self.session)

    def report_end(self, outcome: Outcome, reason: str) -> None:
        """See Operation."""
        self._tell_no_more()
        status = {
            Outcome.DONE: pb.ContainerCreationProgress.CREATED,
            Outcome.CANCELLED: pb.ContainerCreationProgress.CANCELLED,
            Outcome.TIMED_OUT: pb.ContainerCreationProgress.DOWNLOAD_TIMED_OUT,
        }.get(outcome, pb.ContainerCreationProgress.FAILED)
        self._report(status, reason=reason)

    def told(self) -> None:
        """See Operation."""
        super().told()
        if self.outcome is not Outcome.DONE or not isinstance(self._source, FromServer):
            return
        if self._asked_at is not None:
            # Not before: writing it all to the disk takes seconds, and the container is there.
            self.session.in_background(
                images.keep_image_of(self.session, self.container, self._source, self._asked_at)
            )

    def _report(
        self, status: pb.ContainerCreationProgress.Status.ValueType, *, reason: str = ""
    ) -> None:
        downloading = status == pb.ContainerCreationProgress.DOWNLOADING
        self.report(
            "UpdateCreateStatus",
            pb.ContainerCreationProgress(
                status=status,
                container_name=self.container,
                download_progress=max(self._percent, 0) if downloading else 0,
                failure_reason=reason,
            ),
            final=not downloading,
        )

    async def _is_there(self) -> bool:
        # Whether the tremplin that was killed had come to the end.
        try:
            return await markers.is_ours(self.session.lxd, self.container)
        except LxdNotFoundError:
            return False

    def _name_of_before(self) -> str:
        name = str(self.notes.get("name", ""))
        return "" if not isinstance(self._source, FromServer) or name in self._taken() else name

    async def _operation_of(self, name: str) -> LxdOperation | None:
        # LXD goes on with what a tremplin asked for that has since been killed.
        found = await self.session.lxd_operations.under_way(
            lambda other: other == name, on_change=self._on_change
        )
        return found[0] if found else None

    def _taken(self) -> set[str]:
        return {
            other._name
            for other in self.session.running
            if isinstance(other, Create) and other is not self
        }

    def _free_name(self) -> str:
        taken = self._taken()
        if IN_PROGRESS not in taken:
            return IN_PROGRESS
        return next(name for n in range(2, 1000) if (name := f"{IN_PROGRESS}-{n}") not in taken)

    async def _remove_left_overs(self, *, also_mine: bool) -> None:
        kept = self._taken() if also_mine else self._taken() | {self._name}
        for operation in await self.session.lxd_operations.under_way(
            lambda name: is_in_progress(name) and name not in kept
        ):
            await operation.abort()
        for instance in await self.session.instances():
            if is_in_progress(instance["name"]) and instance["name"] not in kept:
                await remove_container(self.session, instance["name"])

    async def _remove_unfinished(self) -> None:
        with contextlib.suppress(LxdNotFoundError):
            if await markers.is_unfinished(self.session.lxd, self.container):
                await remove_container(self.session, self.container)

    async def _create_from_known(self, source: FromServer) -> bool:
        # Whether LXD had the image that was found to be meant a moment ago.
        now = asyncio.get_running_loop().time()
        fingerprint = self.session.known_images.fingerprint(source, now)
        if not fingerprint:
            return False
        try:
            await self._create_from_image(fingerprint)
        except (LxdCancelledError, LxdGoneError):
            raise
        except LxdError as error:
            _log.info(
                "cannot make a container of image %.12s, asking for it: %s", fingerprint, error
            )
            self.session.known_images.forget(source)
            return False
        self._asked_at = None
        return True

    async def _create_from_image(self, fingerprint: str) -> None:
        operation = await self._start_creation({"type": "image", "fingerprint": fingerprint})
        try:
            await operation.wait()
        except asyncio.CancelledError:
            await operation.abort()
            raise

    async def _create_from_server(self, source: FromServer, operation: LxdOperation | None) -> None:
        # operation: the one that is under way already.
        self._downloading = True
        self._last_byte_at = asyncio.get_running_loop().time()
        if operation is None:
            operation = await self._start_creation(
                {
                    "type": "image",
                    "mode": "pull",
                    "protocol": "simplestreams",
                    "server": source.server,
                    "alias": source.alias,
                }
                | await asyncio.to_thread(
                    certificate, source, self.session.settings.image_certificate
                )
            )
        ending = asyncio.ensure_future(operation.wait())
        try:
            while not (await asyncio.wait([ending], timeout=_TICK_SECONDS))[0]:
                await self._tick()
            await ending
        except (asyncio.CancelledError, OperationTimedOutError):
            ending.cancel()
            await operation.abort()
            raise
        finally:
            self._downloading = False

    async def _create_from_files(self, source: FromFiles) -> None:
        self._advance(0)
        fingerprint = await images.import_image(self.session, source)
        self._advance(100)
        try:
            await self._create_from_image(fingerprint)
        finally:
            await images.remove_imported_images(self.session, fingerprint)

    async def _start_creation(self, source: dict[str, str]) -> LxdOperation:
        return await self.session.lxd_operations.start(
            "post",
            "instances",
            json={
                "name": self._name,
                "type": "container",
                "profiles": ["default"],
                "config": _decided_beforehand(),
                "devices": {
                    "container_token": token_device(self.session.settings.token_dir, self.container)
                },
                "source": source,
            },
            on_change=self._on_change,
        )

    def _on_change(self, state: dict[str, Any]) -> None:
        metadata = state.get("metadata") or {}
        if "download_progress" in metadata:
            found = _PROGRESS.match(str(metadata["download_progress"]))
            if found is not None:
                percent = int(found[2]) if found[1] == "rootfs" else 0
                # LXD downloads an image once, and tells only who asked first.
                for create in self.same_download:
                    create._download_advances(percent)
        elif "progress" in metadata:
            self._download_is_over()

    def _download_advances(self, percent: int) -> None:
        self._last_byte_at = asyncio.get_running_loop().time()
        self._advance(percent)
        if percent >= 100:
            self._download_is_over()

    def _download_is_over(self) -> None:
        self._download_over = True

    def _advance(self, percent: int) -> None:
        percent = min(percent, 100)
        if percent <= self._percent:
            return
        self._percent = percent
        loop = asyncio.get_running_loop()
        wait = self._told_at + _APART_SECONDS - loop.time()
        if wait <= 0 or percent == 100:
            self._tell_percent()
        elif self._telling is None:
            self._telling = loop.call_later(wait, self._tell_percent)

    def _tell_percent(self) -> None:
        self._tell_no_more()
        self._told_at = asyncio.get_running_loop().time()
        self.note(percent=self._percent)
        self._report(pb.ContainerCreationProgress.DOWNLOADING)

    def _tell_no_more(self) -> None:
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None

    async def _tick(self) -> None:
        if not self._downloading or self._download_over:
            return
        now = asyncio.get_running_loop().time()
        if not self.session.lxd_is_up.is_set():
            self._last_byte_at = now
            return
        # A slow download gives no sign for long, but its file grows.
        stored = await self.session.lxd.in_thread(
            _bytes_in, f"{self.session.settings.lxd_dir}/images"
        )
        if stored != self._stored_bytes:
            self._stored_bytes = stored
            self._last_byte_at = now
            self._tell_percent()
        if now - self._last_byte_at < self.session.settings.download_timeout:
            return
        if await self.session.instance(self._name) is not None:
            self._download_is_over()
            return
        raise OperationTimedOutError(
            f"no byte came from the image server for {now - self._last_byte_at:.0f} s"
        )


def _decided_beforehand() -> dict[str, str]:
    """What LXD would add to the new container's configuration bit by bit, with a flush to the disk
    each time, were it not there: a twentieth of a creation.

    Source: LXD's doc/reference/instance_options.md, volatile keys.
    """
    return {
        "volatile.apply_template": "create",
        # LXD takes any of these at random as well.
        f"volatile.{NETWORK_DEVICE}.hwaddr": f"00:16:3e:{os.urandom(3).hex(':')}",
    }


def _bytes_in(directory: str) -> int:
    total = 0
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                total += entry.stat(follow_symlinks=False).st_size
    return total
