"""The QEMU command that runs a guest, and the choice between KVM and emulation. Only makes
arguments and asks; host/vm.py starts and watches.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from host.children import find_program, spawn

if TYPE_CHECKING:
    from host.build_files import GuestImage

_KVM = Path("/dev/kvm")
_PROBE_SECONDS = 5.0
_QEMU = "qemu-system-x86_64"

_EMULATED_CPU = "max,-avx,-avx2,-f16c,-fma,-erms,-fsrm,-la57,-mpx,-pku"
"""All that QEMU emulates but what is slower emulated than not used: wide vectors that programs
choose for copying and hashing, string moves byte by byte, a fifth level of page tables, and state
that is saved at each switch of tasks. Without ERMS there must be no FSRM either, which newer QEMUs
emulate: Linux 6.1 then never comes out of memmove().
"""

_EMULATED_WORDS = ("lpj=20000000",)
"""For the kernel command line. Emulated CPUs do not say that their clocks all run at one rate, so
for each but the first the kernel would measure how long its loops take: 2 s. This is the number for
5 GHz at 250 ticks a second; too high is on the safe side: the kernel's busy waiting gets longer.
"""


@dataclass(frozen=True)
class Disk:
    """A raw image given to the guest as a virtio disk."""

    path: Path
    writable: bool = False


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a VM is made of.

    cpus: number of virtual processors; memory: MiB.
    disks: /dev/vdb and on, in this order; /dev/vda is the root.
    words: added to the kernel command line.
    network: whether there is a NIC.
    spare_slots: PCI slots into which devices can be plugged while it runs, named slot0, slot1, …
    usb: whether there is a USB controller, `usb.0`.
    """

    cpus: int = 2
    memory: int = 1024
    disks: tuple[Disk, ...] = ()
    words: tuple[str, ...] = ()
    network: bool = True
    spare_slots: int = 0
    usb: bool = False
    more: tuple[str, ...] = field(default=())
    """Further arguments of QEMU."""


def find_qemu(image: GuestImage) -> list[str]:
    """The QEMU that `make image` fetched, with where its firmware is, or else the machine's.

    Raises HostError.
    """
    fetched = image.qemu.resolve() / _QEMU
    if fetched.is_file():
        return [str(fetched), "-L", str(fetched.parent)]
    return [find_program(_QEMU, hint="install qemu-system-x86")]


def _option(value: Path | str) -> str:
    # In QEMU's option syntax a comma ends a value, and two stand for one.
    return str(value).replace(",", ",,")


def command(
    image: GuestImage,
    machine: Machine,
    *,
    accelerator: str,
    console: Path,
    qmp: Path,
    cid: int,
    vhost_user: Path | None,
) -> list[str]:
    """The command line.

    accelerator: "kvm" or "tcg".
    console: unix socket that is listened on and gets the serial console.
    qmp: unix socket on which QEMU is to serve its monitor.
    cid: the guest's context id.
    vhost_user: vhost-device-vsock's socket; None for the kernel's vhost-vsock.
    """
    accelerator_options = "tcg,thread=multi" if accelerator == "tcg" else "kvm"
    emulated_words = _EMULATED_WORDS if accelerator == "tcg" else ()
    words = " ".join([image.command_line, *emulated_words, *machine.words])
    arguments = [
        *find_qemu(image), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        "-M", "q35,memory-backend=memory,vmport=off,usb=off",
        "-accel", accelerator_options,
        "-cpu", _EMULATED_CPU if accelerator == "tcg" else "host",
        "-smp", str(machine.cpus), "-m", f"{machine.memory}M",
        # vhost-user needs memory that the daemon can map too.
        "-object", f"memory-backend-memfd,id=memory,size={machine.memory}M,share=on",
        "-kernel", str(image.kernel), "-initrd", str(image.initrd), "-append", words,
        "-chardev", f"socket,id=console,path={_option(console)}", "-serial", "chardev:console",
        "-chardev", f"socket,id=qmp,path={_option(qmp)},server=on,wait=off",
        "-mon", "chardev=qmp,mode=control",
        "-device", "virtio-rng-pci",
    ]  # fmt: skip
    for index, disk in enumerate((Disk(image.rootfs), *machine.disks)):
        access = "discard=unmap,detect-zeroes=unmap" if disk.writable else "read-only=on"
        arguments += [
            "-drive", f"if=none,id=disk{index},format=raw,{access},file={_option(disk.path)}",
            "-device", f"virtio-blk-pci,drive=disk{index}",
        ]  # fmt: skip
    if machine.network:
        # Without a route of the host's own, IPv6 would only cost every program in the guest time.
        arguments += [
            "-netdev", "user,id=net0,ipv6=off",
            "-device", "virtio-net-pci,netdev=net0,romfile=",
        ]  # fmt: skip
    if vhost_user is None:
        arguments += ["-device", f"vhost-vsock-pci,guest-cid={cid}"]
    else:
        arguments += [
            "-chardev", f"socket,id=vsock,path={_option(vhost_user)}",
            "-device", "vhost-user-vsock-pci,chardev=vsock",
        ]  # fmt: skip
    for index in range(machine.spare_slots):
        arguments += ["-device", f"pcie-root-port,id=slot{index},chassis={index + 1}"]
    if machine.usb:
        arguments += ["-device", "qemu-xhci,id=usb"]
    return [*arguments, *machine.more]


async def choose_accelerator(image: GuestImage, *, cache: Path) -> Literal["kvm", "tcg"]:
    """Returns "kvm" when the guest's kernel really boots under it on this machine, else "tcg".

    /dev/kvm may be there and no kernel boot under it, so one is tried, once for each boot of the
    machine and each kernel and QEMU.
    cache: a file for the answer.
    """
    if not os.access(_KVM, os.R_OK | os.W_OK):
        return "tcg"
    question = json.dumps(
        [
            Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            [_identity(Path(path)) for path in (image.kernel, find_qemu(image)[0], _KVM)],
        ]
    )
    try:
        known = json.loads(cache.read_text())
    except (OSError, ValueError):
        known = {}
    if isinstance(known, dict) and known.get("question") == question:
        return "kvm" if known.get("kvm") else "tcg"
    works = await _boots_under_kvm(image)
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.write_text(json.dumps({"question": question, "kvm": works}))
    except OSError:
        pass  # asked again next time
    return "kvm" if works else "tcg"


def _identity(path: Path) -> list[int | str]:
    status = path.stat()
    return [str(path), status.st_ino, status.st_size, status.st_mtime_ns]


async def _boots_under_kvm(image: GuestImage) -> bool:
    """Whether the kernel says anything within 5 s; without a root it then panics and QEMU ends."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "console"
        child = await spawn(
            [
                *find_qemu(image),
                "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
                "-M", "q35", "-accel", "kvm", "-cpu", "host", "-m", "256M",
                "-kernel", str(image.kernel), "-append", "console=ttyS0 panic=-1",
                "-serial", f"file:{_option(output)}",
            ],
            log=Path(directory) / "log",
        )  # fmt: skip
        try:
            async with asyncio.timeout(_PROBE_SECONDS):
                await child.wait()
        except TimeoutError:
            pass
        finally:
            await child.kill()
        try:
            return b"Linux version" in output.read_bytes()
        except OSError:
            return False
