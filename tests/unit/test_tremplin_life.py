"""A container's ups and downs, from events in every order."""

from __future__ import annotations

import itertools

import pytest

from agent.tremplin.life import Life, Turn

_UP, _AGAIN, _DOWN, _MAYBE = Turn.UP, Turn.REBOOTED, Turn.DOWN, Turn.DOWN_OR_REBOOTING


@pytest.mark.parametrize("was_up", [False, True])
@pytest.mark.parametrize(
    ("turns", "downs", "up"),
    [
        ([_UP], 0, True),
        ([_UP, _DOWN], 1, False),
        ([_UP, _DOWN, _DOWN], 1, False),  # stopped, and deleted
        ([_UP, _DOWN, _UP], 1, True),
        ([_UP, _DOWN, _UP, _DOWN], 2, False),
        ([_UP, _DOWN, _UP, _DOWN, _UP], 2, True),
        ([_UP, _MAYBE, _AGAIN], 0, True),
        ([_UP, _MAYBE, _AGAIN, _DOWN], 1, False),
        ([_UP, _MAYBE, _UP], 1, True),
        ([_UP, _MAYBE, _DOWN], 1, False),
        ([_UP, _AGAIN, _AGAIN, _DOWN], 1, False),
    ],
)
def test_any_order(turns: list[Turn], downs: int, up: bool, was_up: bool) -> None:
    """In the end it is as if they had come in theirs, and no down was told twice."""
    for order in itertools.permutations(enumerate(turns)):
        life = Life(up=was_up)
        told = [life.take(turn, 100.0 + place) for place, turn in order]
        assert min(told) >= 0
        assert (sum(told), life.up) == (downs, up), order


@pytest.mark.parametrize("down", [True, False])
def test_undecided(down: bool) -> None:
    """A shutdown that nobody asked for may be a reboot; until that is known it counts as up."""
    life = Life(up=True)
    assert life.take(_MAYBE, 100.0) == 0
    assert life.undecided
    assert life.up
    assert life.resolve(down=down) == down
    assert not life.undecided
    assert life.up is not down
    assert life.take(_AGAIN, 101.0) == 0
    assert life.up
    assert life.take(_DOWN, 102.0) == 1


def test_slow_reboot() -> None:
    """The two halves of a reboot may be far from each other."""
    life = Life(up=True)
    assert life.take(_MAYBE, 100.0) == 0
    assert life.take(_AGAIN, 114.0) == 0
    assert life.take(_DOWN, 130.0) == 1


def test_clock_set_back() -> None:
    """Events come in order when the clock jumps far: each counts after those before it."""
    life = Life(up=False)
    told = [life.take(turn, at) for turn, at in ((_UP, 5000.0), (_DOWN, 1000.0), (_UP, 1001.0))]
    assert told == [0, 1, 0]
    assert life.up
    assert life.take(_DOWN, 9000.0) == 1
    assert not life.up


def test_nothing_is_kept() -> None:
    """A container that goes up and down for ever takes no memory."""
    life = Life(up=False)
    told = sum(life.take((_UP, _DOWN)[n % 2], float(n)) for n in range(1000))
    assert told == 500
    assert len(life._turns) < 10
