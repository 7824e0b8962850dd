"""What LXD cannot do now it can do later: in a moment, when it has something else in hand; at some
time, for which nobody waits, when it is away or its disk full.
"""

from __future__ import annotations

import logging

import tenacity

from agent.tremplin.lxd_client import LxdError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from agent.tremplin.session import Session

_log = logging.getLogger(__name__)

_BUSY_SECONDS = 60.0
"""How long something else that LXD does with a container may hold up what is wanted of it."""
_BUSY_POLL_SECONDS = 0.1


async def while_busy(attempt: Callable[[], Awaitable[None]]) -> None:
    """Calls it again as long as LXD has something else in hand with the container, and refuses.

    Raises what attempt raises; the refusal too, after a minute of it.
    """
    again = tenacity.AsyncRetrying(
        wait=tenacity.wait_fixed(_BUSY_POLL_SECONDS),
        stop=tenacity.stop_after_delay(_BUSY_SECONDS),
        retry=tenacity.retry_if_exception(is_busy),
        reraise=True,
    )
    await again(attempt)


def is_busy(error: BaseException) -> bool:
    """Whether LXD refuses because it has something else in hand with the container."""
    text = str(error) if isinstance(error, LxdError) else ""
    return "Instance is busy" in text or "is already running" in text or "is running" in text


async def now_or_later(session: Session, what: str, attempt: Callable[[], Awaitable[None]]) -> None:
    """Returns when attempt was called once; if it failed, it is called in the background from then
    on, as until_done() does. what: "remove ...", for the log.
    """
    try:
        await attempt()
    except (LxdError, OSError) as error:
        _log.warning("cannot %s yet: %s", what, error)
        session.in_background(until_done(attempt))


async def until_done(attempt: Callable[[], Awaitable[None]]) -> None:
    """Calls it until it raises neither LxdError nor OSError; in the end every 10 s."""
    again = tenacity.AsyncRetrying(
        wait=tenacity.wait_exponential(multiplier=0.5, max=10.0),
        retry=tenacity.retry_if_exception_type((LxdError, OSError)),
    )
    await again(attempt)
