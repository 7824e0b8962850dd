"""Lines on the guest's console: `[    3.412] maitred: what happened`, the time since the kernel
started. PID 1 writes them directly; maitred and tremplin through logging (agent/logs.py).
"""

from __future__ import annotations

import os
import time


def format_line(program: str, text: str) -> str:
    """One console line, without the line feed.

    program: who says it; text: what, any line feeds in it become spaces.
    """
    seconds = time.clock_gettime(time.CLOCK_BOOTTIME)
    return f"[{seconds:9.3f}] {program}: {' '.join(text.split())}"


def write_line(program: str, text: str) -> None:
    """Writes one line to stderr, whole or not at all: a console that is gone harms nobody."""
    try:
        os.write(2, (format_line(program, text) + "\n").encode(errors="backslashreplace"))
    except OSError:
        pass
