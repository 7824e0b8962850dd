"""Runs the system's own programs (blkid, mkfs.btrfs, useradd) to their end, for what they know and
no library does. Processes that the host asks for are PID 1's business (processes.py).
"""

from __future__ import annotations

import asyncio
import os

_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


class Completed:
    """A program that ended: its exit code (negative: the signal) and what it wrote."""

    __slots__ = ("code", "errors", "output")

    def __init__(self, code: int, output: str, errors: str) -> None:
        self.code = code
        self.output = output
        self.errors = errors

    @property
    def reason(self) -> str:
        """Its last word, or how it ended when it said nothing."""
        for text in (self.errors, self.output):
            if lines := text.strip().splitlines():
                return lines[-1].strip()
        return f"exit code {self.code}" if self.code >= 0 else f"signal {-self.code}"


async def run(*argv: str, timeout: float = 60.0) -> Completed:
    """Runs a program with no input, in the C locale. A caller that is cancelled ends it.

    argv: looked up in the system's directories; timeout: seconds, after which it is killed.
    Raises OSError: it cannot be executed; TimeoutError.
    """
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={"PATH": _PATH, "LC_ALL": "C"},
        cwd="/",
    )
    try:
        async with asyncio.timeout(timeout):
            output, errors = await process.communicate()
    except BaseException as error:
        try:
            process.kill()
        except ProcessLookupError:
            pass
        await process.wait()
        if isinstance(error, TimeoutError):
            raise TimeoutError(f"{os.path.basename(argv[0])} took over {timeout:.0f} s") from None
        raise
    return Completed(
        process.returncode or 0,
        output.decode(errors="backslashreplace"),
        errors.decode(errors="backslashreplace"),
    )
