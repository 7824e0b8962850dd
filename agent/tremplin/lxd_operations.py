"""LXD's background operations: what a request started, followed through the events to its end.
Our own long operations, which report to the host, are in operation.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict

from agent.tremplin.lxd_client import LxdClient, LxdError, LxdGoneError, LxdNotFoundError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_log = logging.getLogger(__name__)

_PENDING, _RUNNING, _SUCCESS, _FAILURE, _CANCELLED = 105, 103, 200, 400, 401
_ENDS = {_SUCCESS, _FAILURE, _CANCELLED}
_ABORT_SECONDS = 300.0
"""What LXD has to end an operation that cannot be cancelled: an image being unpacked."""
_PENDING_SECONDS = 2.0
"""An operation begins at once when LXD has written it down."""
_PENDING_LOOKS = 10
_REMEMBERED = 256
"""Ended operations nobody asked about yet: an event may overtake the answer that names its id."""


class LxdCancelledError(LxdError):
    """The operation was cancelled."""


class LxdOperation:
    """One operation of LXD: its progress, its end."""

    def __init__(
        self,
        client: LxdClient,
        identity: str,
        on_change: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self._client = client
        self.identity = identity
        self._on_change = on_change
        self._ended: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.cancelled = False
        """Whether somebody asked for its cancellation: LXD then says that it failed."""

    def update(self, state: dict[str, Any]) -> None:
        """Takes over what LXD says of it."""
        if self._ended.done():
            return
        code = state.get("status_code", 0)
        if code == _SUCCESS:
            self._ended.set_result(state)
        elif code == _CANCELLED:
            self.cancelled = True
            self._ended.set_exception(LxdCancelledError("it was cancelled"))
        elif code == _FAILURE:
            reason = state.get("err") or "LXD gives no reason"
            # Of a cancelled operation LXD also says this, at times without having said Cancelled.
            cancelled = self.cancelled or reason == "context canceled"
            kind = LxdCancelledError if cancelled else LxdError
            self._ended.set_exception(kind(reason))
        elif self._on_change is not None:
            self._on_change(state)

    def lost(self, reason: str) -> None:
        """Ends it: nothing more will be heard of it."""
        if not self._ended.done():
            self._ended.set_exception(LxdGoneError(reason))

    @property
    def ended(self) -> bool:
        """Whether it came to an end."""
        return self._ended.done()

    async def wait(self) -> dict[str, Any]:
        """Its final state. Raises LxdError, LxdCancelledError, LxdGoneError."""
        return await asyncio.shield(self._ended)

    async def cancel(self) -> None:
        """Asks LXD to cancel it; raises LxdError when LXD cannot."""
        self.cancelled = True
        try:
            await self._client.request("delete", "operations", self.identity)
        except LxdNotFoundError:
            pass
        except LxdError:
            self.cancelled = False
            raise

    async def abort(self) -> None:
        """Returns when it has ended: cancelled, if LXD can, or by itself."""
        try:
            await self.cancel()
        except LxdError as error:
            if await self._never_began():
                return
            _log.info("waiting for LXD to end what cannot be cancelled: %s", error)
        with contextlib.suppress(LxdError, TimeoutError):
            async with asyncio.timeout(_ABORT_SECONDS):
                await self.wait()

    async def _never_began(self) -> bool:
        # One that LXD could not write down, the disk being full, stays pending for ever.
        for _ in range(_PENDING_LOOKS):
            try:
                state = await self._client.get("operations", self.identity)
            except LxdError:
                return False
            if state["status_code"] != _PENDING:
                return False
            await asyncio.sleep(_PENDING_SECONDS / _PENDING_LOOKS)
        return True


class LxdOperations:
    """Every operation that somebody waits for."""

    def __init__(self, client: LxdClient) -> None:
        self._client = client
        self._followed: dict[str, LxdOperation] = {}
        self._unclaimed: OrderedDict[str, dict[str, Any]] = OrderedDict()

    def on_event(self, state: dict[str, Any]) -> None:
        """Takes an event of type operation; state: its metadata.

        LXD sends each event from a thread of its own: the end may come before what led to it.
        """
        identity = state["id"]
        operation = self._followed.get(identity)
        if operation is not None:
            self._update(operation, state)
            return
        known = self._unclaimed.get(identity)
        if known is None or known["status_code"] not in _ENDS:
            self._unclaimed[identity] = state
        self._unclaimed.move_to_end(identity)
        while len(self._unclaimed) > _REMEMBERED:
            self._unclaimed.popitem(last=False)

    def _update(self, operation: LxdOperation, state: dict[str, Any]) -> None:
        operation.update(state)
        if operation.ended:
            self._followed.pop(operation.identity, None)

    def give_up(self) -> None:
        """Ends every followed operation: LXD has been away for too long."""
        for operation in self._followed.values():
            operation.lost("LXD does not answer any more")
        self._followed.clear()

    async def catch_up(self) -> None:
        """Asks LXD about each followed operation, after a time without events."""
        for operation in list(self._followed.values()):
            await self._refresh(operation)

    async def _refresh(self, operation: LxdOperation) -> None:
        try:
            state = await self._client.get("operations", operation.identity)
        except LxdNotFoundError:
            operation.lost("LXD was restarted in the middle")
            self._followed.pop(operation.identity, None)
        except LxdGoneError:
            pass  # the event stream says when it is back
        else:
            self._update(operation, state)

    async def start(
        self,
        method: str,
        *path: str,
        json: Any = None,
        params: dict[str, str] | None = None,
        on_change: Callable[[dict[str, Any]], None] | None = None,
    ) -> LxdOperation:
        """Makes a request that LXD answers with an operation.

        on_change: is given the operation's state whenever it changes without having ended.
        Raises LxdError.
        """
        request = asyncio.ensure_future(
            self._client.request(method, *path, json=json, params=params)
        )
        try:
            answer = await asyncio.shield(request)
        except asyncio.CancelledError:
            # LXD has the request by now, and begins what nobody wants any more.
            with contextlib.suppress(LxdError):
                await (await self.follow(await request, check=True)).abort()
            raise
        return await self.follow(answer, on_change=on_change)

    async def follow(
        self,
        answer: dict[str, Any],
        *,
        on_change: Callable[[dict[str, Any]], None] | None = None,
        check: bool = False,
    ) -> LxdOperation:
        """The operation in LXD's answer to a request, or its description in a list.

        check: asks LXD how it stands; for one that may be over already. Raises LxdError.
        """
        identity = str(answer.get("operation") or answer.get("id")).rsplit("/", 1)[-1]
        operation = LxdOperation(self._client, identity, on_change)
        self._followed[identity] = operation
        known = self._unclaimed.pop(identity, None)
        if known is not None:
            self._update(operation, known)
        if check:
            await self._refresh(operation)
        return operation

    async def under_way(
        self,
        concerns: Callable[[str], bool],
        *,
        on_change: Callable[[dict[str, Any]], None] | None = None,
    ) -> list[LxdOperation]:
        """The operations on instances that LXD has in hand, whoever asked for them.

        concerns: whether an operation on the instance of that name is wanted. Raises LxdError.
        """
        groups = await self._client.get("operations", params={"recursion": "1"})
        wanted = [
            found
            for group in groups.values()
            for found in group
            if found["status_code"] in {_PENDING, _RUNNING}
            and any(concerns(name) for name in _instances(found))
        ]
        return [await self.follow(found, on_change=on_change, check=True) for found in wanted]

    async def run(
        self,
        method: str,
        *path: str,
        json: Any = None,
        params: dict[str, str] | None = None,
        timeout: float | None = None,
    ) -> dict[str, Any]:
        """Makes a request and waits for what it started: the operation's final state.

        timeout: in seconds. Raises LxdError; TimeoutError.
        """
        operation = await self.start(method, *path, json=json, params=params)
        async with asyncio.timeout(timeout):
            return await operation.wait()


def _instances(operation: dict[str, Any]) -> set[str]:
    paths = (operation.get("resources") or {}).get("instances") or ()
    return {path.rpartition("/")[2] for path in paths}
