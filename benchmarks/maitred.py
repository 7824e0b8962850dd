"""maitred's calls, its log forwarder and its remote shell, beside the least that could do it."""

from __future__ import annotations

import asyncio
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import grpc.aio

from agent.pb import vm_guest_pb2, vm_guest_pb2_grpc, vm_host_pb2, vm_host_pb2_grpc, vsh_pb2
from benchmarks.figures import Figure
from host import shell
from host.build_files import BUILD_DIR, GuestImage
from host.commands import run_in_guest
from host.vm import Vm as EmulatedVm
from host.vsock import GuestPortRelay
from tests.namespace.vm_in_namespaces import EMPTY, ROOT, Vm

_CALLS = 2000
_LAUNCHES = 200
_LINES = 50_000
_SHELL_BYTES = 64 << 20
_VM_CALLS = 300
_VM_BYTES = 8 << 20
_ECHO_PORT = 5555
_BARE_PORT = 5556
_STALL_SECONDS = 30.0
_STALLS_MAX = 5

_OURS = "maitred"
_BARE = "bare grpc.aio server"
_BARE_RELAYED = "the same behind the relay"
_ECHOED = "bare echo over vsock"

# arguments: its unix socket, and where a relay like maitred's joins others to it: a path or a port
_BARE_SERVER = """
import asyncio, os, sys
import grpc.aio
from agent.options import UnixAddress, VsockAddress
from agent.pb import vm_guest_pb2, vm_guest_pb2_grpc
from agent.relay import Relay

class Bare(vm_guest_pb2_grpc.MaitredServicer):
    async def GetKernelVersion(self, request, context):
        kernel = os.uname()
        return vm_guest_pb2.GetKernelVersionResponse(
            kernel_release=kernel.release, kernel_version=kernel.version
        )

async def main():
    server = grpc.aio.server()
    vm_guest_pb2_grpc.MaitredServicer.__abstractmethods__ = frozenset()
    vm_guest_pb2_grpc.add_MaitredServicer_to_server(Bare(), server)
    path, *relayed = sys.argv[1:]
    server.add_insecure_port("unix:" + path)
    await server.start()
    for where in relayed:
        listen = VsockAddress(int(where)) if where.isdigit() else UnixAddress(where)
        await Relay(listen, UnixAddress(path)).start()
    await server.wait_for_termination()

asyncio.run(main())
"""

_ECHO = f"""
import socket
server = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
server.bind((socket.VMADDR_CID_ANY, {_ECHO_PORT}))
server.listen()
while True:
    peer, _ = server.accept()
    with peer:
        try:
            while data := peer.recv(65536):
                peer.sendall(data)
        except OSError:
            pass
"""


def run() -> Iterator[Figure]:
    """The figures, those of namespaces first, then those of an emulated VM."""
    with tempfile.TemporaryDirectory(prefix="termina-bench-") as directory:
        yield from asyncio.run(_in_namespaces(Path(directory)))
    yield from asyncio.run(_in_vm())


