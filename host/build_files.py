"""Where the built guest is: kernel, initramfs, root filesystem, and the container images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from host.errors import HostError

BUILD_DIR = Path(__file__).resolve().parent.parent / "build"


@dataclass(frozen=True, kw_only=True)
class GuestImage:
    """The files that `make image` writes."""

    kernel: Path
    initrd: Path
    rootfs: Path
    command_line: str
    vsock_daemon: Path
    """vhost-device-vsock; needed only on machines without /dev/vhost-vsock, and may be absent."""
    qemu: Path
    """A folder with a newer QEMU than the machine's, and its firmware; may be absent."""

    @classmethod
    def in_directory(cls, directory: Path) -> Self:
        """The image in a directory. Raises HostError when a part of it is missing."""
        names = {"kernel": "vmlinux", "initrd": "initrd.img", "rootfs": "rootfs.img"}
        paths = {part: directory / name for part, name in names.items()}
        command_line = directory / "cmdline"
        for path in [*paths.values(), command_line]:
            if not path.is_file():
                raise HostError(f"cannot start a VM: no {path}; run `make image`")
        return cls(
            kernel=paths["kernel"],
            initrd=paths["initrd"],
            rootfs=paths["rootfs"],
            command_line=command_line.read_text().strip(),
            vsock_daemon=directory / "vhost-device-vsock",
            qemu=directory / "qemu",
        )


def check_container_images(directory: Path) -> None:
    """Raises HostError unless the directory is a simplestreams tree."""
    index = directory / "streams" / "v1" / "index.json"
    if not index.is_file():
        raise HostError(f"cannot serve container images: no {index}; run `make container-image`")
