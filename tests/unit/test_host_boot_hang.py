"""When the launcher takes an emulated boot for hung, or its kernel for failed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from host.boot_hang import fault, hang
from host.console import Console

_SECONDS = 0.2


def test_a_kernel_that_talks_does_not_hang(tmp_path: Path) -> None:
    """Nor does one of which an earlier boot hung on the same console."""

    async def scene() -> None:
        console = Console(tmp_path / "log")
        await console.take(b"watchdog: BUG: soft lockup\n")
        looking = asyncio.ensure_future(hang(console, start=console.position, seconds=_SECONDS))
        deadline = asyncio.get_running_loop().time() + 3 * _SECONDS
        while asyncio.get_running_loop().time() < deadline:
            await console.take(b".")
            await asyncio.wait([looking], timeout=_SECONDS / 10)
        assert not looking.done()
        assert await looking == "the console was silent for 0.2 s"
        console.close()

    asyncio.run(scene())


@pytest.mark.parametrize(
    "line",
    ["watchdog: BUG: soft lockup - CPU#0 stuck for 22s!", "rcu_sched detected stalls on CPUs"],
)
def test_a_kernel_that_says_so_hangs(tmp_path: Path, line: str) -> None:
    """However much it says."""

    async def scene() -> None:
        console = Console(tmp_path / "log")
        looking = asyncio.ensure_future(hang(console, start=0, seconds=_SECONDS))
        await console.take(f"{line}\n".encode())
        while not looking.done():
            await console.take(b"registers\n")
            await asyncio.wait([looking], timeout=_SECONDS / 10)
        assert looking.result() == "its kernel says that it is stuck"
        console.close()

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("all well\n", ""),
        ("Kernel panic - not syncing: Attempted to kill init!\n", ""),
        (
            "[ 1.0] init\n[ 5.3] kernel BUG at arch/x86/a.h:125!\n[ 5.4] invalid opcode\n",
            "[ 5.3] kernel BUG at arch/x86/a.h:125!",
        ),
        ("[ 5] Oops: 0002 [#1]\n[ 5] RIP\n", "[ 5] Oops: 0002 [#1]"),
    ],
)
def test_faults_of_the_kernel_itself(text: str, line: str) -> None:
    """And no panic that somebody else is the cause of."""
    assert fault(text) == line
