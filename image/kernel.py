"""The kernel: its uncompressed payload for a fast PVH boot, and the modules the guest can use."""

from __future__ import annotations

import fnmatch
import shutil
import struct
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from image.build import BuildError, run

if TYPE_CHECKING:
    from collections.abc import Iterable

PACKAGES = {"cloud": "linux-image-cloud-amd64", "generic": "linux-image-amd64"}
"""Debian's kernels by the names they have here; the generic one also has 9p and USB."""

INITRD_MODULES = (
    "virtio_pci",
    "virtio_blk",
    "ext4",
    "vmw_vsock_virtio_transport",
    "overlay",
    "virtio_net",
)
"""What the guest needs before its /sbin/init can serve the host."""

LATER_MODULES = (
    "btrfs", "fuse", "tun", "squashfs", "loop", "bridge", "veth", "nf_tables", "nft_chain_nat",
    "nft_masq", "nft_ct", "nft_compat", "xt_CHECKSUM", "xt_comment", "br_netfilter",
)  # fmt: skip
"""What StartTermina and LXD need. The initrd's init loads them on the second processor while Python
starts on the first; without the cost of a modprobe and with btrfs's 0.4 s of benchmarks hidden."""

_KEPT = (
    "arch/x86/crypto/*", "crypto/*", "lib/*",
    "drivers/block/loop.ko", "drivers/block/virtio_blk.ko", "drivers/cdrom/cdrom.ko",
    "drivers/char/hw_random/*", "drivers/char/virtio_console.ko", "drivers/virtio/*",
    "drivers/net/dummy.ko", "drivers/net/ipvlan/*", "drivers/net/macvlan.ko",
    "drivers/net/macvtap.ko", "drivers/net/tap.ko", "drivers/net/tun.ko", "drivers/net/veth.ko",
    "drivers/net/virtio_net.ko", "drivers/net/vxlan/*", "drivers/net/wireguard/*",
    "drivers/usb/*", "drivers/hid/*", "drivers/scsi/scsi_mod.ko", "drivers/scsi/sd_mod.ko",
    "drivers/net/usb/*",
    "fs/9p/*", "fs/btrfs/*", "fs/ext4/*", "fs/fat/*", "fs/fscache/*", "fs/netfs/*", "fs/fuse/*",
    "fs/isofs/*", "fs/nls/*", "fs/overlayfs/*", "fs/romfs/*", "fs/squashfs/*", "fs/xfs/*",
    "net/802/*", "net/8021q/*", "net/9p/*", "net/bridge/*", "net/core/*", "net/ipv4/*",
    "net/ipv6/*", "net/llc/*", "net/netfilter/*", "net/sched/*", "net/vmw_vsock/*",
)  # fmt: skip
"""Modules worth their place in the root filesystem, below /lib/modules/RELEASE/kernel."""

_UNPACKERS = {
    b"\x02\x21\x4c\x18": ["lz4", "-d", "-c"],
    b"\xfd7zXZ": ["xz", "-d", "-c"],
    b"\x28\xb5\x2f\xfd": ["zstd", "-d", "-c"],
    b"\x1f\x8b": ["gzip", "-d", "-c"],
}


class Kernel:
    """A Debian kernel package unpacked below folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        releases = list((folder / "lib/modules").iterdir())
        if len(releases) != 1:
            raise BuildError(f"cannot use the kernel package: it has {len(releases)} releases")
        self.release = releases[0].name
        self.modules = releases[0]

    def write_vmlinux(self, target: Path) -> None:
        """Unpacks the ELF kernel out of the bzImage.

        The header is the one of Documentation/arch/x86/boot.rst: setup_sects at 0x1f1,
        payload_offset and payload_length at 0x248. Raises BuildError.
        """
        image = (self.folder / "boot" / f"vmlinuz-{self.release}").read_bytes()
        if image[0x202:0x206] != b"HdrS":
            raise BuildError("cannot unpack the kernel: not a bzImage")
        offset, length = struct.unpack_from("<II", image, 0x248)
        start = ((image[0x1F1] or 4) + 1) * 512 + offset
        # The last four bytes are the unpacked size, not part of the compressed stream.
        payload, (size,) = (
            image[start : start + length - 4],
            struct.unpack_from("<I", image, start + length - 4),
        )
        for magic, command in _UNPACKERS.items():
            if payload.startswith(magic):
                packed = target.with_name("payload")
                packed.write_bytes(payload)
                with target.open("wb") as file:
                    _pipe([*command, str(packed)], file.fileno())
                packed.unlink()
                break
        else:
            raise BuildError(f"cannot unpack the kernel: unknown compression {payload[:4].hex()}")
        if target.stat().st_size != size or target.open("rb").read(4) != b"\x7fELF":
            raise BuildError("cannot unpack the kernel: what came out is no ELF file of its size")

    def in_order(self, names: tuple[str, ...]) -> list[Path]:
        """The files of these modules and of what they need, in the order to load them in.

        Modules that are built in or that this kernel does not have are left out.
        """
        found: dict[Path, None] = {}
        for name in names:
            shown = subprocess.run(
                ["modprobe", "--config", "/dev/null", "--dirname", str(self.folder),
                 "--set-version", self.release, "--show-depends", name],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            for line in shown.stdout.splitlines():
                kind, _, path = line.strip().partition(" ")
                if kind == "insmod":
                    found[Path(path.strip())] = None
        return list(found)

    def _with_dependencies(self, chosen: Iterable[Path]) -> set[Path]:
        needs = {}
        for line in (self.modules / "modules.dep").read_text().splitlines():
            path, _, others = line.partition(":")
            needs[self.modules / path] = [self.modules / other for other in others.split()]
        return {needed for path in chosen for needed in (path, *needs.get(path, []))}

    def copy_modules(self, root: Path) -> None:
        """Puts the modules that the guest can use below root, with their index."""
        target = root / "usr/lib/modules" / self.release
        target.mkdir(parents=True)
        kernel = self.modules / "kernel"
        chosen = (
            path
            for path in kernel.rglob("*.ko")
            if any(fnmatch.fnmatch(str(path.relative_to(kernel)), kept) for kept in _KEPT)
        )
        for path in self._with_dependencies(chosen):
            place = target / path.relative_to(self.modules)
            place.parent.mkdir(parents=True, exist_ok=True)
            copy_module(path, place)
        for name in ("modules.builtin", "modules.builtin.modinfo", "modules.order"):
            shutil.copyfile(self.modules / name, target / name)
        run(["depmod", "--basedir", root / "usr", self.release])


def copy_module(source: Path, target: Path) -> None:
    """Copies a module without what loading it in an emulated guest is slow for.

    That is its signature, which lies behind the ELF file (include/linux/module_signature.h) and
    proves nothing in a root filesystem that we made; types for BPF programs that trace; and the
    tables for exact stack traces, which the kernel sorts. Raises BuildError.
    """
    removed = [f"--remove-section={name}" for name in (".BTF", ".orc_unwind", ".orc_unwind_ip")]
    run(["objcopy", *removed, source, target])


def _pipe(command: list[str], output: int) -> None:
    if subprocess.run(command, stdout=output, stderr=subprocess.DEVNULL, check=False).returncode:
        raise BuildError(f"cannot unpack the kernel: {command[0]} failed")


def index_modules(folder: Path) -> None:
    """Completes an unpacked kernel package with the index of its modules."""
    run(["depmod", "--basedir", folder, Kernel(folder).release])
