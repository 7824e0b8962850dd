"""What the host asked for and has not heard the end of, in the run directory: a tremplin that was
killed carries it on when it is started again. A power cut takes the journal with it, and the host's
memory too.
"""

from __future__ import annotations

import base64
import json
import logging

from agent import atomic_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from google.protobuf.message import Message

_log = logging.getLogger(__name__)


class Journal:
    """The requests behind the operations that have not been reported to their end."""

    def __init__(self, path: str) -> None:
        """path: of its file."""
        self._path = path
        self._entries: dict[tuple[str, str], dict[str, object]] = {}

    def note(
        self, method: str, container: str, request: Message, notes: dict[str, str | int]
    ) -> None:
        """Writes an operation down, or what has changed about it; notes: its own to read again."""
        self._entries[method, container] = {
            "method": method,
            "request": base64.b64encode(request.SerializeToString()).decode(),
            "notes": notes,
        }
        self._write()

    def end(self, method: str, container: str) -> None:
        """Forgets it: the host knows how it ended."""
        if self._entries.pop((method, container), None) is not None:
            self._write()

    def left_over(self) -> list[tuple[str, bytes, dict[str, Any]]]:
        """Method, serialized request and notes of what an earlier tremplin did not end."""
        try:
            with open(self._path, encoding="utf-8") as file:
                entries = json.load(file)
            return [
                (
                    str(entry["method"]),
                    base64.b64decode(entry["request"], validate=True),
                    dict(entry["notes"]),
                )
                for entry in entries
            ]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, LookupError, TypeError) as error:
            _log.warning("cannot read what was going on before: %s", error)
            return []

    def _write(self) -> None:
        try:
            atomic_file.replace(self._path, json.dumps(list(self._entries.values())), mode=0o600)
        except OSError as error:
            _log.warning("cannot note down what is going on: %s", error)
