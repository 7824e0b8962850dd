"""Timers with an injected clock, and what the loop does with a callback that raises."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.process_supervisor.loop import READABLE, Loop, Timers


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def fire(timers: Timers) -> None:
    for timer in timers.due():
        timer.fire()


@given(st.lists(st.integers(0, 100), max_size=20), st.integers(0, 100))
def test_timers_fire_in_order_when_they_are_due(delays: list[int], passed: int) -> None:
    clock = Clock()
    timers = Timers(clock)
    fired: list[int] = []
    for delay in delays:
        timers.call_later(delay, lambda delay=delay: fired.append(delay))  # type: ignore[misc]
    clock.now += passed
    fire(timers)
    assert fired == sorted(delay for delay in delays if 100.0 + delay <= clock.now)


def test_a_cancelled_timer_neither_fires_nor_is_waited_for() -> None:
    clock = Clock()
    timers = Timers(clock)
    timers.call_later(1, lambda: pytest.fail("was cancelled")).cancel()
    assert timers.wait() is None
    timers.call_later(2, lambda: None)
    assert timers.wait() == 2
    clock.now += 3
    assert timers.wait() == 0
    fire(timers)


def test_cancelled_timers_do_not_pile_up() -> None:
    timers = Timers(Clock())
    kept = [timers.call_later(number, lambda: None) for number in (3600, 1, 7200)]
    for _ in range(10_000):
        timers.call_later(3600, lambda: None).cancel()
    assert len(timers._heap) < 1000
    assert timers.wait() == 1
    kept[1].cancel()
    assert timers.wait() == 3600


def test_what_a_callback_raises_is_a_line_and_the_next_one_runs(
    capfd: pytest.CaptureFixture[str],
) -> None:
    loop = Loop()
    ran: list[str] = []
    reader, writer = os.pipe()
    os.write(writer, b"x")

    def broken(_mask: int) -> None:
        raise RuntimeError("broken\ncallback")

    loop.watch(reader, READABLE, broken)
    loop.call_later(0, lambda: 1 / 0)
    loop.call_later(0, lambda: ran.append("timer"))
    while not ran:
        loop.turn()
    loop.forget(reader)
    os.close(reader)
    os.close(writer)
    lines = capfd.readouterr().err.splitlines()
    assert any("RuntimeError: broken callback at" in line for line in lines)
    assert any("ZeroDivisionError" in line for line in lines)


def test_a_callback_may_forget_one_that_is_ready_too() -> None:
    loop = Loop()
    pipes = [os.pipe(), os.pipe()]
    called: list[int] = []

    def callback(own: int, other: int) -> None:
        called.append(own)
        loop.forget(other)
        loop.forget(own)

    (first, first_writer), (second, second_writer) = pipes
    loop.watch(first, READABLE, lambda _mask: callback(first, second))
    loop.watch(second, READABLE, lambda _mask: callback(second, first))
    os.write(first_writer, b"x")
    os.write(second_writer, b"x")
    loop.turn()
    assert len(called) == 1
    for pair in pipes:
        for fd in pair:
            os.close(fd)


def test_what_was_ready_on_a_closed_descriptor_is_not_told_of_the_next_with_its_number() -> None:
    loop = Loop()
    told: list[str] = []
    spare, spare_writer = os.pipe()
    pipes = [os.pipe(), os.pipe()]

    def replace(other: int) -> None:
        told.append("first")
        loop.forget(other)
        os.close(other)
        os.dup2(spare, other)
        loop.watch(other, READABLE, lambda _mask: told.append("successor"))

    (first, first_writer), (second, second_writer) = pipes
    loop.watch(first, READABLE, lambda _mask: replace(second))
    loop.watch(second, READABLE, lambda _mask: replace(first))
    for writer in (first_writer, second_writer):
        os.close(writer)  # both are ready: broken
    loop.turn()
    assert told == ["first"]
    for fd in (first, second):
        loop.forget(fd)
    for fd in (first, second, spare, spare_writer):
        os.close(fd)
