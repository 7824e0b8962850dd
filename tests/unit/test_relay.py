"""The relay over unix sockets on both sides; the vsock side of it is tested in a VM."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pytest

from agent.listening import open_listener, remove_stale_socket
from agent.options import UnixAddress, VsockAddress
from agent.relay import RefusalLog, Relay, connect

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class _Peer:
    """A server behind the relay that hands its connections to the test."""

    def __init__(self, path: Path) -> None:
        self.address = UnixAddress(str(path))
        self._accepted: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = (
            asyncio.Queue()
        )

    async def __aenter__(self) -> Self:
        async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._accepted.put((reader, writer))

        self._server = await asyncio.start_unix_server(accepted, self.address.path)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def accept(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.wait_for(self._accepted.get(), 10)


@contextlib.asynccontextmanager
async def _relayed(directory: Path) -> AsyncIterator[tuple[UnixAddress, _Peer, Relay]]:
    """A relay from an address to a peer; at the end no connection is left."""
    front = UnixAddress(str(directory / "front"))
    async with _Peer(directory / "inner") as peer:
        relay = Relay(front, peer.address)
        await relay.start()
        yield front, peer, relay
        await _none_left(relay)
        await relay.close()


async def _none_left(relay: Relay) -> None:
    async with asyncio.timeout(10):
        while relay.connections:
            await asyncio.sleep(0)


def test_bytes_and_half_closes_are_carried_over_both_ways(tmp_path: Path) -> None:
    async def run() -> None:
        async with _relayed(tmp_path) as (front, peer, relay):
            reader, writer = await asyncio.open_unix_connection(front.path)
            writer.write(b"question")
            writer.write_eof()
            inner_reader, inner_writer = await peer.accept()
            assert await inner_reader.read() == b"question"
            inner_writer.write(b"answer")
            inner_writer.write_eof()
            assert await reader.read() == b"answer"
            await _none_left(relay)  # although neither end has closed its socket
            writer.close()
            inner_writer.close()

    asyncio.run(run())


def test_a_lot_of_data_arrives_whole_and_is_not_piled_up(tmp_path: Path) -> None:
    block = os.urandom(1 << 20)

    async def run() -> None:
        async with _relayed(tmp_path) as (front, peer, _):
            _, writer = await asyncio.open_unix_connection(front.path)
            inner_reader, inner_writer = await peer.accept()
            for _ in range(16):
                writer.write(block)
            drain = asyncio.create_task(writer.drain())
            done, _pending = await asyncio.wait([drain], timeout=0.2)
            assert not done, "16 MiB went somewhere although nobody reads them"
            for _ in range(16):
                assert await inner_reader.readexactly(len(block)) == block
            await drain
            writer.close()
            inner_writer.close()

    asyncio.run(run())


@pytest.mark.parametrize("leaver", ["front", "inner"])
def test_when_one_side_vanishes_the_other_is_closed(tmp_path: Path, leaver: str) -> None:
    async def run() -> None:
        async with _relayed(tmp_path) as (front, peer, _):
            reader, writer = await asyncio.open_unix_connection(front.path)
            inner_reader, inner_writer = await peer.accept()
            sides = {"front": (reader, writer), "inner": (inner_reader, inner_writer)}
            _, gone = sides.pop(leaver)
            ((stays_reader, stays_writer),) = sides.values()
            gone.transport.abort()
            assert await asyncio.wait_for(stays_reader.read(), 10) == b""
            stays_writer.close()

    asyncio.run(run())


def test_what_was_sent_before_leaving_is_still_delivered(tmp_path: Path) -> None:
    async def run() -> None:
        async with _relayed(tmp_path) as (front, peer, _):
            _, writer = await asyncio.open_unix_connection(front.path)
            writer.write(b"x" * 3_000_000)
            writer.close()
            inner_reader, inner_writer = await peer.accept()
            assert len(await asyncio.wait_for(inner_reader.read(), 10)) == 3_000_000
            inner_writer.close()

    asyncio.run(run())


def test_nobody_behind_it_closes_the_connection_at_once(tmp_path: Path) -> None:
    async def run() -> None:
        relay = Relay(UnixAddress(str(tmp_path / "front")), UnixAddress(str(tmp_path / "nobody")))
        await relay.start()
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "front"))
        assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()
        await _none_left(relay)
        await relay.close()

    asyncio.run(run())


def test_a_peer_that_is_not_allowed_is_closed_and_never_reaches_the_inside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        async with _Peer(tmp_path / "inner") as peer:
            front = UnixAddress(str(tmp_path / "front"))
            relay = Relay(front, peer.address, is_allowed=lambda _: False)
            await relay.start()
            for _ in range(5):
                reader, writer = await asyncio.open_unix_connection(front.path)
                try:
                    assert await asyncio.wait_for(reader.read(), 10) == b""
                except ConnectionResetError:
                    pass
                writer.close()
            await _none_left(relay)
            assert peer._accepted.empty()
            await relay.close()

    asyncio.run(run())
    assert [record.getMessage() for record in caplog.records] == [
        f"refused a connection to unix:{tmp_path}/front from a peer that is not the host"
    ]


def test_refusals_name_the_cid_and_are_counted_not_repeated(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = 0.0
    refusals = RefusalLog(VsockAddress(8888), clock=lambda: now)
    for _ in range(3):
        refusals.refused((1, 4000))
    now = 60.0
    refusals.refused((5, 4001))
    assert [record.getMessage() for record in caplog.records] == [
        "refused a connection to vsock:8888 from CID 1",
        "refused a connection to vsock:8888 from CID 5 (and 2 more before)",
    ]


def test_closing_the_relay_cuts_its_connections_and_removes_its_socket(tmp_path: Path) -> None:
    async def run() -> None:
        async with _Peer(tmp_path / "inner") as peer:
            front = UnixAddress(str(tmp_path / "front"))
            relay = Relay(front, peer.address)
            await relay.start()
            reader, writer = await asyncio.open_unix_connection(front.path)
            _, inner_writer = await peer.accept()
            await relay.close()
            assert await asyncio.wait_for(reader.read(), 10) == b""
            assert not Path(front.path).exists()
            writer.close()
            inner_writer.close()

    asyncio.run(run())


def test_an_inherited_socket_goes_on_listening_for_the_next(tmp_path: Path) -> None:
    async def run() -> None:
        async with _Peer(tmp_path / "inner") as peer:
            front = UnixAddress(str(tmp_path / "front"))
            with socket.socket(fileno=open_listener(front)) as kept:
                relay = Relay(front, peer.address, inherited=os.dup(kept.fileno()))
                await relay.start()
                relay.stop_accepting()
                client = await connect(front)
                client.send(b"who is next?")
                await relay.close()
                relay = Relay(front, peer.address, inherited=os.dup(kept.fileno()))
                await relay.start()
                reader, writer = await peer.accept()
                assert await reader.readexactly(12) == b"who is next?"
                writer.close()
                client.close()
                await relay.close()

    asyncio.run(run())


def test_many_connections_at_once_all_get_through_a_small_backlog(tmp_path: Path) -> None:
    async def run() -> None:
        async with _relayed(tmp_path) as (front, peer, relay):
            clients = [connect(front) for _ in range(300)]
            sockets = await asyncio.gather(*clients)
            inner = [await peer.accept() for _ in sockets]
            assert relay.connections == 300
            for one in sockets:
                one.close()
            for _, writer in inner:
                writer.close()

    asyncio.run(run())


def test_a_socket_in_use_is_not_taken_away(tmp_path: Path) -> None:
    address = UnixAddress(str(tmp_path / "taken"))
    listener = socket.socket(fileno=open_listener(address))
    with listener, pytest.raises(OSError, match="in use") as caught:
        open_listener(address)
    assert caught.value.errno == errno.EADDRINUSE


def test_a_socket_left_behind_is_replaced_and_is_for_its_owner_only(tmp_path: Path) -> None:
    address = UnixAddress(str(tmp_path / "left"))
    os.close(open_listener(address))
    with socket.socket(fileno=open_listener(address)):
        assert Path(address.path).stat().st_mode & 0o777 == 0o600


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("precious")
    remove_stale_socket(str(path))
    with pytest.raises(OSError, match="in use"):
        open_listener(UnixAddress(str(path)))
    assert path.read_text() == "precious"


def test_connecting_to_nobody_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        asyncio.run(connect(UnixAddress(str(tmp_path / "nobody"))))
    (tmp_path / "stale").touch()
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "closed"))
    server.close()
    with pytest.raises(ConnectionRefusedError):
        asyncio.run(connect(UnixAddress(str(tmp_path / "closed"))))
