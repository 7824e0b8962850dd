"""Accepts the host's connections and gives each a session."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket

from agent import logs, relay
from agent.listening import BACKLOG, open_listener
from agent.shell.session import Session

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agent.options import Address

_log = logging.getLogger(__name__)


def run(address: Address, *, inherited: int | None) -> int:
    """Serves until SIGTERM or SIGINT. The result is the exit code.

    inherited: the descriptor that listens there already, if any.
    """
    logs.set_up("shell")
    try:
        asyncio.run(_serve(address, inherited))
    except OSError as error:
        _log.error("cannot listen on %s: %s", address, error.strerror or error)
        return 1
    return 0


async def _serve(address: Address, inherited: int | None) -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    refusals = relay.RefusalLog(address)
    sessions: set[Session] = set()
    fd = open_listener(address) if inherited is None else inherited
    server = await loop.create_server(
        lambda: Session(sessions, refusals), sock=socket.socket(fileno=fd), backlog=BACKLOG
    )
    await ended.wait()
    server.close()
    for session in list(sessions):
        session.abort()
    await asyncio.gather(*(session.ended for session in list(sessions)))
