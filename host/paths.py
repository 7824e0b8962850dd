"""The directories of a user's programs, as the XDG base directory specification has them."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from host.errors import HostError

_NAME = "termina-agent"


def _from_environment(variable: str) -> Path | None:
    value = os.environ.get(variable, "")
    return Path(value) / _NAME if value.startswith("/") else None


def data_dir() -> Path:
    """Where data disks are kept."""
    return _from_environment("XDG_DATA_HOME") or Path.home() / ".local/share" / _NAME


def cache_dir() -> Path:
    """Where answers are kept that can be found again."""
    return _from_environment("XDG_CACHE_HOME") or Path.home() / ".cache" / _NAME


def runtime_dir() -> Path:
    """Where the sockets of running VMs are; made if need be, nobody else's and closed to others.

    Raises HostError.
    """
    given = _from_environment("XDG_RUNTIME_DIR")
    if given is not None:
        return _own(given, mask=0o077)
    # The path is kept short: sockets in it have at most 107 bytes. Whoever owned the directory
    # above could put another in the place of ours at any time.
    above = _own(Path(tempfile.gettempdir()) / f"termina-{os.getuid()}", mask=0o022)
    return _own(above / _NAME, mask=0o077)


def _own(directory: Path, *, mask: int) -> Path:
    # mask: which rights nobody but us may have there.
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.lstat()
    except OSError as error:
        raise HostError(f"cannot use directory {directory}: {error.strerror}") from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & mask:
        raise HostError(f"cannot use directory {directory}: others may write or read there")
    return directory
