"""The errors that host/ raises on purpose. str() of each is one line, "cannot X: why", for the
person at the terminal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class HostError(Exception):
    """Something that cannot be done, and why."""


class VmDiedError(HostError):
    """The VM ended, or its kernel panicked, while something was still expected of it."""

    def __init__(self, message: str, console_lines: Sequence[str]) -> None:
        """console_lines: the last ones that the guest wrote."""
        super().__init__(message)
        self.console_lines = console_lines
