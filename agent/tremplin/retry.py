"""What LXD cannot do now, being away or its disk full, it can do later: work that has to be done at
some time, and for which nobody waits.
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
