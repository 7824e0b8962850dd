"""One long operation, on a container or LXD itself: what all of them share. LXD's own operations,
which ours are made of, are in lxd_operations.py.

    waiting ──► running ──► done | failed | cancelled | timed out

Whatever ends it, exactly one final report goes to the host, when the call that started it has been
answered.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from abc import ABC, abstractmethod

from agent.console import printable
from agent.tremplin.lxd_client import LxdError
from agent.tremplin.lxd_operations import LxdCancelledError
from agent.tremplin.retry import until_done

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from google.protobuf.message import Message

    from agent.tremplin.session import Session

_log = logging.getLogger(__name__)


_LONGEST_REASON = 1000
"""Characters. Hosts take 4 MiB of a message; tar alone may have more to say of a bad archive."""

_LXD_SECONDS = 60.0
"""How long the report of a failure waits for LXD, to undo what was done."""


class Outcome(enum.Enum):
    """How an operation ended."""

    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed out"


class OperationError(Exception):
    """An operation cannot be carried out; str() says why."""


class OperationTimedOutError(OperationError):
    """What an operation waited for did not come."""


class Operation(ABC):
    """One long operation, from the call that starts it to its final report."""

    verb: str
    """What is done, for "cannot VERB SUBJECT: why"."""
    method: str
    """The RPC that asks for it."""

    def __init__(self, session: Session, request: Any) -> None:
        """request: of the RPC."""
        self.session = session
        self.request = request
        self.container: str = getattr(request, "container_name", "")
        """Its name, "" for LXD itself."""
        self.subject = f"container {self.container}" if self.container else "LXD"
        self.notes: dict[str, Any] = {}
        """What it needs to know if it is carried on by another tremplin; see note()."""
        self.resumed = False
        """Whether another tremplin, which was killed, began it."""
        self.answered = asyncio.Event()
        """Set when the call that started it has been answered: no report goes out before."""
        self.outcome: Outcome | None = None
        self.reason = ""
        """Why it did not succeed, for the host."""
        self.ended = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._cancel_asked = False

    @abstractmethod
    async def work(self) -> None:
        """Carries it out; raising anything fails it. Cancellation comes as CancelledError."""

    @abstractmethod
    def report_end(self, outcome: Outcome, reason: str) -> None:
        """Tells the host how it ended, with report()."""

    async def clean_up(self) -> None:  # noqa: B027  most have nothing to remove
        """Removes what work() left, after it has not succeeded."""

    def start(self) -> None:
        """Begins to work."""
        self.session.running.add(self)
        self.session.latest[self.container] = self
        self.note()
        self._task = asyncio.create_task(self._run())

    def resume(self, notes: dict[str, Any]) -> None:
        """Carries on what another tremplin began. notes: what that one knew."""
        self.notes = notes
        self.resumed = True
        self.answered.set()
        self.start()

    def note(self, **notes: str | int) -> None:
        """Writes down what another tremplin would need to know to carry it on."""
        self.notes |= notes
        self.session.journal.note(self.method, self.container, self.request, self.notes)

    def report(self, method: str, message: Message, *, final: bool = True) -> None:
        """Reports to the host; method: of TremplinListener."""
        self.session.reporter.report(
            method,
            message,
            container=self.container,
            kind=self,
            final=final,
            held_until=self.answered,
            on_delivered=self.told if final else None,
        )

    def told(self) -> None:
        """The host knows how it ended."""
        # Unless it was asked for again in the meantime.
        if self.session.operation(type(self), self.container) is None:
            self.session.journal.end(self.method, self.container)

    def cancel(self) -> None:
        """Asks it to stop; it ends when what it did is undone."""
        self._cancel_asked = True
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        outcome, reason = await self._outcome()
        if outcome is not Outcome.DONE:
            reason = f"cannot {self.verb} {self.subject}: {reason}"
            _log.warning("%s", reason)
            # Who leaves nothing need not wait for an LXD that may never come back.
            if type(self).clean_up is not Operation.clean_up:
                await self._undo()
        self.outcome = outcome
        self.reason = reason
        self.session.running.discard(self)
        self.ended.set()
        self.report_end(outcome, reason)

    async def _undo(self) -> None:
        try:
            # LXD itself may be what failed; it is back soon.
            async with asyncio.timeout(_LXD_SECONDS):
                await self.session.lxd_is_up.wait()
            await self.clean_up()
        except (LxdError, OSError) as error:  # a TimeoutError is an OSError
            _log.warning("cannot clean up after %s yet: %s", self.subject, error)
            self.session.in_background(self._undo_later())
        except Exception:  # noqa: BLE001  an operation always ends in a report
            _log.exception("cannot clean up after %s", self.subject)

    async def _undo_later(self) -> None:
        # On a full disk LXD cannot even write down that it removes something.
        async def attempt() -> None:
            if self.session.latest.get(self.container) is not self:
                return  # what came after it has dealt with what it left
            await self.session.lxd.in_thread(self.session.flush)
            await self.clean_up()
            _log.info("cleaned up after %s", self.subject)

        await until_done(attempt)

    async def _outcome(self) -> tuple[Outcome, str]:
        try:
            await self.work()
        except asyncio.CancelledError:
            if not self._cancel_asked:
                raise
            return Outcome.CANCELLED, "it was cancelled"
        except LxdCancelledError:
            return Outcome.CANCELLED, "it was cancelled"
        except OperationTimedOutError as error:
            return Outcome.TIMED_OUT, str(error)
        except (LxdError, OperationError, OSError) as error:
            return Outcome.FAILED, one_line(error)
        except Exception as error:  # noqa: BLE001  an operation always ends in a report
            _log.exception("cannot %s %s", self.verb, self.subject)
            return Outcome.FAILED, one_line(error)
        return Outcome.DONE, ""


def one_line(error: BaseException) -> str:
    """The text of an error, never empty, as shown() makes it."""
    return shown(str(error)) or type(error).__name__


def shown(text: str) -> str:
    """Text for the host, on one line: what a container, an image or a file to import has brought in
    is neither endless nor for a terminal to obey, and can be sent.
    """
    return printable(text, _LONGEST_REASON)


def cannot(verb: str, container: str, why: str | BaseException) -> str:
    """Why something cannot be done with a container, as it is reported."""
    reason = shown(why) if isinstance(why, str) else one_line(why)
    return f"cannot {verb} container {container}: {reason}"
