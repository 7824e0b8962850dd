"""A newer QEMU than this machine's, when that is old: version 10 emulates a quarter faster than
version 7.2. From Debian's backports; it runs with the libraries of the machine's own.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from image.apt import GUEST_SUITE, Apt, Mirrors
from image.build import BuildError, run

PROGRAM = "qemu-system-x86_64"
_SUITE = f"{GUEST_SUITE}-backports"
_NEW_ENOUGH = 10

_FILES = {
    "qemu-system-x86": [f"usr/bin/{PROGRAM}"],
    "qemu-system-data": [
        f"usr/share/qemu/{name}" for name in ("kvmvapic.bin", "linuxboot_dma.bin", "pvh.bin")
    ],
    "seabios": ["usr/share/seabios/bios-256k.bin"],
}
"""What a VM of ours needs, by package."""


def is_wanted() -> bool:
    """Whether this machine's QEMU is old. Raises BuildError: there is none."""
    return _version(PROGRAM) < _NEW_ENOUGH


def fetch(target: Path, work: Path) -> None:
    """Writes the program and its firmware to the new folder target; work: an empty folder.

    Raises BuildError: the mirror has no backports, or the program does not run here.
    """
    try:
        apt = Apt(Mirrors.of_this_machine(), _SUITE, work / "apt")
        for package in _FILES:
            apt.unpack(package, work / "unpacked")
        target.mkdir()
        for path in (path for paths in _FILES.values() for path in paths):
            shutil.copy(work / "unpacked" / path, target)
        if _version(target / PROGRAM) < _NEW_ENOUGH:
            raise BuildError(f"it is older than version {_NEW_ENOUGH}")
    except (BuildError, OSError) as error:
        raise BuildError(f"cannot fetch QEMU from {_SUITE}: {error}") from None


def _version(program: str | Path) -> int:
    said = run([program, "--version"])
    found = re.search(r"version (\d+)\.", said)
    if found is None:
        raise BuildError(f"cannot tell the version of {program}")
    return int(found[1])
