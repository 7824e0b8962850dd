"""What LXD cannot do now, being away or its disk full, it can do later: work that has to be done at
some time, and for which nobody waits.
"""

from __future__ import annotations

import tenacity

from agent.tremplin.lxd_client import LxdError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


async def until_done(attempt: Callable[[], Awaitable[None]]) -> None:
    """Calls it until it raises neither LxdError nor OSError; in the end every 10 s."""
    again = tenacity.AsyncRetrying(
        wait=tenacity.wait_exponential(multiplier=0.5, max=10.0),
        retry=tenacity.retry_if_exception_type((LxdError, OSError)),
    )
    await again(attempt)
