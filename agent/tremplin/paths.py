"""Files of the VM, as a host names them by paths. In a directory that the host shares with them
containers may write, too.
"""

from __future__ import annotations

import os
import stat

from agent.places import open_place

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import BinaryIO


def path_problem(field: str, path: str) -> str:
    """Why path cannot be one of a file, or ""; field: of the request, for the reason."""
    if not os.path.isabs(path):
        return f"{field} is not an absolute path"
    if "\0" in path:
        return f"{field} has a NUL character in it"
    return ""


def open_file(path: str) -> BinaryIO:
    """Opens a regular file for reading. Raises OSError, also for anything else: FIFOs, devices,
    symbolic links that a container may have made.
    """
    with open_place(path) as place:
        if not stat.S_ISREG(os.fstat(place.descriptor).st_mode):
            raise OSError(f"{path} is not a regular file")
        return open(place.path, "rb")
