"""vhost-device-vsock, the user-space vsock device for hosts without /dev/vhost-vsock.

Debian packages it in sid; its binary needs nothing that bookworm lacks.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from image.apt import Apt, Mirrors
from image.build import BuildError

PACKAGE = "vhost-device-vsock"


def fetch(target: Path, work: Path) -> None:
    """Writes the program to target; work: an empty folder. Raises BuildError."""
    try:
        Apt(Mirrors.of_this_machine(), "sid", work / "apt").unpack(PACKAGE, work / "unpacked")
    except BuildError as error:
        raise BuildError(f"cannot fetch {PACKAGE} from Debian sid: {error}") from None
    program = work / "unpacked/usr/bin" / PACKAGE
    if not program.is_file():
        raise BuildError(f"cannot fetch {PACKAGE}: its package holds no such program")
    shutil.copy(program, target)
    target.chmod(0o755)
