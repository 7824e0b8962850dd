"""One container's ups and downs, from events that LXD sends each from a thread of its own: they may
come in another order than that in which things happened, which is that of their times.
"""

from __future__ import annotations

import bisect
import enum

_DISORDER_SECONDS = 5.0
"""No event comes so late. One that seems to was sent after somebody had set the clock back."""


class Turn(enum.Enum):
    """What an event says."""

    UP = "up"
    REBOOTED = "rebooted"
    DOWN = "down"
    DOWN_OR_REBOOTING = "down or rebooting"
    """A reboot from inside looks at first like a power-off from inside."""


class Life:
    """Whether it runs, and how often it went down."""

    def __init__(self, *, up: bool) -> None:
        """up: whether it ran before the first event."""
        self._was_up = up
        self._turns: list[tuple[float, Turn]] = []
        """With their times, in seconds; those before have led to _was_up and _told."""
        self._told = 0

    def take(self, turn: Turn, at: float) -> int:
        """How many times it went down that are known only since this event; at: its time."""
        if self._turns and at < self._turns[-1][0] - _DISORDER_SECONDS:
            self._turns = [(at, turn) for _, turn in self._turns]
        bisect.insort(self._turns, (at, turn), key=lambda each: each[0])
        new = self._news()
        self._fold()
        return new

    def resolve(self, *, down: bool) -> int:
        """Ends that undecided() is true; down: what it was. As take()."""
        at, _ = self._turns.pop()
        self._turns.append((at, Turn.DOWN if down else Turn.REBOOTED))
        return self._news()

    @property
    def up(self) -> bool:
        """Whether it runs, or is undecided."""
        steps = self._steps()
        return steps[-1][0] if steps else self._was_up

    @property
    def undecided(self) -> bool:
        """Whether it was powered off or has begun to reboot, from inside."""
        return bool(self._turns) and self._turns[-1][1] is Turn.DOWN_OR_REBOOTING and self.up

    def is_in_order(self, at: float) -> bool:
        """Whether no event taken so far is later than that time."""
        return not self._turns or self._turns[-1][0] <= at

    def _steps(self) -> list[tuple[bool, bool]]:
        # After each turn: whether it was up, and whether it had gone down by it.
        up = self._was_up
        steps = []
        for index, (_, turn) in enumerate(self._turns):
            after = self._turns[index + 1][1] if index + 1 < len(self._turns) else Turn.REBOOTED
            went_down = up and (
                turn is Turn.DOWN or (turn is Turn.DOWN_OR_REBOOTING and after is not Turn.REBOOTED)
            )
            up = turn in {Turn.UP, Turn.REBOOTED} or (up and not went_down)
            steps.append((up, went_down))
        return steps

    def _news(self) -> int:
        downs = sum(went_down for _, went_down in self._steps())
        new, self._told = downs - self._told, downs
        return new

    def _fold(self) -> None:
        # Forgets the turns that no event can come before any more.
        steps = self._steps()
        settled = self._turns[-1][0] - _DISORDER_SECONDS
        while len(self._turns) > 1 and self._turns[0][0] < settled:
            del self._turns[0]
            self._was_up, went_down = steps.pop(0)
            self._told -= went_down
