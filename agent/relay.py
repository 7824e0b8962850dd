"""The relay: joins a stream socket that gRPC cannot speak (AF_VSOCK) to a unix socket that it can,
byte for byte, and lets in nobody but the host. Knows nothing of gRPC (agent/grpc_endpoint.py does).
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time

from agent.listening import BACKLOG, open_listener, unlink
from agent.options import HOST_CID, Address, UnixAddress, VsockAddress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_log = logging.getLogger(__name__)

_BUFFER_BYTES = 64 * 1024
_ACCEPT_PAUSE_SECONDS = 1.0
_BUSY_SECONDS = 5.0
"""How long to go on trying a unix socket whose backlog is full."""
_REFUSAL_LINE_SECONDS = 10.0
"""A process that keeps knocking gets one line on the console per this time, not one per knock."""


class Relay:
    """Accepts connections on one address and joins each to a connection of its own to another.

    What one end sends arrives at the other, and a half-close is carried over. A connection is over
    when both directions have ended. An end that reads slowly slows the other one down; at most
    _BUFFER_BYTES of a direction are held here.
    """

    def __init__(
        self,
        listen: Address,
        target: Address,
        *,
        inherited: int | None = None,
        is_allowed: Callable[[socket.socket], bool] | None = None,
    ) -> None:
        """listen: where to accept; target: where to connect to, once per accepted connection.

        inherited: the descriptor that listens there already, from agent.listening.inherited().
        is_allowed: whether a peer may come in; by default peer_is_allowed().
        """
        self._listen = listen
        self._target = target
        self._inherited = inherited
        self._is_allowed = is_allowed or peer_is_allowed
        self._refusals = RefusalLog(listen)
        self._listener: socket.socket | None = None
        self._joins: set[asyncio.Task[None]] = set()
        self._connections: set[_Connection] = set()
        # One buffer serves all: what cannot be written at once is copied out of it.
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))

    async def start(self) -> None:
        """Begins to accept. Raises OSError: the address cannot be listened on."""
        fd = open_listener(self._listen) if self._inherited is None else self._inherited
        self._listener = socket.socket(fileno=fd)
        self._accept_when_ready()

    def stop_accepting(self) -> None:
        """New connections wait for the next process if the socket is inherited, or are refused."""
        listener, self._listener = self._listener, None
        if listener is not None:
            asyncio.get_running_loop().remove_reader(listener)
            listener.close()
            if self._inherited is None and isinstance(self._listen, UnixAddress):
                unlink(self._listen.path)

    async def close(self) -> None:
        """Stops accepting and cuts every connection."""
        self.stop_accepting()
        joins = list(self._joins)
        for join in joins:
            join.cancel()
        await asyncio.gather(*joins, return_exceptions=True)
        for connection in list(self._connections):
            connection.close()

    @property
    def connections(self) -> int:
        """How many connections there are, those being joined included."""
        return len(self._connections) + len(self._joins)

    def _accept_when_ready(self) -> None:
        if self._listener is not None:
            asyncio.get_running_loop().add_reader(self._listener, self._accept, self._listener)

    def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(BACKLOG):
            try:
                peer, address = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # too many open files: the listener would stay readable
                _log.error("cannot accept a connection to %s: %s", self._listen, error)
                loop.remove_reader(listener)
                loop.call_later(_ACCEPT_PAUSE_SECONDS, self._accept_when_ready)
                return
            if not self._is_allowed(peer):
                peer.close()
                self._refusals.refused(address)
                continue
            peer.setblocking(False)
            task = loop.create_task(self._join(peer))
            self._joins.add(task)
            task.add_done_callback(self._joins.discard)

    async def _join(self, peer: socket.socket) -> None:
        # Until there is somewhere to write to, what the peer sends stays in the kernel.
        try:
            inner = await connect(self._target)
        except OSError as error:
            peer.close()
            _log.debug("cannot connect to %s: %s", self._target, error)
        except BaseException:
            peer.close()
            raise
        else:
            _Connection(peer, inner, self._buffer, self._connections)


class _Connection:
    """Two sockets and the two directions between them."""

    def __init__(
        self,
        one: socket.socket,
        other: socket.socket,
        buffer: memoryview,
        registry: set[_Connection],
    ) -> None:
        self._sockets = (one, other)
        self._registry = registry
        registry.add(self)
        self._directions = [
            _Direction(one, other, buffer, self._ended),
            _Direction(other, one, buffer, self._ended),
        ]

    def _ended(self) -> None:
        if all(direction.has_ended for direction in self._directions):
            self.close()

    def close(self) -> None:
        """Closes both sockets, whatever is under way."""
        if self not in self._registry:
            return
        self._registry.discard(self)
        for direction in self._directions:
            direction.stop()
        for end in self._sockets:
            end.close()


class _Direction:
    """Bytes from a source to a sink until the source ends or the sink takes no more.

    reading -> (sink is full) -> writing -> reading -> (end of the source, any error) -> ended
    """

    def __init__(
        self,
        source: socket.socket,
        sink: socket.socket,
        buffer: memoryview,
        on_end: Callable[[], None],
    ) -> None:
        self._source = source
        self._sink = sink
        self._buffer = buffer
        self._on_end = on_end
        self._rest = b""
        self._loop = asyncio.get_running_loop()
        self.has_ended = False
        self._loop.add_reader(source, self._read)

    def _read(self) -> None:
        try:
            count = self._source.recv_into(self._buffer)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            count = 0
        if count == 0:
            self._end(self._sink, socket.SHUT_WR)
            return
        try:
            sent = self._sink.send(self._buffer[:count])
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            self._end(self._source, socket.SHUT_RD)
            return
        if sent < count:
            self._rest = bytes(self._buffer[sent:count])
            self._loop.remove_reader(self._source)
            self._loop.add_writer(self._sink, self._write_rest)

    def _write_rest(self) -> None:
        try:
            sent = self._sink.send(self._rest)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._end(self._source, socket.SHUT_RD)
            return
        self._rest = self._rest[sent:]
        if not self._rest:
            self._loop.remove_writer(self._sink)
            self._loop.add_reader(self._source, self._read)

    def _end(self, survivor: socket.socket, how: int) -> None:
        # The other direction may go on: only when it has ended too is the connection over.
        self.stop()
        try:
            survivor.shutdown(how)
        except OSError:
            pass
        self._on_end()

    def stop(self) -> None:
        """Moves nothing any more."""
        if self.has_ended:
            return
        self.has_ended = True
        self._loop.remove_reader(self._source)
        if self._rest:
            self._loop.remove_writer(self._sink)


class RefusalLog:
    """Says on the console who was refused, in few lines however often it happens."""

    def __init__(self, listen: Address, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._listen = listen
        self._clock = clock
        self._silent_until = float("-inf")
        self._unsaid = 0

    def refused(self, peer: object) -> None:
        """peer: its address as accept(2) gave it, for vsock(7) a pair of CID and port."""
        now = self._clock()
        if now < self._silent_until:
            self._unsaid += 1
            return
        who = f"CID {peer[0]}" if isinstance(peer, tuple) else "a peer that is not the host"
        also = f" (and {self._unsaid} more before)" if self._unsaid else ""
        _log.warning("refused a connection to %s from %s%s", self._listen, who, also)
        self._silent_until = now + _REFUSAL_LINE_SECONDS
        self._unsaid = 0


def peer_is_allowed(peer: socket.socket) -> bool:
    """Whether the other end may talk to us: over vsock only the host (CID 2), which a process in
    the VM cannot pass for, as the kernel fills the CID in; over a unix socket whoever the mode of
    the socket file and its directory let in.
    """
    if peer.family == socket.AF_VSOCK:
        try:
            cid: int = peer.getpeername()[0]
        except OSError:
            return False
        return cid == HOST_CID
    return peer.family == socket.AF_UNIX


async def connect(address: Address) -> socket.socket:
    """A connected, non-blocking stream socket to address.

    Raises OSError; over vsock ETIMEDOUT after 2 s, vsock(7)'s default, when nobody answers.
    """
    loop = asyncio.get_running_loop()
    if isinstance(address, VsockAddress):
        connection = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    else:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.setblocking(False)
    try:
        if isinstance(address, VsockAddress):
            cid = HOST_CID if address.cid is None else address.cid
            await loop.sock_connect(connection, (cid, address.port))
        else:
            await _connect_unix(connection, address.path)
    except BaseException:
        connection.close()
        raise
    return connection


async def _connect_unix(connection: socket.socket, path: str) -> None:
    # unix(7) sockets connect at once or, the backlog full, fail with EAGAIN: there is nothing to
    # wait for with poll(2), which loop.sock_connect() would take for being connected.
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            connection.connect(path)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.01)
        else:
            return
