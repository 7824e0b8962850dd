"""The listening sockets that PID 1 keeps for its processes: open before the first start of one,
handed to each run of it (spawn.py), and closed when it is forgotten or at the end. PID 1 never
accepts on them, and never waits for them.
"""

from __future__ import annotations

import errno
import os

from agent.listening import open_listener, unlink
from agent.options import Address, UnixAddress, VsockAddress, parse_listen_address
from agent.process_supervisor.protocol import ProtocolError
from agent.process_supervisor.spawn import move_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any


class Listeners:
    """All of them. vsock: whether vsock ports are opened; outside a VM they are the host's."""

    def __init__(self, *, vsock: bool) -> None:
        self._vsock = vsock
        self._kept: dict[Address, tuple[str, int, bool]] = {}
        """By address: whose it is, the descriptor, whether it stays whatever becomes of that."""

    def assign(self, key: str, addresses: Sequence[str]) -> None:
        """Opens what process `key` is to have now and has not, and closes what it has no more.

        Raises ProtocolError: nothing has changed.
        """
        wanted = self._open_all(key, addresses, reserved=False)
        for address, (owner, _fd, reserved) in list(self._kept.items()):
            if owner == key and address not in wanted and not reserved:
                self._close(address)

    def reserve(self, key: str, address: str) -> None:
        """Opens it until the end, for a process that may be launched much later or never.

        Raises ProtocolError.
        """
        self._open_all(key, [address], reserved=True)

    def _open_all(self, key: str, addresses: Sequence[str], *, reserved: bool) -> list[Address]:
        wanted = [parse_listen_address(text) for text in addresses]
        opened: list[Address] = []
        try:
            for address in wanted:
                owner = self._kept[address][0] if address in self._kept else ""
                if owner and owner != key:
                    reason = f"PID 1 keeps it for {owner}"
                    raise ProtocolError("EADDRINUSE", f"cannot listen on {address}: {reason}")
                if not owner:
                    self._kept[address] = (key, self._open(address), reserved)
                    opened.append(address)
        except ProtocolError:
            for address in opened:
                self._close(address)
            raise
        return wanted

    def _open(self, address: Address) -> int:
        if isinstance(address, VsockAddress) and not self._vsock:
            reason = "maitred.listen is no vsock port here, so nothing else is"
            raise ProtocolError("EOPNOTSUPP", f"cannot listen on {address}: {reason}")
        try:
            return move_up(open_listener(address))
        except OSError as error:
            code = errno.errorcode.get(error.errno or 0, "EIO")
            raise ProtocolError(code, f"cannot listen on {address}: {error.strerror}") from None

    def _close(self, address: Address) -> None:
        _owner, fd, _reserved = self._kept.pop(address)
        os.close(fd)
        if isinstance(address, UnixAddress):
            try:
                unlink(address.path)
            except OSError:  # its directory has become read-only: the next to listen replaces it
                pass

    def close(self) -> None:
        """Closes all."""
        for address in list(self._kept):
            self._close(address)

    def descriptors(self, key: str, addresses: Sequence[str]) -> list[int]:
        """The sockets of process `key` for its next run, in the order of addresses.

        Raises OSError when one that was lost over an upgrade cannot be opened again.
        """
        try:
            wanted = self._open_all(key, addresses, reserved=False)
        except ProtocolError as error:
            raise OSError(getattr(errno, error.code, errno.EIO), str(error)) from None
        found = [self._kept[address][1] for address in wanted]
        for fd in found:
            os.set_blocking(fd, False)  # the flag is the socket's: the run before may have set it
        return found

    # ---- upgrade in place --------------------------------------------------------------------

    def save(self) -> list[list[Any]]:
        """All, for restore() in the PID 1 that comes after: address, key, descriptor, reserved."""
        return [[str(address), *kept] for address, kept in self._kept.items()]

    def restore(self, saved: list[Any]) -> None:
        """Takes over one of save()."""
        text, key, fd, reserved = saved
        os.set_inheritable(fd, False)
        self._kept[parse_listen_address(text)] = (key, fd, reserved)
