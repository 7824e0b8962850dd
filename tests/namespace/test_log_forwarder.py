"""The log forwarder as maitred starts it: syslog(3) on a socket, a host that comes and goes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from agent.pb import vm_guest_pb2, vm_host_pb2, vm_host_pb2_grpc
from tests.namespace.vm_in_namespaces import EMPTY, Vm, in_vm

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


class _Collector(vm_host_pb2_grpc.LogCollectorServicer):
    def __init__(self) -> None:
        self.user: list[vm_host_pb2.LogRecord] = []
        self.kernel: list[vm_host_pb2.LogRecord] = []
        self.arrived = asyncio.Condition()

    async def _take(self, request: vm_host_pb2.LogRequest, where: list[Any]) -> Any:
        async with self.arrived:
            where.extend(request.records)
            self.arrived.notify_all()
        return EMPTY

    async def CollectUserLogs(self, request: vm_host_pb2.LogRequest, context: object) -> Any:
        return await self._take(request, self.user)

    async def CollectKernelLogs(self, request: vm_host_pb2.LogRequest, context: object) -> Any:
        return await self._take(request, self.kernel)

    async def wait_for(self, content: bytes) -> None:
        async with asyncio.timeout(60), self.arrived:
            await self.arrived.wait_for(lambda: self.user and self.user[-1].content == content)

    @contextlib.asynccontextmanager
    async def listening(self, path: Path) -> AsyncIterator[None]:
        server = grpc.aio.server()
        vm_host_pb2_grpc.add_LogCollectorServicer_to_server(self, server)
        server.add_insecure_port(f"unix:{path}")
        await server.start()
        try:
            yield
        finally:
            await server.stop(None)


def _options(directory: Path) -> list[str]:
    return [f"maitred.log_collector=unix:{directory}/logs", f"maitred.syslog={directory}/log"]


@contextlib.asynccontextmanager
async def _log_socket(directory: Path) -> AsyncIterator[socket.socket]:
    path = directory / "log"
    async with asyncio.timeout(30):
        while not path.exists():
            await asyncio.sleep(0.01)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        while True:
            try:
                log.connect(str(path))
            except (ConnectionRefusedError, FileNotFoundError, PermissionError):
                await asyncio.sleep(0.01)
            else:
                break
        yield log


def test_50000_lines_in_a_burst_arrive_complete_and_in_order(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        collector = _Collector()
        async with collector.listening(tmp_path / "logs"), _log_socket(tmp_path) as log:

            def burst() -> None:
                for number in range(50_000):
                    log.send(b"<%d>app[7]: line %d" % (8 + number % 8, number))

            await asyncio.to_thread(burst)
            await collector.wait_for(b"app[7]: line 49999")
        assert [one.content for one in collector.user] == [
            b"app[7]: line %d" % number for number in range(50_000)
        ]
        assert [one.severity for one in collector.user[:8]] == list(range(1, 9))

    in_vm(tmp_path, scenario, options=_options(tmp_path))


def test_the_systems_logger_is_understood(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        collector = _Collector()
        async with collector.listening(tmp_path / "logs"), _log_socket(tmp_path):
            argv = ["logger", "-u", f"{tmp_path}/log", "-p", "local0.err", "-t", "me", "grün\tx"]
            await asyncio.to_thread(subprocess.run, argv, check=True)
            await collector.wait_for("me: grün\\x09x".encode())
        (record,) = collector.user
        assert record.severity == vm_host_pb2.ERROR

    in_vm(tmp_path, scenario, options=_options(tmp_path))


def test_what_was_logged_while_the_host_was_away_comes_later(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        collector = _Collector()
        async with _log_socket(tmp_path) as log:
            for number in range(2000):
                log.send(b"<13>a: %d" % number)
            async with collector.listening(tmp_path / "logs"):
                await collector.wait_for(b"a: 1999")
            await asyncio.to_thread(lambda: [log.send(b"<13>b: %d" % n) for n in range(2000)])
            async with collector.listening(tmp_path / "logs"):
                await collector.wait_for(b"b: 1999")
        expected = [b"%s: %d" % (name, number) for name in (b"a", b"b") for number in range(2000)]
        # A batch whose answer was cut off is sent again: nothing is missing, order stays.
        assert list(dict.fromkeys(one.content for one in collector.user)) == expected

    in_vm(tmp_path, scenario, options=_options(tmp_path))


class _FailingCollector(_Collector):
    """Notes each call, and fails those with a certain line in them, a few times."""

    def __init__(self, code: grpc.StatusCode, *, line: bytes, times: int) -> None:
        super().__init__()
        self.calls: list[list[bytes]] = []
        self._code = code
        self._line = line
        self._times = times

    async def CollectUserLogs(self, request: vm_host_pb2.LogRequest, context: Any) -> Any:
        contents = [one.content for one in request.records]
        async with self.arrived:
            self.calls.append(contents)
            self.arrived.notify_all()
        if self._line in contents and self._times:
            self._times -= 1
            await context.abort(self._code, "on purpose")
        return await self._take(request, self.user)

    async def called(self, times: int) -> None:
        async with asyncio.timeout(60), self.arrived:
            await self.arrived.wait_for(lambda: len(self.calls) >= times)


def test_a_batch_whose_answer_was_lost_is_sent_again_as_it_was(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        collector = _FailingCollector(grpc.StatusCode.UNAVAILABLE, line=b"same", times=4)
        async with collector.listening(tmp_path / "logs"), _log_socket(tmp_path) as log:
            for _ in range(3):
                log.send(b"<13>Jan  1 00:00:00 same")
            log.send(b"<13>last")
            await collector.wait_for(b"last")
        assert collector.calls[:4] == [collector.calls[0]] * 4
        assert [one.content for one in collector.user] == [b"same"] * 3 + [b"last"]
        times = [(one.timestamp.seconds, one.timestamp.nanos) for one in collector.user]
        assert times[0] < times[1] < times[2]

    in_vm(tmp_path, scenario, options=_options(tmp_path))


def test_a_batch_that_the_host_refuses_does_not_hold_up_the_others(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        collector = _FailingCollector(grpc.StatusCode.INTERNAL, line=b"bad", times=99)
        async with collector.listening(tmp_path / "logs"), _log_socket(tmp_path) as log:
            log.send(b"<13>bad")
            await collector.called(3)
            log.send(b"<13>good")
            await collector.wait_for(b"good")
        assert collector.calls[:3] == [[b"bad"]] * 3
        notice, good = collector.user
        assert notice.content.startswith(b"log forwarder: 1 records are missing here")
        assert good.content == b"good"

    in_vm(tmp_path, scenario, options=_options(tmp_path))


def test_what_had_no_room_is_counted_and_said(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        collector = _Collector()
        async with _log_socket(tmp_path) as log:
            big = b"x" * 8000

            def burst() -> None:
                for number in range(3000):
                    log.send(b"<13>%d %s" % (number, big))

            await asyncio.to_thread(burst)
            log.send(b"<13>last")
            async with collector.listening(tmp_path / "logs"):
                await collector.wait_for(b"last")
        contents = [one.content for one in collector.user]
        (notice,) = [one for one in contents if one.startswith(b"log forwarder: ")]
        missing = int(notice.split()[2])
        assert missing > 0
        assert missing + len(set(contents)) - 2 == 3000

    in_vm(tmp_path, scenario, options=_options(tmp_path))


def test_the_last_words_arrive_before_the_end(tmp_path: Path) -> None:
    async def scenario(vm: Vm) -> None:
        collector = _Collector()
        async with collector.listening(tmp_path / "logs"), _log_socket(tmp_path) as log:
            log.send(b"<13>first")
            await collector.wait_for(b"first")
            log.send(b"<13>last words")
            await vm.maitred.Shutdown(EMPTY)
            assert await asyncio.to_thread(vm.process.wait, 30) == 0
        assert [one.content for one in collector.user] == [b"first", b"last words"]
        assert vm.console.read_text().splitlines()[-1].endswith("init: exit: clean")

    in_vm(tmp_path, scenario, options=_options(tmp_path))


def test_what_others_log_while_they_end_arrives_too(tmp_path: Path) -> None:
    """The log forwarder is the last to be stopped."""
    end = f"sleep 1; logger -u {tmp_path}/log -t last goodbye; exit"

    async def scenario(vm: Vm) -> None:
        collector = _Collector()
        async with collector.listening(tmp_path / "logs"), _log_socket(tmp_path):
            script = f"trap '{end}' TERM; logger -u {tmp_path}/log hello; while :; do sleep 1; done"
            request = vm_guest_pb2.LaunchProcessRequest(argv=["sh", "-c", script], respawn=True)
            await vm.maitred.LaunchProcess(request)
            async with asyncio.timeout(60), collector.arrived:
                await collector.arrived.wait_for(lambda: collector.user)
            await vm.maitred.Shutdown(EMPTY)
            assert await asyncio.to_thread(vm.process.wait, 30) == 0
        assert collector.user[-1].content == b"last: goodbye"

    in_vm(tmp_path, scenario, options=_options(tmp_path))
