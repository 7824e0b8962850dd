"""A real gRPC server and channel on addresses of every kind a development machine has."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import grpc
import pytest

from agent.grpc_endpoint import HostChannel, Listener, listen, prepare_run_dir
from agent.options import UnixAddress
from agent.pb import common_pb2, vm_host_pb2_grpc
from agent.relay import Relay


class _Listener(vm_host_pb2_grpc.StartupListenerServicer):
    async def VmReady(
        self, request: common_pb2.EmptyMessage, context: object
    ) -> common_pb2.EmptyMessage:
        return common_pb2.EmptyMessage()


async def _serve(path: Path) -> Listener:
    server = grpc.aio.server()
    vm_host_pb2_grpc.add_StartupListenerServicer_to_server(_Listener(), server)
    address = UnixAddress(str(path))
    return await listen(server, address, run_dir="/nonexistent", name="unused", inherited={})


async def _call(channel: grpc.aio.Channel, seconds: float = 10) -> None:
    stub = vm_host_pb2_grpc.StartupListenerStub(channel)
    await stub.VmReady(common_pb2.EmptyMessage(), timeout=seconds)


def test_a_call_goes_through_and_the_socket_is_private(tmp_path: Path) -> None:
    async def run() -> None:
        listener = await _serve(tmp_path / "s")
        assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600
        channel = HostChannel(UnixAddress(str(tmp_path / "s")), run_dir="/none", name="unused")
        async with channel as open_channel:
            await _call(open_channel)
        await listener.stop(None)

    asyncio.run(run())


def test_a_call_through_the_relay_survives_a_restart_of_the_server(tmp_path: Path) -> None:
    async def run() -> None:
        relay = Relay(UnixAddress(str(tmp_path / "front")), UnixAddress(str(tmp_path / "inner")))
        await relay.start()
        host = HostChannel(UnixAddress(str(tmp_path / "front")), run_dir="/none", name="unused")
        async with host as channel:
            before = time.monotonic()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await _call(channel)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert time.monotonic() - before < 3
            for _ in range(2):
                listener = await _serve(tmp_path / "inner")
                async with asyncio.timeout(10):
                    while True:
                        try:
                            await _call(channel)
                            break
                        except grpc.aio.AioRpcError as error:
                            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                                raise
                await listener.stop(None)
        await relay.close()

    asyncio.run(run())


def test_a_second_server_on_the_same_socket_is_an_error(tmp_path: Path) -> None:
    async def run() -> None:
        listener = await _serve(tmp_path / "s")
        with pytest.raises(OSError, match="in use"):
            await _serve(tmp_path / "s")
        await listener.stop(None)

    asyncio.run(run())


def test_a_directory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="cannot listen on unix:"):
        asyncio.run(_serve(tmp_path / "none" / "s"))


def test_the_run_directory_is_made_private(tmp_path: Path) -> None:
    path = tmp_path / "a" / "run"
    prepare_run_dir(str(path))
    path.chmod(0o755)
    prepare_run_dir(str(path))
    assert path.stat().st_mode & 0o777 == 0o700


def test_a_run_directory_of_somebody_else_or_a_link_is_refused(tmp_path: Path) -> None:
    somebody_elses = Path("/")
    if os.geteuid() == 0:
        somebody_elses = tmp_path / "run"
        somebody_elses.mkdir()
        os.chown(somebody_elses, 12345, 12345)
    with pytest.raises(PermissionError, match=r"belongs to uid (12345|0)$"):
        prepare_run_dir(str(somebody_elses))
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(NotADirectoryError):
        prepare_run_dir(str(tmp_path / "link"))
