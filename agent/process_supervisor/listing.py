"""What `list` says of processes. Loaded when it is first asked for, or when maitred runs."""

from __future__ import annotations

from agent.lean_stdlib import dumps
from agent.process_supervisor.table import BACKING_OFF, WINDOW

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from agent.process_supervisor.table import Process, Table

_PAGE = 32 * 1024
"""Bytes of rows in one answer, about."""

_ARGV_SHOWN = 2000
"""Characters of an argv in a row."""


def page(table: Table, after: int, now: float) -> tuple[list[dict[str, Any]], bool]:
    """The rows that follow the one with serial `after`, as many as one answer holds; any more?"""
    rows: list[dict[str, Any]] = []
    room = _PAGE
    for process in table:
        if process.serial > after:
            row = describe(process, now)
            room -= len(dumps(row))
            if rows and room < 0:
                return rows, True
            rows.append(row)
    return rows, False


def describe(process: Process, now: float) -> dict[str, Any]:
    """The row of a process; times in seconds before (uptime, ago) or after now (due)."""
    row: dict[str, Any] = {
        "serial": process.serial,
        "key": process.key,
        "argv": _shortened(process.spec.argv),
        "state": process.state,
        "pid": process.pid,
        "starts": process.starts,
        "respawn": process.spec.respawn,
        "recent_starts": sum(now - start <= WINDOW for start in process.recent_starts),
    }
    for flag in ("backoff", "console", "once"):
        if getattr(process.spec, flag):
            row[flag] = True
    if process.stop_reason:
        row["reason"] = process.stop_reason
    if process.spec.listen:
        row["listen"] = process.spec.listen
    if process.pid is not None:
        row["uptime"] = round(now - process.started_at, 3)
    if process.last_exit:
        status, code = process.last_exit
        row["last_exit"] = {
            "status": status,
            "code": code,
            "ago": round(now - process.ended_at, 3),
        }
    if process.state == BACKING_OFF and process.timer:
        row["due"] = round(process.timer.due - now, 3)
    return row


def _shortened(argv: list[str]) -> list[str]:
    """As much of an argv as is worth showing."""
    shown: list[str] = []
    room = _ARGV_SHOWN
    for argument in argv:
        if room <= 0:
            return [*shown, "..."]
        shown.append(argument if len(argument) <= room else argument[:room] + "...")
        room -= len(argument) + 1
    return shown
