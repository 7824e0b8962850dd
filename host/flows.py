"""The order in which hosts call, from VmReady to a running container: the newer and the older host
of docs/contract.md. Everything goes over the public wire; host/vm.py holds the VM.

The newer host calls from inside the guest's calls, before it answers them; so does this one.
"""

from __future__ import annotations

import asyncio
import enum
import errno
import os
import secrets
import socket
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from agent.pb import tremplin_pb2, vm_guest_pb2
from host.commands import CALL_SECONDS, LXC_ENVIRONMENT
from host.disks import make_shared_image, make_tools_image
from host.errors import HostError, VmDiedError
from host.qemu import Disk
from host.status import ContainerStatus, Status

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import grpc.aio

    from host.vm import Vm

_RequestT = TypeVar("_RequestT")
_AnswerT = TypeVar("_AnswerT")

START_TERMINA_SECONDS = 150.0
_TREMPLIN_READY_SECONDS = 120.0
_START_SECONDS = 120.0
_ADDRESS_SECONDS = 60.0
_POLL_SECONDS = 0.3

_MS_RDONLY = 1
_SUBNET = "100.115.92.1/24"

_CreateProgress = tremplin_pb2.ContainerCreationProgress
_StartProgress = tremplin_pb2.ContainerStartProgress
_StartResponse = tremplin_pb2.StartContainerResponse


class Flow(enum.Enum):
    """Which of the two hosts of the field to be."""

    NEWER = "newer"
    OLDER = "older"


_MOUNTS = {
    Flow.NEWER: (
        ("/dev/vdb", "/opt/google/cros-containers", "ext4"),
        ("/dev/vdd", "/mnt/shared", "romfs"),
    ),
    Flow.OLDER: (("/dev/vdc", "/mnt/shared", "romfs"),),
}


