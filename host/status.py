"""What state the container of a VM is in, for those who look on: the ContainerStatus and
LinuxGuestInfo of fuchsia.virtualization's LinuxManager, with the time each state was reached.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from dataclasses import dataclass, replace


class ContainerStatus(enum.IntEnum):
    """The states, in the order in which a start goes through them; FAILED can follow each."""

    TRANSIENT = 1
    LAUNCHING_GUEST = 2
    STARTING_VM = 3
    DOWNLOADING = 4
    EXTRACTING = 5
    STARTING = 6
    READY = 7
    FAILED = 8


@dataclass(frozen=True, kw_only=True)
class GuestInfo:
    """One state of a VM.

    cid: the guest's context id.
    download_percent: 0 to 100, set while DOWNLOADING.
    failure_reason: set when FAILED.
    """

    cid: int
    container_status: ContainerStatus = ContainerStatus.TRANSIENT
    download_percent: int | None = None
    failure_reason: str | None = None


class Status:
    """The current GuestInfo; tells observers of every change."""

    def __init__(self, cid: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.info = GuestInfo(cid=cid)
        self._clock = clock
        self._began = clock()
        self._observers: list[Callable[[GuestInfo], None]] = []
        self.reached: dict[ContainerStatus, float] = {}
        """Seconds from the start until each state was reached first."""

    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._began

    def observe(self, observer: Callable[[GuestInfo], None]) -> None:
        """Calls observer(info) after every change from now on."""
        self._observers.append(observer)

    def enter(self, status: ContainerStatus) -> None:
        """A new state, other than DOWNLOADING and FAILED."""
        self._change(
            replace(self.info, container_status=status, download_percent=None, failure_reason=None)
        )

    def downloading(self, percent: int) -> None:
        """The image is being downloaded."""
        self._change(
            replace(
                self.info,
                container_status=ContainerStatus.DOWNLOADING,
                download_percent=percent,
                failure_reason=None,
            )
        )

    def fail(self, reason: str) -> None:
        """It failed."""
        self._change(
            replace(
                self.info,
                container_status=ContainerStatus.FAILED,
                download_percent=None,
                failure_reason=reason,
            )
        )

    def _change(self, info: GuestInfo) -> None:
        if info == self.info:
            return
        self.info = info
        self.reached.setdefault(info.container_status, self.elapsed())
        for observer in self._observers:
            observer(info)
