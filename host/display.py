"""What `termina run` shows while it works: one line per stage with its time and a bar for the
download; plain lines where there is no terminal.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Protocol

from host.commands import is_transfer
from host.status import ContainerStatus, GuestInfo, Status
from host.words import shown

if TYPE_CHECKING:
    from collections.abc import Callable

_STAGES = {
    ContainerStatus.LAUNCHING_GUEST: "launching the VM",
    ContainerStatus.STARTING_VM: "the VM is up; starting LXD in it",
    ContainerStatus.DOWNLOADING: "downloading the container image",
    ContainerStatus.EXTRACTING: "extracting the container image",
    ContainerStatus.STARTING: "starting the container",
    ContainerStatus.READY: "the container is ready",
    ContainerStatus.FAILED: "failed",
}
_PLAIN_STEP = 10  # percent between two lines


class Display(Protocol):
    """Shows progress."""

    def line(self, text: str) -> None:
        """A line of its own."""

    def close(self) -> None:
        """Nothing more will be shown."""


def stage_line(seconds: float, text: str) -> str:
    """How a stage looks."""
    return f"[{seconds:6.1f} s] {text}"


class _Plain:
    def __init__(self, status: Status) -> None:
        self._status = status
        self._last_stage: ContainerStatus | None = None
        self._last_percent = -_PLAIN_STEP
        status.observe(self._show)

    def line(self, text: str) -> None:
        print(shown(text), flush=True)

    def _show(self, info: GuestInfo) -> None:
        stage = info.container_status
        if stage is not self._last_stage and stage in _STAGES:
            self._last_stage = stage
            self.line(stage_line(self._status.elapsed(), _STAGES[stage]))
        percent = info.download_percent
        if percent is not None and (percent >= self._last_percent + _PLAIN_STEP or percent == 100):
            self._last_percent = percent
            self.line(stage_line(self._status.elapsed(), f"downloading {percent} %"))

    def close(self) -> None:
        pass


class _Rich:
    def __init__(self, status: Status) -> None:
        from rich.progress import (
            BarColumn,
            Progress,
            SpinnerColumn,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
        )

        self._status = status
        self._last_stage: ContainerStatus | None = None
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            transient=True,
        )
        self._task: Any = None
        self._progress.start()
        status.observe(self._show)

    def line(self, text: str) -> None:
        self._progress.console.print(shown(text), markup=False, highlight=False, soft_wrap=True)

    def _show(self, info: GuestInfo) -> None:
        stage = info.container_status
        if stage is not self._last_stage and stage in _STAGES:
            self._last_stage = stage
            self.line(stage_line(self._status.elapsed(), _STAGES[stage]))
            if self._task is not None:
                self._progress.remove_task(self._task)
                self._task = None
            if stage not in {ContainerStatus.READY, ContainerStatus.FAILED}:
                total = 100 if stage is ContainerStatus.DOWNLOADING else None
                self._task = self._progress.add_task(_STAGES[stage], total=total)
        if info.download_percent is not None and self._task is not None:
            self._progress.update(self._task, completed=info.download_percent)

    def close(self) -> None:
        self._progress.stop()


def make(status: Status) -> Display:
    """The display that suits stdout."""
    return _Rich(status) if sys.stdout.isatty() else _Plain(status)


class ConsoleLines:
    """Turns the console's bytes into whole lines for a display (--verbose)."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._rest = b""

    def __call__(self, data: bytes) -> None:
        """Takes bytes as they come."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            text = line.decode(errors="replace").strip("\r")
            if text and not is_transfer(text):
                self._show(f"  | {text}")
