"""StartContainer: token, privilege level, LXD's start, and what the host is told of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re

import tenacity

from agent import atomic_file
from agent.pb import tremplin_pb2 as pb
from agent.tremplin import markers, remap
from agent.tremplin.devices import PREFIX, replace_devices
from agent.tremplin.lxd_client import LxdError, LxdNotFoundError
from agent.tremplin.operation import Operation, OperationError, Outcome
from agent.tremplin.os_release import read_os_release
from agent.tremplin.remove import token_device, token_path
from agent.tremplin.retry import now_or_later, while_busy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agent.tremplin.session import Session

ANSWER_SECONDS = 2.0
"""A start that is over by then is answered STARTED."""
_NETWORK_SECONDS = 130.0
"""An LXD that comes up without its bridge tries again every minute."""
_NETWORK_POLL_SECONDS = 1.0
_PRIVILEGE = {
    pb.StartContainerRequest.UNPRIVILEGED: "false",
    pb.StartContainerRequest.PRIVILEGED: "true",
}


class Start(Operation):
    """Starts a container that is not running."""

    verb = "start"
    method = "StartContainer"

    def __init__(self, session: Session, request: pb.StartContainerRequest) -> None:
        super().__init__(session, request)
        self.os_release = pb.OsRelease()
        """What the container says of itself, as soon as it has been read."""
        self.remapping = False
        """Whether the ids of a container that has been in use are shifted."""

    async def work(self) -> None:
        """See Operation."""
        heartbeat = asyncio.create_task(self._heartbeat())
        try:
            # What LXD is told while a stop is on its way could count before it.
            await self.session.ended("StopContainer", self.container)
            self.session.lifecycle.settle(self.container)
            set_up = await self._prepare()
            self.os_release = await asyncio.to_thread(
                read_os_release, self.session.lxd.container_directory(self.container)
            )
            try:
                await self._start()
            except LxdError as error:
                raise OperationError(await self._reason(error)) from None
            if not set_up:
                await self._mark()
            if self.remapping:
                await remap.let_go(self.session, self.container)
        finally:
            heartbeat.cancel()

    async def clean_up(self) -> None:
        """See Operation."""
        if self.remapping and await asyncio.to_thread(remap.has_copy, self.session, self.container):
            await remap.swap_back(self.session, self.container)
            await remap.let_go(self.session, self.container)

    def report_end(self, outcome: Outcome, reason: str) -> None:
        """See Operation."""
        status = {
            Outcome.DONE: pb.ContainerStartProgress.STARTED,
            Outcome.CANCELLED: pb.ContainerStartProgress.CANCELLED,
        }.get(outcome, pb.ContainerStartProgress.FAILED)
        self._report(status, reason=reason)

    def _report(
        self, status: pb.ContainerStartProgress.Status.ValueType, *, reason: str = ""
    ) -> None:
        starting = status == pb.ContainerStartProgress.STARTING
        self.report(
            "UpdateStartStatus",
            pb.ContainerStartProgress(
                status=status, container_name=self.container, failure_reason=reason
            ),
            final=not starting,
        )

    async def _heartbeat(self) -> None:
        # The newer host takes STARTING for a failure: only while a start is really long.
        while True:
            await asyncio.sleep(self.session.settings.start_heartbeat)
            self._report(pb.ContainerStartProgress.STARTING)

    async def _prepare(self) -> bool:
        # Whether it was started before.
        try:
            instance, set_up, has_copy = await asyncio.gather(
                self.session.lxd.get("instances", self.container),
                markers.is_set_up(self.session.lxd, self.container),
                self.session.lxd.in_thread(remap.has_copy, self.session, self.container),
            )
            if has_copy:
                self.remapping = await remap.swap_back(self.session, self.container)
                if not self.remapping:
                    await remap.let_go(self.session, self.container)
                instance = await self.session.lxd.get("instances", self.container)
        except LxdNotFoundError:
            raise OperationError("there is no such container") from None
        token_file = token_path(self.session.settings.token_dir, self.container)
        await asyncio.to_thread(write_token, token_file, self.request.token)
        wanted_config = {}
        if self.request.privilege_level in _PRIVILEGE:
            wanted_config["security.privileged"] = _PRIVILEGE[self.request.privilege_level]
        wanted_devices = {
            "container_token": token_device(self.session.settings.token_dir, self.container)
        }
        if self.request.disable_audio_capture:
            await replace_devices(self.session, self.container, f"{PREFIX}microphone-", {})
        changes = {
            "config": {k: v for k, v in wanted_config.items() if instance["config"].get(k) != v},
            "devices": {k: v for k, v in wanted_devices.items() if instance["devices"].get(k) != v},
        }
        if any(changes.values()):
            await self.session.lxd.request("patch", "instances", self.container, json=changes)
        if changes["config"]:
            instance = await self.session.lxd.get("instances", self.container)
        if instance["status"] == "Stopped" and remap.is_needed(instance["config"]):
            await self._before_remap(instance["config"], set_up=set_up)
        elif self.remapping:
            await remap.let_go(self.session, self.container)
            self.remapping = False
        return set_up

    async def _before_remap(self, config: dict[str, str], *, set_up: bool) -> None:
        if set_up:
            if not self.remapping:
                self.remapping = True
                await remap.keep_copy(self.session, self.container, config)
        elif await asyncio.to_thread(remap.is_torn, self.session, self.container, config):
            raise OperationError("its first start was cut short: it has to be created again")

    async def _start(self) -> None:
        again = tenacity.AsyncRetrying(
            wait=tenacity.wait_fixed(_NETWORK_POLL_SECONDS),
            stop=tenacity.stop_after_delay(_NETWORK_SECONDS),
            retry=tenacity.retry_if_exception(_has_no_network),
            reraise=True,
        )
        # LXD shows a container as stopped before it has let go of it.
        await again(while_busy, self._change_state)

    async def _change_state(self) -> None:
        try:
            await self._put_state("start")
        except LxdError as error:
            if "already running" not in str(error):
                raise
            instance = await self.session.instance(self.container)
            if instance is not None and instance["status"] == "Frozen":
                await self._put_state("unfreeze")

    async def _put_state(self, action: str) -> None:
        await self.session.lxd_operations.run(
            "put", "instances", self.container, "state", json={"action": action}
        )

    async def _mark(self) -> None:
        async def attempt() -> None:
            with contextlib.suppress(LxdNotFoundError):
                await markers.mark(self.session.lxd, self.container, markers.SET_UP)

        # It runs, and whoever has begun to use it must not lose it.
        await now_or_later(self.session, f"mark container {self.container} as started", attempt)

    async def _reason(self, error: LxdError) -> str:
        # LXD itself says only that its helper failed; the reason is in the log of liblxc.
        if "lxc.conf" not in str(error):
            return str(error)
        try:
            log = await self.session.lxd.container_log(self.container)
        except LxdError:
            return str(error)
        return first_error(log) or str(error)


def _has_no_network(error: BaseException) -> bool:
    return isinstance(error, LxdError) and "unavailable on this server" in str(error)


def first_error(log: str) -> str:
    """The first error in a log of liblxc, without its time and place in the source, or ""."""
    for line in log.splitlines():
        found = re.search(r"\bERROR\s+\S+ - \S+:\S+:\d+ - (.*)", line)
        if found is not None:
            return found[1]
    return ""


def write_token(path: str, token: str) -> None:
    """Writes a container's token, in one step; readable in the container, where ids are shifted."""
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    atomic_file.replace(path, token)
