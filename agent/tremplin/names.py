"""Names of containers: what LXD takes, and the names that containers have while they are made."""

from __future__ import annotations

import re

IN_PROGRESS = "crostini-inprogress-create"
"""The name of a container until it is whole; others at the same time have a number after it."""

IMPORTING = "crostini-inprogress-import"
"""The name of a container that is being imported."""

REPLACED = "crostini-inprogress-replaced"
"""The name of a container whose place an imported one is about to take."""

_RESERVED = "crostini-inprogress-"
_NAME = re.compile(r"[A-Za-z]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")


def name_problem(name: str) -> str:
    """Why LXD does not take name for a container, or "" when it does.

    Source: LXD's doc/instances.md: 1 to 63 letters, digits and dashes, no digit or dash first, no
    dash last.
    """
    if not name:
        return "a container needs a name"
    if is_reserved(name):
        return "the name is kept for containers that are being made"
    if _NAME.fullmatch(name) is None:
        return (
            "the name of a container is 1 to 63 letters, digits and dashes, begins with a letter "
            "and does not end with a dash"
        )
    return ""


def is_reserved(name: str) -> bool:
    """Whether name is one that containers have only for a while."""
    return name.startswith(_RESERVED)


def is_in_progress(name: str) -> bool:
    """Whether name is that of a container that is being created."""
    return name.startswith(IN_PROGRESS)
