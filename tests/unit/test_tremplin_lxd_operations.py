"""The events of LXD's operations, in the orders in which LXD was seen to send them."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING

import pytest

from agent.tremplin.lxd_client import LxdClient, LxdError
from agent.tremplin.lxd_operations import LxdOperations

if TYPE_CHECKING:
    from pathlib import Path

_PENDING, _RUNNING, _SUCCESS, _FAILURE = 105, 103, 200, 400


@pytest.mark.parametrize("end", [_SUCCESS, _FAILURE])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("heard_before", range(4))
def test_end_overtakes(tmp_path: Path, end: int, order: tuple[int, ...], heard_before: int) -> None:
    """The end counts, whatever comes after it; heard_before: events before the answer."""
    events = [
        {"id": "one", "status_code": code, "err": "why"} for code in (_PENDING, _RUNNING, end)
    ]
    events = [events[i] for i in order]

    async def run() -> None:
        operations = LxdOperations(LxdClient(str(tmp_path)))
        for event in events[:heard_before]:
            operations.on_event(event)
        operation = await operations.follow({"operation": "/1.0/operations/one"})
        for event in events[heard_before:]:
            operations.on_event(event)
        assert operation.ended
        if end == _FAILURE:
            with pytest.raises(LxdError, match="why"):
                await operation.wait()
        else:
            assert (await operation.wait())["status_code"] == end

    asyncio.run(run())
