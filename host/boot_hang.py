"""Whether an emulated boot hangs or its kernel fails: QEMU's emulation now and then leaves the
processors of a guest spinning in its kernel, or computes wrongly there; the next boot comes up.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Any

    from host.console import Console

_SIGNS = ("soft lockup", "detected stalls", "hard LOCKUP")
"""What Linux says of a processor that does not get on (lockup-watchdogs.rst, stallwarn.rst)."""
_FAULTS = ("kernel BUG at ", "BUG: unable to handle ", "general protection fault", "Oops: ")
"""What it says of a fault of its own, before the panic that comes of it (bug-hunting.rst)."""


def fault(text: str) -> str:
    """The line of a console's text in which the kernel says that it failed itself, or ""."""
    lines = text.splitlines()
    return next((line for line in lines if any(sign in line for sign in _FAULTS)), "")


class BootHangsError(Exception):
    """The guest's kernel does not get on; str(): how that shows."""


async def unless_hung(
    ready: Coroutine[Any, Any, object], console: Console, *, start: int, seconds: float
) -> None:
    """Returns when ready does.

    console, start, seconds: see hang(). Raises BootHangsError when a boot hangs before.
    """
    waiting = asyncio.ensure_future(ready)
    looking = asyncio.ensure_future(hang(console, start=start, seconds=seconds))
    try:
        await asyncio.wait([waiting, looking], return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise BootHangsError(looking.result())
        waiting.result()
    finally:
        for task in (waiting, looking):
            task.cancel()
        await asyncio.gather(waiting, looking, return_exceptions=True)


async def hang(console: Console, *, start: int, seconds: float) -> str:
    """Returns when a boot hangs, with the reason; else never.

    console: what the boot writes is its text from position start on. seconds: without a word on it,
    or after the kernel said itself that it is stuck.
    """
    while not any(sign in console.since(start) for sign in _SIGNS):
        position = console.position
        try:
            async with asyncio.timeout(seconds):
                await console.wait_for("(?s).", start=position)
        except TimeoutError:
            return f"the console was silent for {seconds:g} s"
    await asyncio.sleep(seconds)
    return "its kernel says that it is stuck"
