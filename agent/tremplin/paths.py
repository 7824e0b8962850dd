"""Paths of files in the VM, as a host names them."""

from __future__ import annotations

import os


def path_problem(field: str, path: str) -> str:
    """Why path cannot be one of a file, or ""; field: of the request, for the reason."""
    if not os.path.isabs(path):
        return f"{field} is not an absolute path"
    if "\0" in path:
        return f"{field} has a NUL character in it"
    return ""
