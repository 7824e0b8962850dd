"""Lines on the guest's console: `[    3.412] maitred: what happened`, the time since the kernel
started. PID 1 writes them directly; maitred and tremplin through logging (agent/logs.py).
"""

from __future__ import annotations

import os
import time

CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}
"""For str.translate(): control characters as \\xNN."""

_LONGEST = 2000
"""Characters of a line; what is longer was written by somebody who is not to fill a log."""


def printable(text: str, longest: int) -> str:
    r"""Text on one line: any blanks in it become one space, other control characters \xNN and what
    is no character \udNNN. Somebody else's words may be in it, and go to terminals and to hosts.

    longest: characters after which it is cut off, with an ellipsis.
    """
    line = " ".join(text.split())
    if not line.isprintable():
        line = line.translate(CONTROLS).encode(errors="backslashreplace").decode()
    return line if len(line) <= longest else f"{line[:longest]}…"


def format_line(program: str, text: str) -> str:
    """One console line, without the line feed.

    program: who says it; text: what, as printable() makes it.
    """
    seconds = time.clock_gettime(time.CLOCK_BOOTTIME)
    return f"[{seconds:9.3f}] {program}: {printable(text, _LONGEST)}"


def write_line(program: str, text: str) -> None:
    """Writes one line to stderr, whole or not at all: a console that is gone harms nobody."""
    try:
        os.write(2, (format_line(program, text) + "\n").encode(errors="backslashreplace"))
    except OSError:
        pass
