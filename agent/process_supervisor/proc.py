"""What runs on the machine, from /proc: which processes a shutdown has to deal with, and which of
them are a container's. Only for the shutdown; supervised processes are in the table.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_PF_KTHREAD = 0x00200000  # include/linux/sched.h


class ProcessFacts:
    """One process: pid, parent, comm, when it started (clock ticks since boot).

    in_container: it is in a PID namespace other than ours, or keeps one (the parent of its init).
    """

    __slots__ = ("in_container", "name", "parent", "pid", "started")

    def __init__(self, pid: int, parent: int, name: str, started: int) -> None:
        self.pid = pid
        self.parent = parent
        self.name = name
        self.started = started
        self.in_container = False


def read_processes(*, descendants_only: bool) -> dict[int, ProcessFacts]:
    """Every process but the caller and kernel threads, by pid.

    descendants_only: only those that descend from the caller.
    Empty when /proc is not the one of the caller's PID namespace: its pids are not ours then.
    See proc(5): /proc/PID/stat, NSpid in /proc/PID/status.
    """
    own = os.getpid()
    try:
        if int(os.readlink("/proc/self")) != own:
            return {}
        names = [name for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return {}
    found: dict[int, ProcessFacts] = {}
    inits: list[ProcessFacts] = []
    for name in names:
        pid = int(name)
        facts = None if pid == own else _read_one(pid, inits)
        if facts:
            found[pid] = facts
    for init in inits:
        if init.parent in found:
            found[init.parent].in_container = True
    if descendants_only:
        return {pid: facts for pid, facts in found.items() if _descends(facts, {own}, found)}
    return found


def _read_one(pid: int, inits: list[ProcessFacts]) -> ProcessFacts | None:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            head, _, tail = file.read().rpartition(")")
        fields = tail.split()  # from field 3 on, the state
        if int(fields[6]) & _PF_KTHREAD or fields[0] in {"Z", "X"}:
            return None
        facts = ProcessFacts(pid, int(fields[1]), head.partition("(")[2], int(fields[19]))
        inner = _pids_in_namespaces(pid)
    except (OSError, ValueError, IndexError):
        return None  # gone in the meantime
    if len(inner) > 1:
        facts.in_container = True
        if len(inner) == 2 and inner[-1] == 1:
            inits.append(facts)
    return facts


def _pids_in_namespaces(pid: int) -> list[int]:
    """Its pid here, and in each PID namespace below this one that it is in."""
    with open(f"/proc/{pid}/status", "rb") as file:
        _, _, rest = file.read().partition(b"\nNSpid:")
    return [int(word) for word in rest.partition(b"\n")[0].split()] or [pid]


def _descends(facts: ProcessFacts, ancestors: set[int], found: dict[int, ProcessFacts]) -> bool:
    for _ in range(len(found) + 1):
        if facts.parent in ancestors:
            return True
        if facts.parent not in found:
            return False
        facts = found[facts.parent]
    return False


def subtree(pids: Iterable[int], found: dict[int, ProcessFacts]) -> set[int]:
    """The processes in pids and all that descend from them."""
    roots = set(pids)
    return {pid for pid, facts in found.items() if pid in roots or _descends(facts, roots, found)}
