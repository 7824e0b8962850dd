"""gRPC on an Address, for maitred and tremplin: a server that listens on one, a channel to one.

gRPC itself always speaks over unix sockets that it opens; for a vsock port, and for a socket that
PID 1 has opened, a relay (agent/relay.py) in the same process joins the two.
"""

from __future__ import annotations

import os
import stat

import grpc.aio

from agent.listening import remove_stale_socket
from agent.options import Address, UnixAddress, VsockAddress
from agent.relay import Relay

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    # A host that was away is found again within a second; gRPC's own delays grow to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_http_proxy", 0),
    ("grpc.service_config_disable_resolution", 1),
)
"""Options of every channel of ours."""


class Listener:
    """A started gRPC server, reachable on an address."""

    def __init__(self, server: grpc.aio.Server, relay: Relay | None) -> None:
        self._server = server
        self._relay = relay

    async def stop(self, grace: float | None) -> None:
        """Takes no new calls, gives those in flight grace seconds, then cancels them."""
        if self._relay is not None:
            self._relay.stop_accepting()
        await self._server.stop(grace)
        if self._relay is not None:
            await self._relay.close()

    async def wait(self) -> None:
        """Returns when the server has stopped."""
        await self._server.wait_for_termination()


async def listen(
    server: grpc.aio.Server,
    address: Address,
    *,
    run_dir: str,
    name: str,
    inherited: Mapping[Address, int],
) -> Listener:
    """Starts server, to which the services have been added, on address.

    run_dir: where gRPC's own unix socket lives when a relay is used, which it is for a vsock port
        and for every inherited socket; see prepare_run_dir().
    name: of that socket, without `.sock`.
    inherited: from agent.listening.inherited().
    Raises OSError: the address cannot be listened on, EADDRINUSE when another process does.
    """
    if isinstance(address, UnixAddress) and address not in inherited:
        path, relay = address.path, None
    else:
        path = f"{run_dir}/{name}.sock"
        relay = Relay(address, UnixAddress(path), inherited=inherited.get(address))
    remove_stale_socket(path)  # gRPC would also take the place of a socket that is in use
    before = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{path}")
    except RuntimeError as error:
        raise OSError(f"cannot listen on unix:{path}: {error}") from None
    finally:
        os.umask(before)
    await server.start()
    if relay is not None:
        try:
            await relay.start()
        except OSError:
            await server.stop(None)
            raise
    return Listener(server, relay)


class HostChannel:
    """A channel to an endpoint on the host; `async with HostChannel(...) as channel:`.

    gRPC connects when a call needs it and again whenever the connection is lost. While the host
    does not answer, a call fails with UNAVAILABLE, over vsock after at most 2 s.
    """

    def __init__(self, address: Address, *, run_dir: str, name: str) -> None:
        """run_dir, name: of the relay's unix socket, unused when address is a unix socket; name
        is unique among those in run_dir and goes without `.sock`.
        """
        self._relay: Relay | None = None
        if isinstance(address, VsockAddress):
            inner = UnixAddress(f"{run_dir}/{name}.sock")
            self._relay = Relay(inner, address)
            address = inner
        self._target = f"unix:{address.path}"
        self._channel: grpc.aio.Channel | None = None

    async def open(self) -> grpc.aio.Channel:
        """The channel, each time the same. Raises OSError: the relay's socket cannot be made."""
        if self._channel is None:
            if self._relay is not None:
                await self._relay.start()
            self._channel = grpc.aio.insecure_channel(self._target, options=CHANNEL_OPTIONS)
        return self._channel

    async def close(self) -> None:
        """Cancels calls in flight and closes the connection."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()
            if self._relay is not None:
                await self._relay.close()

    async def __aenter__(self) -> grpc.aio.Channel:
        return await self.open()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


def prepare_run_dir(path: str) -> None:
    """Makes the run directory, or what is there, safe to keep sockets in: ours, mode 0700.

    Raises OSError: it cannot be made, is no directory, or belongs to somebody else.
    """
    os.makedirs(path, mode=0o700, exist_ok=True)
    found = os.stat(path, follow_symlinks=False)
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(f"cannot use {path}: not a directory")
    if found.st_uid != os.geteuid():
        raise PermissionError(f"cannot use {path}: it belongs to uid {found.st_uid}")
    os.chmod(path, 0o700)
