"""After an upgrade, what of the state before could not be read: found again from the descriptors
that PID 1 has and the children it has. No process ends, nobody's pipe breaks and no socket is lost;
what cannot be known is forgotten: names, whether to respawn, limits, and who waited.
"""

from __future__ import annotations

import fcntl
import os

from agent.lean_stdlib import socket
from agent.options import UnixAddress, VsockAddress
from agent.process_supervisor.output import Ring
from agent.process_supervisor.proc import read_processes
from agent.process_supervisor.protocol import ProcessSpec
from agent.process_supervisor.table import RUNNING

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from agent.process_supervisor.proc import ProcessFacts
    from agent.process_supervisor.supervisor import Supervisor


def salvage(
    supervisor: Supervisor, maitred: ProcessSpec, ports: Mapping[str, str], adopted: list[str]
) -> None:
    """Finds what is not known. adopted: gets the keys of processes that are known again.

    maitred: as it would be started now. ports: what is reserved, address by name.
    """
    owners = {address: name for name, address in ports.items()}
    for spec in (maitred, *(process.spec for process in supervisor.table)):
        owners |= dict.fromkeys(spec.listen, spec.name)
    _Salvage(supervisor, maitred, owners, adopted).run()


class _Salvage:
    """owners: the name of the process whose a listening address is."""

    def __init__(
        self,
        supervisor: Supervisor,
        maitred: ProcessSpec,
        owners: Mapping[str, str],
        adopted: list[str],
    ) -> None:
        self._supervisor = supervisor
        self._maitred = maitred
        self._owners = owners
        self._adopted = adopted
        self._pipes: dict[str, int] = {}
        """By what proc(5) calls them, which is the same for both ends."""
        self._listeners: dict[str, str] = {}
        """Whose they are, likewise."""

    def run(self) -> None:
        for name in os.listdir("/proc/self/fd"):
            fd = int(name)
            try:
                # What was taken over is close-on-exec again.
                if fd > 2 and os.get_inheritable(fd):
                    os.set_inheritable(fd, False)
                    self._see_to(fd)
            except OSError:  # of the listing itself, closed by now
                continue
        for _address, key, fd, _reserved in self._supervisor.listeners.save():
            self._listeners[os.readlink(f"/proc/self/fd/{fd}")] = key
        own = os.getpid()
        for facts in read_processes(descendants_only=True).values():
            if facts.parent == own and not self._supervisor.table.by_pid(facts.pid):
                try:
                    self._adopt(facts)
                except OSError:  # it has ended
                    continue
        for fd in self._pipes.values():  # of those that a child has left running
            self._supervisor.outputs.follow(fd, Ring(), "unknown", 0)

    def _see_to(self, fd: int) -> None:
        what = os.readlink(f"/proc/self/fd/{fd}")
        if what.startswith("socket:"):
            self._see_to_socket(fd)
        elif what.startswith("pipe:"):
            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
            if flags & os.O_ACCMODE == os.O_RDONLY and flags & os.O_NONBLOCK:
                self._pipes[what] = fd

    def _see_to_socket(self, fd: int) -> None:
        supervisor = self._supervisor
        found = socket.socket(fileno=fd)
        listens = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        name = found.getsockname()
        if found.family == socket.AF_UNIX and name == supervisor.socket_path:
            if listens and not supervisor.control:
                supervisor.serve(found)
            else:
                found.close()  # a client: it connects again
        elif listens and found.family in {socket.AF_UNIX, socket.AF_VSOCK}:
            vsock = found.family == socket.AF_VSOCK
            address = str(VsockAddress(name[1]) if vsock else UnixAddress(name))
            if owner := self._owners.get(address):
                supervisor.listeners.restore([address, owner, found.detach(), True])
            else:
                found.close()  # nobody knows whose; a process that has it still serves it
        else:
            found.detach()  # none of ours

    def _adopt(self, facts: ProcessFacts) -> None:
        pid, table = facts.pid, self._supervisor.table
        if os.getsid(pid) != pid:
            return  # an orphan: what PID 1 starts has a session of its own
        open_files = _open_files(pid)
        owner = next((key for what, key in self._listeners.items() if what in open_files), "")
        if owner == self._maitred.name:
            spec = self._maitred
        else:
            argv = _words(f"/proc/{pid}/cmdline") or [facts.name]
            env = dict(word.split("=", 1) for word in _words(f"/proc/{pid}/environ") if "=" in word)
            spec = ProcessSpec(argv, env=env, name=owner)
        process = table.new(spec)
        process.state = RUNNING
        process.pid = pid
        process.starts = 1
        process.started_at = facts.started / os.sysconf("SC_CLK_TCK")
        table.adopt(process, None)
        self._adopted.append(process.key)
        for what in open_files & set(self._pipes):
            process.ring = process.ring or Ring()
            process.pipe = self._supervisor.outputs.follow(
                self._pipes.pop(what), process.ring, process.key, pid
            )


def _open_files(pid: int) -> set[str]:
    """Of a process, as proc(5) calls them. Read, not looked at: the latter can hang."""
    found = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            found.add(os.readlink(f"/proc/{pid}/fd/{name}"))
        except FileNotFoundError:
            continue
    return found


def _words(path: str) -> list[str]:
    with open(path, "rb") as file:
        return [os.fsdecode(word) for word in file.read().split(b"\0")[:-1]]
