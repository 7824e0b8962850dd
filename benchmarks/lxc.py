"""The lxc command as tremplin's peer: the two at the same work on the same LXD, in turns."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from typing import TYPE_CHECKING

import psutil

from benchmarks.figures import Figure

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.lxd.host import Tremplin
    from tests.lxd.machine import Machine

AS_FAST = 1.05
"""Ours may take so many times as long as lxc."""


def timed(action: Callable[[], object]) -> float:
    """The milliseconds that it takes."""
    began = time.monotonic()
    action()
    return 1000 * (time.monotonic() - began)


class Lxc:
    """The lxc command, run as it is on a terminal of the machine: entering the machine's namespaces
    first takes two milliseconds, which are not lxc's.
    """

    def __init__(self, machine: Machine) -> None:
        """machine: whose LXD it is to speak to."""
        root = f"/proc/{machine.init_pid}/root"
        self._environment = os.environ | {
            "LXD_DIR": f"{root}{machine.lxd_dir}",
            "LXD_CONF": f"{root}{machine.directory}/stateful/lxd_conf",
        }

    def __call__(self, *arguments: str) -> None:
        """Runs it to its end. Raises RuntimeError: it failed."""
        result = subprocess.run(
            ("lxc", *arguments),
            env=self._environment, stdin=subprocess.DEVNULL, capture_output=True, check=False,
        )  # fmt: skip
        if result.returncode != 0:
            raise RuntimeError(f"cannot measure `lxc {arguments[0]}`: {result.stderr.decode()}")


def in_turns(
    number: int, ours: Callable[[], object], theirs: Callable[[], object]
) -> tuple[float, float]:
    """The milliseconds that each takes. number: of the turn."""
    # Who comes first pays for what LXD and the kernel still do for the one before.
    if number % 2:
        return timed(ours), timed(theirs)
    took = timed(theirs)
    return timed(ours), took


def beside(what: str, rounds: list[tuple[float, float]]) -> Figure:
    """The medians of the turns."""
    return ratio(
        what, statistics.median(a for a, _ in rounds), statistics.median(b for _, b in rounds)
    )


def ratio(what: str, ours: float, theirs: float) -> Figure:
    """Two times in milliseconds, beside each other."""
    return Figure(
        what, {"tremplin": ours, "lxc": theirs}, "ms", "≤ 1.05 × lxc", ours <= AS_FAST * theirs
    )


def rss(machine: Machine, tremplin: Tremplin) -> float:
    """What tremplin has resident, in MB."""
    resident: int = psutil.Process(machine.inner_pid(tremplin.process)).memory_info().rss
    return resident / 1024 / 1024
