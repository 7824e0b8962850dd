"""The disks that the host gives to the VM: the stateful data disk, held by one VM at a time, and
the two small read-only images that real hosts attach.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Self

from host import romfs
from host.children import find_program
from host.errors import HostError

DATA_BYTES = 8 * 1024**3
_TOOLS_BYTES = 4 * 1024**2


class DataDisk:
    """A raw file that one VM at a time uses as its stateful disk; a context manager that holds
    the lock (flock(2)) on it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1

    def open(self, *, fresh: bool = False, size: int = DATA_BYTES) -> Self:
        """Takes the disk, making a blank sparse one if there is none.

        fresh: throw away what was on it.
        size: bytes of a disk that is made or made fresh; a smaller existing one is grown.
        Raises HostError, among others when another VM has it.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if fresh:
                    os.ftruncate(self._fd, 0)
                if os.fstat(self._fd).st_size < size:
                    os.ftruncate(self._fd, size)
            except BaseException:
                self.close()
                raise
        except BlockingIOError:
            raise HostError(
                f"cannot use data disk {self.path}: another VM is running on it"
            ) from None
        except FileExistsError:  # what mkdir(2) says of a file in the way
            raise HostError(
                f"cannot use data disk {self.path}: {self.path.parent} is not a directory"
            ) from None
        except OSError as error:
            raise HostError(f"cannot use data disk {self.path}: {error.strerror}") from None
        return self

    def close(self) -> None:
        """Gives the disk back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def wipe(path: Path) -> bool:
    """Deletes a data disk, and with it every container and file on it.

    Returns whether there was one. Raises HostError, among others while a VM runs on it.
    """
    if not path.exists():
        return False
    with DataDisk(path).open(size=0):
        try:
            path.unlink()
        except OSError as error:
            raise HostError(f"cannot wipe {path}: {error.strerror}") from None
    return True


def make_shared_image(path: Path) -> None:
    """Writes the romfs image that the guest mounts on /mnt/shared."""
    text = "Files that the host shares with every container of this VM.\n"
    path.write_bytes(romfs.build({"README": text.encode()}))


def make_tools_image(path: Path) -> None:
    """Writes the ext4 image that the guest mounts on /opt/google/cros-containers; on ChromeOS it
    holds the programs that run beside a container's own, here only a file that says so.

    Raises HostError.
    """
    mke2fs = find_program("mke2fs", hint="install e2fsprogs")
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "README").write_text("The host's programs for containers go here.\n")
        with path.open("wb") as file:
            file.truncate(_TOOLS_BYTES)
        made = subprocess.run(
            [mke2fs, "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-d", directory, str(path)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    if made.returncode:
        raise HostError(f"cannot make {path}: {made.stderr.strip()}")
