"""The host's listeners, and its relay to the guest's ports, over real gRPC and unix sockets."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc.aio
import pytest

from agent.pb import (
    common_pb2,
    tremplin_pb2,
    tremplin_pb2_grpc,
    vm_crash_pb2,
    vm_crash_pb2_grpc,
    vm_host_pb2,
    vm_host_pb2_grpc,
)
from host.errors import HostError
from host.listeners import Listeners
from host.vsock import GuestPortRelay, UserVsock, check_socket_path


def test_listeners_record_calls_of_all_services(tmp_path: Path) -> None:
    """Each service answers on its own port, and each call becomes an event."""

    async def scene() -> None:
        async with Listeners(UserVsock(tmp_path / "v")) as recorder:
            ready = asyncio.create_task(recorder.wait_for("VmReady"))
            async with grpc.aio.insecure_channel(f"unix:{tmp_path}/v_7777") as channel:
                startup = vm_host_pb2_grpc.StartupListenerStub(channel)
                await startup.VmReady(common_pb2.EmptyMessage())
            await ready
            async with grpc.aio.insecure_channel(f"unix:{tmp_path}/v_7779") as channel:
                crash = vm_crash_pb2_grpc.CrashListenerStub(channel)
                await crash.SendFailureReport(vm_crash_pb2.FailureReport(failed_process="lxcfs"))
            async with grpc.aio.insecure_channel(f"unix:{tmp_path}/v_9999") as channel:
                logs = vm_host_pb2_grpc.LogCollectorStub(channel)
                record = vm_host_pb2.LogRecord(severity=vm_host_pb2.INFO, content=b"hello")
                for _ in range(2):  # the guest repeats a call whose answer it has not got
                    await logs.CollectUserLogs(vm_host_pb2.LogRequest(records=[record]))
            assert [event.call for event in recorder.events] == ["VmReady", "SendFailureReport"]
            assert recorder.of("SendFailureReport")[0].failed_process == "lxcfs"
            assert [record.content for record in recorder.logs] == [b"hello"]

    asyncio.run(scene())


def test_handler_runs_before_the_answer_and_others_are_served_meanwhile(tmp_path: Path) -> None:
    """A host may call the guest from inside a call of the guest."""

    async def scene() -> None:
        async with (
            Listeners(UserVsock(tmp_path / "v")) as recorder,
            grpc.aio.insecure_channel(f"unix:{tmp_path}/v_7778") as channel,
        ):
            stub = tremplin_pb2_grpc.TremplinListenerStub(channel)
            go_on = asyncio.Event()

            async def handle(_: object) -> None:
                await go_on.wait()

            recorder.handle("TremplinReady", handle)
            call = asyncio.ensure_future(stub.TremplinReady(tremplin_pb2.TremplinStartupInfo()))
            await recorder.wait_for("TremplinReady")
            progress = tremplin_pb2.ContainerCreationProgress(container_name="penguin")
            await stub.UpdateCreateStatus(progress)
            assert not call.done()
            go_on.set()
            await call
            waited = await recorder.wait_for(
                "UpdateCreateStatus", lambda message: message.container_name == "penguin", since=1
            )
            assert waited == progress

    asyncio.run(scene())


class _Daemon:
    """The unix side of vhost-device-vsock, with one guest port that answers in capitals."""

    def __init__(self, path: Path) -> None:
        self.path = path

    async def __aenter__(self) -> None:
        self._server = await asyncio.start_unix_server(self._accept, path=str(self.path))

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await reader.readline() == b"CONNECT 8888\n":
            writer.write(b"OK 8888\n")
            while data := await reader.read(100):
                writer.write(data.upper())
        writer.close()


def test_relay_joins_a_unix_socket_to_a_port_of_the_guest(tmp_path: Path) -> None:
    """Bytes pass both ways, and the end of one direction is passed on."""

    async def scene() -> None:
        vsock = UserVsock(tmp_path / "v")
        async with (
            _Daemon(tmp_path / "v"),
            GuestPortRelay(vsock, 8888, tmp_path / "m.sock"),
            GuestPortRelay(vsock, 1, tmp_path / "none.sock"),
        ):
            reader, writer = await asyncio.open_unix_connection(str(tmp_path / "m.sock"))
            writer.write(b"hello")
            assert await reader.readexactly(5) == b"HELLO"
            writer.write_eof()
            assert await reader.read() == b""
            writer.close()
            with pytest.raises(ConnectionRefusedError, match="nobody listens on vsock port 1"):
                await vsock.connect(1)
            reader, writer = await asyncio.open_unix_connection(str(tmp_path / "none.sock"))
            assert await reader.read() == b""
            writer.close()
        assert not (tmp_path / "m.sock").exists()

    asyncio.run(scene())


def test_long_socket_path() -> None:
    """107 bytes are a path, 108 are an error."""
    check_socket_path(Path("/" + "x" * 106))
    with pytest.raises(HostError, match="longer than 107 bytes"):
        check_socket_path(Path("/" + "x" * 107))
