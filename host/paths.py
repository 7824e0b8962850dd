"""The directories of a user's programs, as the XDG base directory specification has them."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from host.errors import HostError

_NAME = "termina-agent"


def _from_environment(variable: str, default: Path) -> Path:
    value = os.environ.get(variable, "")
    return (Path(value) if value.startswith("/") else default) / _NAME


def data_dir() -> Path:
    """Where data disks are kept."""
    return _from_environment("XDG_DATA_HOME", Path.home() / ".local/share")


def cache_dir() -> Path:
    """Where answers are kept that can be found again."""
    return _from_environment("XDG_CACHE_HOME", Path.home() / ".cache")


def runtime_dir() -> Path:
    """Where the sockets of running VMs are; made if need be, nobody else's and closed to others.

    Raises HostError.
    """
    # The path is kept short: sockets in it have at most 107 bytes.
    directory = _from_environment(
        "XDG_RUNTIME_DIR", Path(tempfile.gettempdir()) / f"termina-{os.getuid()}"
    )
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.lstat()
    except OSError as error:
        raise HostError(f"cannot use directory {directory}: {error.strerror}") from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise HostError(f"cannot use directory {directory}: others may write or read there")
    return directory