def disks(flow: Flow, *, data: Path, directory: Path) -> tuple[Disk, ...]:
    """The disks as each host attaches them, the first one being /dev/vdb.

    data: the stateful disk; directory: where the small images are made.
    Raises HostError.
    """
    shared = directory / "shared.img"
    make_shared_image(shared)
    if flow is Flow.OLDER:
        return (Disk(data, writable=True), Disk(shared))
    tools = directory / "tools.img"
    make_tools_image(tools)
    return (Disk(tools), Disk(data, writable=True), Disk(shared))


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a container is to be.

    container, user: names; token: what appears as /dev/.container_token.
    image_server, image_alias: where it comes from.
    news_timeout: seconds without news of the creation until it is given up.
    """

    container: str = "penguin"
    user: str = "user"
    image_server: str = ""
    image_alias: str = "debian/bookworm"
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    news_timeout: float = 180.0


@dataclass(frozen=True, kw_only=True)
class Reached:
    """What came of it: the user's name as the container has it, home, address, and whether the
    container was there before.
    """

    user: str
    home: str
    ipv4: str
    existed: bool


def network_order(address: str) -> int:
    """An IPv4 address as the wire has it: the bytes in memory read a.b.c.d on little-endian.

    Raises HostError for what is no address.
    """
    try:
        return int(struct.unpack("<I", socket.inet_aton(address))[0])
    except OSError:
        raise HostError(f"cannot use address {address!r}: not a.b.c.d") from None


def dotted(address: int) -> str:
    """The opposite of network_order()."""
    return socket.inet_ntoa(struct.pack("<I", address))


def _refused(what: str, answer: Any, status: str = "") -> HostError:
    """The error for an answer or a report with a failure_reason; status: its name, if that tells
    more than that it failed.
    """
    reason = answer.failure_reason or "no reason given"
    return HostError(f"cannot {what}: {status}: {reason}" if status else f"cannot {what}: {reason}")


class Host:
    """One host that brings up one container in one boot of a VM."""

    def __init__(self, vm: Vm, flow: Flow, wanted: Wanted, status: Status) -> None:
        self._vm = vm
        self._flow = flow
        self._wanted = wanted
        self._status = status
        self._begin()

    def _begin(self) -> None:
        # What is known of the container in one boot.
        self._created: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._news = asyncio.Event()
        self._user = self._wanted.user
        self._existed = False
        self._started = False
        self._events_before_start = 0

    async def bring_up(self) -> Reached:
        """All of it; the VM was booted just before, and is booted once more if its kernel fails.

        Raises HostError, VmDiedError. The status says FAILED then, with the reason.
        """
        try:
            try:
                return await self._bring_up()
            except VmDiedError:
                if not await self._vm.boot_after_fault():
                    raise
                self._begin()
                return await self._bring_up()
        except HostError as error:
            self._status.fail(str(error))
            raise

    async def _bring_up(self) -> Reached:
        try:
            return await self._take_steps()
        finally:
            self._vm.recorder.handle("UpdateCreateStatus", None)
            if not self._created.cancel():
                self._created.exception()  # nobody may have waited for it any more

    async def _take_steps(self) -> Reached:
        vm = self._vm
        self._status.enter(ContainerStatus.LAUNCHING_GUEST)
        await vm.ready()
        self._status.enter(ContainerStatus.STARTING_VM)
        await self.mount_disks()
        await self.set_up_network()
        await self.start_termina()
        await self.wait_for_tremplin()
        if self._flow is Flow.NEWER:
            await self.start_lxd()
        await self.create_container()
        await self.wait_until_started()
        reached = await self.find_out()
        self._status.enter(ContainerStatus.READY)
        return reached

    async def _call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[_RequestT, _AnswerT],
        request: _RequestT,
        *,
        what: str,
        timeout: float = CALL_SECONDS,
    ) -> _AnswerT:
        """The answer to a call of the guest's. what: it is to do, for the error; timeout: seconds.

        Raises HostError, VmDiedError.
        """
        return await self._vm.answer(method(request, timeout=timeout), what=what, timeout=timeout)

    # ---- Maitred ------------------------------------------------------------------------------

    async def mount_disks(self) -> None:
        """The small read-only disks."""
        for source, target, fstype in _MOUNTS[self._flow]:
            what = f"mount {source} on {target}"
            answer = await self._call(
                self._vm.maitred.Mount,
                vm_guest_pb2.MountRequest(
                    source=source, target=target, fstype=fstype, mountflags=_MS_RDONLY,
                    create_target=self._flow is Flow.NEWER,
                ),
                what=what,
            )  # fmt: skip
            # Mounted already, by a call that the guest carried out and could not answer any more.
            if answer.error not in {0, errno.EBUSY}:
                raise HostError(f"cannot {what}: {os.strerror(answer.error)}")

    async def set_up_network(self) -> None:
        """A first address, then the one that QEMU's network hands out by DHCP."""
        await self._call(
            self._vm.maitred.ConfigureNetwork,
            vm_guest_pb2.NetworkConfigRequest(
                ipv4_config=vm_guest_pb2.IPv4Config(
                    address=network_order("100.64.1.1"),
                    netmask=network_order("255.255.255.252"),
                    gateway=network_order("100.64.1.2"),
                )
            ),
            what="configure the network",
        )
        flushed = await self._call(
            self._vm.maitred.LaunchProcess,
            vm_guest_pb2.LaunchProcessRequest(
                argv=["/bin/ip", "address", "flush", "eth0"], wait_for_exit=True, use_console=True
            ),
            what="flush eth0",
        )
        if (flushed.status, flushed.code) != (vm_guest_pb2.EXITED, 0):
            raise HostError(
                f"cannot flush eth0: {vm_guest_pb2.ProcessStatus.Name(flushed.status)} "
                f"{flushed.code}"
            )
        await self._launch(
            [
                "/sbin/dhclient", "-lf", "/run/dhclient.leases", "-pf", "/run/dhclient.pid",
                "-d", "eth0",
            ],
            env={"HOME": "/tmp", "PATH": "/sbin:/bin"},
            what="launch dhclient",
        )  # fmt: skip

    async def _launch(self, argv: Sequence[str], *, env: dict[str, str], what: str) -> None:
        launched = await self._call(
            self._vm.maitred.LaunchProcess,
            vm_guest_pb2.LaunchProcessRequest(argv=argv, env=env, respawn=True, use_console=True),
            what=what,
        )
        if launched.status != vm_guest_pb2.LAUNCHED:
            raise HostError(f"cannot {what}: {vm_guest_pb2.ProcessStatus.Name(launched.status)}")

    async def start_termina(self) -> None:
        """The stateful disk, and tremplin on it."""
        answer = await self._call(
            self._vm.maitred.StartTermina,
            vm_guest_pb2.StartTerminaRequest(
                lxd_ipv4_subnet=_SUBNET,
                stateful_device="/dev/vdc" if self._flow is Flow.NEWER else "",
            ),
            what="start termina",
            timeout=START_TERMINA_SECONDS,
        )
        if answer.status != vm_guest_pb2.StartTerminaResponse.SUCCESS:
            raise _refused("start termina", answer)

    # ---- Tremplin -----------------------------------------------------------------------------

    async def wait_for_tremplin(self) -> None:
        """TremplinReady has come, in this boot."""
        await self._vm.alive(
            self._vm.recorder.wait_for("TremplinReady", since=self._vm.boot_events),
            timeout=_TREMPLIN_READY_SECONDS,
            what="start tremplin",
        )

    async def start_lxd(self) -> None:
        """LXD is up; only the newer host asks."""
        response = tremplin_pb2.StartLxdResponse
        answer = await self._call(
            self._vm.tremplin.StartLxd,
            tremplin_pb2.StartLxdRequest(reset_lxd_db=False),
            what="start LXD",
        )
        if answer.status == response.STARTING:
            progress = tremplin_pb2.StartLxdProgress
            told = await self._vm.alive(
                self._vm.recorder.wait_for(
                    "UpdateStartLxdStatus",
                    lambda message: message.status in {progress.STARTED, progress.FAILED},
                    since=self._vm.boot_events,
                ),
                timeout=_TREMPLIN_READY_SECONDS,
                what="start LXD",
            )
            if told.status != progress.STARTED:
                raise _refused("start LXD", told)
        elif answer.status != response.ALREADY_RUNNING:
            raise _refused("start LXD", answer)

    async def create_container(self) -> None:
        """The container is there, has its user, and its start has begun."""
        response = tremplin_pb2.CreateContainerResponse
        wanted = self._wanted
        what = f"create container {wanted.container}"
        self._vm.recorder.handle("UpdateCreateStatus", self._on_create_status)
        answer = await self._call(
            self._vm.tremplin.CreateContainer,
            tremplin_pb2.CreateContainerRequest(
                container_name=wanted.container,
                image_server=wanted.image_server,
                image_alias=wanted.image_alias,
            ),
            what=what,
        )
        if answer.status == response.EXISTS:
            self._existed = True
            await self._set_up_and_start()
        elif answer.status == response.CREATING:
            await self._wait_until_created(what)
        else:
            raise _refused(what, answer)

    async def _wait_until_created(self, what: str) -> None:
        """Waits for the end of the creation, as long as there is news of it in time."""
        while not self._created.done():
            self._news.clear()
            await self._vm.alive(self._news.wait(), timeout=self._wanted.news_timeout, what=what)
        await self._created

    async def _on_create_status(self, progress: Any) -> None:
        if progress.container_name != self._wanted.container or self._created.done():
            return
        if progress.status == _CreateProgress.DOWNLOADING:
            if progress.download_progress < 100:
                self._status.downloading(progress.download_progress)
            else:
                self._status.downloading(100)
                self._status.enter(ContainerStatus.EXTRACTING)
            self._news.set()
            return
        try:
            if progress.status != _CreateProgress.CREATED:
                status = _CreateProgress.Status.Name(progress.status)
                raise _refused(f"create container {progress.container_name}", progress, status)
            await self._set_up_and_start()
        except HostError as error:
            if not self._created.done():
                self._created.set_exception(error)
        else:
            if not self._created.done():
                self._created.set_result(None)
        self._news.set()

    async def _set_up_and_start(self) -> None:
        self._status.enter(ContainerStatus.STARTING)
        if self._flow is Flow.NEWER:
            await self._set_up_user()
            await self._start_container()
        else:
            await self._start_container()
            await self._set_up_user()

    async def _set_up_user(self) -> None:
        response = tremplin_pb2.SetUpUserResponse
        answer = await self._call(
            self._vm.tremplin.SetUpUser,
            tremplin_pb2.SetUpUserRequest(
                container_name=self._wanted.container, container_username=self._wanted.user
            ),
            what="set up the user",
            timeout=_START_SECONDS,
        )
        if answer.status not in {response.SUCCESS, response.EXISTS}:
            raise _refused("set up the user", answer)
        self._user = answer.username or self._wanted.user

    async def _start_container(self) -> None:
        what = f"start container {self._wanted.container}"
        self._events_before_start = len(self._vm.recorder.events)
        answer = await self._call(
            self._vm.tremplin.StartContainer,
            tremplin_pb2.StartContainerRequest(
                container_name=self._wanted.container, token=self._wanted.token
            ),
            what=what,
            timeout=_START_SECONDS,
        )
        accepted = {_StartResponse.STARTED, _StartResponse.RUNNING}
        if self._flow is Flow.NEWER:
            accepted |= {_StartResponse.STARTING, _StartResponse.REMAPPING}
        if answer.status == _StartResponse.STARTING and self._flow is Flow.OLDER:
            # The contract grants the guest 2 s to answer STARTED; on an emulated machine a start
            # takes longer than that, and the older host, too, hears of its end.
            accepted.add(_StartResponse.STARTING)
        if answer.status not in accepted:
            raise _refused(what, answer, _StartResponse.Status.Name(answer.status))
        self._started = answer.status == _StartResponse.RUNNING

    async def wait_until_started(self) -> None:
        """The guest has told that the container runs."""
        if self._started:
            return
        what = f"start container {self._wanted.container}"
        told = await self._vm.alive(
            self._vm.recorder.wait_for(
                "UpdateStartStatus",
                # The newer host of the field gives up at a heartbeat, the first of which comes
                # after 30 s; on a slow emulated machine the container still comes up.
                lambda message: (
                    message.container_name == self._wanted.container
                    and message.status != _StartProgress.STARTING
                ),
                since=self._events_before_start,
            ),
            timeout=_START_SECONDS,
            what=what,
        )
        if told.status != _StartProgress.STARTED:
            raise _refused(what, told, _StartProgress.Status.Name(told.status))

    async def find_out(self) -> Reached:
        """The user and the address of the running container."""
        name = self._wanted.container
        who = tremplin_pb2.GetContainerUsernameResponse
        what = "find the container's user"
        answer = await self._call(
            self._vm.tremplin.GetContainerUsername,
            tremplin_pb2.GetContainerUsernameRequest(container_name=name),
            what=what,
        )
        if answer.status != who.SUCCESS:
            raise _refused(what, answer, who.Status.Name(answer.status))
        return Reached(
            user=answer.username,
            home=answer.homedir,
            ipv4=await self._address(name),
            existed=self._existed,
        )

    async def _address(self, name: str) -> str:
        """The container's address; it comes by DHCP some time after the start."""
        response = tremplin_pb2.GetContainerInfoResponse
        what = f"find the address of container {name}"
        try:
            async with asyncio.timeout(_ADDRESS_SECONDS):
                while True:
                    answer = await self._call(
                        self._vm.tremplin.GetContainerInfo,
                        tremplin_pb2.GetContainerInfoRequest(container_name=name),
                        what=what,
                    )
                    if answer.status == response.RUNNING and answer.ipv4_address:
                        return dotted(answer.ipv4_address)
                    if answer.status not in {response.RUNNING, response.FAILED}:
                        raise _refused(what, answer, response.Status.Name(answer.status))
                    await asyncio.sleep(_POLL_SECONDS)
        except TimeoutError:
            raise HostError(f"cannot {what}: none after {_ADDRESS_SECONDS:g} s") from None

    async def log_in(self) -> None:
        """A login of the container's user on the console, again after each logout."""
        await self._launch(
            [
                "/usr/bin/lxc", "exec", self._wanted.container, "--",
                "/bin/login", "-f", self._user,
            ],
            env=LXC_ENVIRONMENT,
            what="log in to the container",
        )  # fmt: skip
