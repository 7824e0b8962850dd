"""VMs for tests: the built image, booted by the host's own launcher."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import AsyncIterator
from pathlib import Path

from host.build_files import GuestImage
from host.commands import run_in_guest
from host.disks import DataDisk
from host.flows import Flow, Host, Reached, Wanted, disks
from host.image_server import ImageServer
from host.qemu import Machine
from host.status import GuestInfo, Status
from host.vm import Vm

BUSYBOX = "busybox"
DEBIAN = "debian/bookworm"

repeated: list[str] = []
"""What the launcher said of each boot that it repeated."""


def is_generic(kernel: Path) -> bool:
    """Whether a built kernel is Debian's generic one, which has 9p and USB; its release says so."""
    with kernel.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = data.find(b"Linux version ")
        return b"-cloud-" not in data[start : start + 80]


async def boot(vm: Vm) -> None:
    """Boots a VM until VmReady."""
    await vm.boot()
    await vm.ready()


async def output_of(vm: Vm, *argv: str) -> str:
    """What a program of the VM prints; it must succeed."""
    done = await run_in_guest(vm, argv)
    assert done.code == 0, (argv, done)
    return done.output


class TestVm:
    """A VM with its disk, the newest status it was brought to, and its history."""

    __test__ = False

    def __init__(self, vm: Vm, flow: Flow, image_server: ImageServer) -> None:
        self.vm = vm
        self.flow = flow
        self.image_server = image_server
        self.history: list[GuestInfo] = []

    def host(self, *, container: str = "penguin", alias: str = BUSYBOX, user: str = "tux") -> Host:
        """A host for one container; its states are added to the history."""
        status = Status(self.vm.cid)
        status.observe(self.history.append)
        wanted = Wanted(
            container=container,
            user=user,
            image_server=self.image_server.guest_url,
            image_alias=alias,
        )
        return Host(self.vm, self.flow, wanted, status)

    async def bring_up(
        self, *, container: str = "penguin", alias: str = BUSYBOX, user: str = "tux"
    ) -> Reached:
        """Boots, and goes through the whole flow."""
        await boot(self.vm)
        return await self.host(container=container, alias=alias, user=user).bring_up()


@contextlib.asynccontextmanager
async def new_vm(
    image: GuestImage,
    directory: Path,
    image_server: ImageServer,
    *,
    flow: Flow = Flow.NEWER,
    machine: Machine | None = None,
) -> AsyncIterator[TestVm]:
    """A VM that is not booted yet, with a blank data disk unless the directory has one."""
    base = machine or Machine()
    with DataDisk(directory / "data.img").open() as disk:
        with_disks = Machine(
            cpus=base.cpus,
            memory=base.memory,
            disks=disks(flow, data=disk.path, directory=directory),
            words=base.words,
            spare_slots=base.spare_slots,
            usb=base.usb,
            more=base.more,
        )
        async with Vm(image, with_disks, accelerator="auto") as vm:
            vm.tell = repeated.append
            try:
                yield TestVm(vm, flow, image_server)
            finally:
                (directory / "console.log").write_text(vm.console.text)