async def _p50(call: Callable[[], Awaitable[Any]], count: int) -> float:
    """Median of the milliseconds that a call takes, after a tenth of them to warm up."""
    times = []
    for number in range(count + count // 10):
        started = time.perf_counter()
        await call()
        if number >= count // 10:
            times.append(time.perf_counter() - started)
    return statistics.median(times) * 1000


async def _alternating_p50(
    calls: Mapping[str, Callable[[], Awaitable[Any]]], count: int
) -> dict[str, float | None]:
    """Medians, measured in turns, so that whatever else the machine does hits all of them."""
    turns = [
        {name: await _p50(call, count // 10) for name, call in calls.items()} for _ in range(10)
    ]
    return {name: statistics.median(turn[name] for turn in turns) for name in calls}


# ---- in namespaces of this machine --------------------------------------------------------------


class _Collector(vm_host_pb2_grpc.LogCollectorServicer):
    def __init__(self) -> None:
        self.count = 0
        self.all = asyncio.Event()

    async def CollectUserLogs(self, request: vm_host_pb2.LogRequest, _context: object) -> Any:  # noqa: N802
        """From the guest."""
        self.count += len(request.records)
        if self.count >= _LINES:
            self.all.set()
        return EMPTY

    async def CollectKernelLogs(self, _request: vm_host_pb2.LogRequest, _context: object) -> Any:  # noqa: N802
        """From the guest."""
        return EMPTY


async def _in_namespaces(directory: Path) -> list[Figure]:
    options = [
        f"maitred.log_collector=unix:{directory}/logs",
        f"maitred.syslog={directory}/log",
        f"maitred.shell_listen=unix:{directory}/shell.sock",
    ]
    async with Vm(directory, options=options) as vm:
        return [
            await _null_call(vm),
            await _launch(vm),
            await _logs(vm),
            await _shell(vm),
        ]


async def _null_call(vm: Vm) -> Figure:
    plain, relayed = vm.directory / "bare.sock", vm.directory / "relayed.sock"
    bare = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", _BARE_SERVER, plain, relayed], cwd=ROOT
    )
    try:
        async with (
            grpc.aio.insecure_channel(f"unix:{plain}") as to_plain,
            grpc.aio.insecure_channel(f"unix:{relayed}") as to_relayed,
        ):
            stubs = {
                _OURS: vm.maitred,
                _BARE_RELAYED: vm_guest_pb2_grpc.MaitredStub(to_relayed),
                _BARE: vm_guest_pb2_grpc.MaitredStub(to_plain),
            }
            await to_plain.channel_ready()
            await to_relayed.channel_ready()
            values = await _alternating_p50(_null_calls(stubs), _CALLS)
    finally:
        bare.kill()
        bare.wait()
    return Figure("null call, p50", values, "ms", "≤ 1.2 ×", _is_within(values, 1.2))


def _null_calls(
    stubs: Mapping[str, vm_guest_pb2_grpc.MaitredAsyncStub],
) -> dict[str, Callable[[], Awaitable[Any]]]:
    return {name: partial(stub.GetKernelVersion, EMPTY) for name, stub in stubs.items()}


def _is_within(values: Mapping[str, float | None], times: float) -> bool:
    """Whether ours reaches the goal, on the same transport."""
    ours, theirs = values[_OURS], values[_BARE_RELAYED]
    assert ours is not None
    assert theirs is not None
    return ours <= times * theirs


async def _launch(vm: Vm) -> Figure:
    request = vm_guest_pb2.LaunchProcessRequest(argv=["/bin/true"], wait_for_exit=True)

    async def bare() -> None:
        process = await asyncio.create_subprocess_exec("/bin/true")
        await process.wait()

    values = await _alternating_p50(
        {_OURS: partial(vm.maitred.LaunchProcess, request), "asyncio subprocess": bare}, _LAUNCHES
    )
    return Figure("LaunchProcess, wait_for_exit, /bin/true, p50", values, "ms")


async def _logs(vm: Vm) -> Figure:
    collector = _Collector()
    server = grpc.aio.server()
    vm_host_pb2_grpc.add_LogCollectorServicer_to_server(collector, server)
    server.add_insecure_port(f"unix:{vm.directory}/logs")
    await server.start()
    path = str(vm.directory / "log")
    async with asyncio.timeout(30):
        while not os.path.exists(path):
            await asyncio.sleep(0.05)

    def burst(where: str) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
            log.connect(where)
            for number in range(_LINES):
                log.send(b"<13>bench[1]: line number %d of a burst" % number)

    started = time.perf_counter()
    await asyncio.to_thread(burst, path)
    async with asyncio.timeout(120):
        await collector.all.wait()
    ours = _LINES / (time.perf_counter() - started)
    await server.stop(None)

    # The peer only receives: a datagram socket that throws everything away.
    sink = str(vm.directory / "sink")
    program = (
        "import socket, sys\n"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        "s.bind(sys.argv[1])\n"
        f"for _ in range({_LINES}): s.recv(65536)"
    )
    peer = subprocess.Popen([sys.executable, "-c", program, sink])  # noqa: ASYNC220
    while not os.path.exists(sink):
        await asyncio.sleep(0.05)
    started = time.perf_counter()
    await asyncio.to_thread(burst, sink)
    await asyncio.to_thread(peer.wait)
    theirs = _LINES / (time.perf_counter() - started)
    return Figure(
        "log lines, syslog socket to host",
        {_OURS: ours / 1000, "only received": theirs / 1000},
        "1000/s",
    )


async def _through(session: shell.Session, size: int) -> float:
    """MB/s of size bytes to a program that sends them back."""

    async def feed() -> None:
        await session.send_input(bytes(size))
        await session.send_input(b"")

    started = time.perf_counter()
    feeding = asyncio.create_task(feed())
    try:
        async for _item in session.output():
            pass
        await feeding
    finally:
        feeding.cancel()
        await session.close()
    return size / (time.perf_counter() - started) / 1e6


async def _shell(vm: Vm) -> Figure:
    path = vm.directory / "shell.sock"
    async with asyncio.timeout(30):
        while not path.exists():
            await asyncio.sleep(0.05)
    request = vsh_pb2.SetupConnectionRequest(argv=["cat"], nopty=True)
    session = await shell.open_session(await asyncio.open_unix_connection(str(path)), request)
    ours = await _through(session, _SHELL_BYTES)
    return Figure("shell, host to guest to host", {_OURS: ours}, "MB/s")


# ---- in an emulated VM --------------------------------------------------------------------------


async def _in_vm() -> list[Figure]:
    image = GuestImage.in_directory(BUILD_DIR / "image")
    with tempfile.TemporaryDirectory(prefix="termina-bench-") as directory:
        async with EmulatedVm(image, run_dir=Path(directory)) as vm:
            await vm.boot()
            await vm.ready(timeout=300)
            for words in ([_ECHO], [_BARE_SERVER, "/run/bare.sock", str(_BARE_PORT)]):
                argv = ["python3", "-I", "-c", *words]
                await vm.maitred.LaunchProcess(vm_guest_pb2.LaunchProcessRequest(argv=argv))
            await run_in_guest(vm, ["true"])
            return [await _vm_null_call(vm), await _vm_shell(vm)]


async def _connection(
    vm: EmulatedVm, port: int
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """As soon as somebody listens there."""
    async with asyncio.timeout(60):
        while True:
            try:
                return await vm.vsock.connect(port)
            except (OSError, EOFError):
                await asyncio.sleep(0.2)


async def _vm_null_call(vm: EmulatedVm) -> Figure:
    reader, writer = await _connection(vm, _ECHO_PORT)
    (await _connection(vm, _BARE_PORT))[1].close()

    async def echo() -> None:
        writer.write(b"x" * 64)
        await reader.readexactly(64)

    path = vm.run_dir / "bare"
    async with (
        GuestPortRelay(vm.vsock, _BARE_PORT, path),
        grpc.aio.insecure_channel(f"unix:{path}") as channel,
    ):
        stubs = {_OURS: vm.maitred, _BARE_RELAYED: vm_guest_pb2_grpc.MaitredStub(channel)}
        values = await _alternating_p50(_null_calls(stubs) | {_ECHOED: echo}, _VM_CALLS)
    writer.close()
    return Figure(
        "null call over vsock, emulated VM, p50",
        values,
        "ms",
        "≤ 1.2 ×",
        _is_within(values, 1.2),
    )


async def _vm_shell(vm: EmulatedVm) -> Figure:
    async def through_shell() -> float:
        request = vsh_pb2.SetupConnectionRequest(target="vm", argv=["cat"], nopty=True)
        session = await shell.open_session(await vm.vsock.connect(shell.PORT), request)
        return await _through(session, _VM_BYTES)

    async def through_echo() -> float:
        reader, writer = await _connection(vm, _ECHO_PORT)
        started = time.perf_counter()
        writer.write(bytes(_VM_BYTES))
        try:
            await reader.readexactly(_VM_BYTES)
        finally:
            writer.close()
        return _VM_BYTES / (time.perf_counter() - started) / 1e6

    turns = [(await _unstalled(through_shell), await _unstalled(through_echo)) for _ in range(3)]
    values: dict[str, float | None] = {
        _OURS: statistics.median(ours for ours, _ in turns),
        _ECHOED: statistics.median(theirs for _, theirs in turns),
    }
    return Figure("shell over vsock, emulated VM", values, "MB/s")


async def _unstalled(measure: Callable[[], Awaitable[float]]) -> float:
    """The result of measure. Over vhost-device-vsock a connection that is full in both directions
    now and then stands still for good, whoever serves it (compare rust-vmm/vhost-device, issue
    494): such a measurement is repeated, and said.
    """
    for _ in range(_STALLS_MAX):
        try:
            async with asyncio.timeout(_STALL_SECONDS):
                return await measure()
        except TimeoutError:
            print("a connection through vhost-device-vsock stood still: repeated", file=sys.stderr)
    raise TimeoutError("every connection through vhost-device-vsock stood still")
