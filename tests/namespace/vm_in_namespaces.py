"""The real PID 1 and maitred in PID, mount and network namespaces of their own, and a host that
listens for them: what a VM is, without the VM.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import grpc
import grpc.aio

from agent.pb import (
    common_pb2,
    vm_crash_pb2,
    vm_crash_pb2_grpc,
    vm_guest_pb2,
    vm_guest_pb2_grpc,
    vm_host_pb2_grpc,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence

ROOT = Path(__file__).resolve().parents[2]
PRIVATE_FILES = """
mount -t tmpfs tmpfs /run
for d in etc home var; do
    mkdir -p /run/over/$d/upper /run/over/$d/work
    mount -t overlay overlay /$d \\
        -o lowerdir=/$d,upperdir=/run/over/$d/upper,workdir=/run/over/$d/work
done
mkdir /run/dev
for name in null zero urandom tty; do
    touch /run/dev/$name
    mount --bind /dev/$name /run/dev/$name
done
mount --rbind /run/dev /dev
"""
"""For `before`: what is written below these directories stays in the namespaces."""

PRIVATE_ROOT = """
mount -t tmpfs tmpfs /run
mkdir -p /run/over/upper /run/over/work /run/root
mount -t overlay overlay /run/root -o lowerdir=/,upperdir=/run/over/upper,workdir=/run/over/work
mount -t proc proc /run/root/proc
mount -t tmpfs tmpfs /run/root/dev
for name in null zero urandom tty; do
    touch /run/root/dev/$name
    mount --bind /dev/$name /run/root/dev/$name
done
mkdir -p "/run/root$DIRECTORY"
mount --bind "$DIRECTORY" "/run/root$DIRECTORY"
cd /run/root
set -- chroot . env -C "$PWD_OF_AGENT" "$@"
"""
"""For `before`: nothing that is written anywhere leaves the namespaces, but in the directory."""

EMPTY = common_pb2.EmptyMessage()


class Host(vm_host_pb2_grpc.StartupListenerServicer, vm_crash_pb2_grpc.CrashListenerServicer):
    """The host's listeners, which put down what they are told."""

    def __init__(self) -> None:
        self.ready = 0
        self.is_ready = asyncio.Event()
        self.crashes: asyncio.Queue[str] = asyncio.Queue()
        self.inside_vm_ready: Callable[[], Awaitable[None]] | None = None
        """What a host does before it answers VmReady."""

    async def VmReady(self, request: common_pb2.EmptyMessage, context: object) -> Any:
        """From the guest: maitred listens."""
        self.ready += 1
        if self.inside_vm_ready:
            await self.inside_vm_ready()
        self.is_ready.set()
        return EMPTY

    async def SendFailureReport(self, request: vm_crash_pb2.FailureReport, context: object) -> Any:
        """From the guest: a process that is respawned has ended."""
        await self.crashes.put(request.failed_process)
        return EMPTY


class Vm:
    """`async with Vm(directory) as vm:`, ready when it is entered.

    before: a shell script run in the namespaces before PID 1 starts; options: more of them.
    """

    def __init__(self, directory: Path, *, before: str = "", options: Sequence[str] = ()) -> None:
        self.directory = directory
        self.run_dir = directory / "run"
        self.host = Host()
        self._before = before
        self._options = [
            "maitred.setup=no",
            f"maitred.listen=unix:{directory}/maitred.sock",
            f"maitred.startup_listener=unix:{directory}/host.sock",
            f"maitred.crash_listener=unix:{directory}/host.sock",
            f"maitred.run_dir={self.run_dir}",
            f"maitred.startup_dir={directory}/startup",
            f"maitred.resolv_conf={directory}/resolv.conf",
            f"maitred.stateful_dir={directory}/stateful",
            *options,
        ]

    async def __aenter__(self) -> Self:
        self.server = grpc.aio.server()
        vm_host_pb2_grpc.add_StartupListenerServicer_to_server(self.host, self.server)
        vm_crash_pb2_grpc.add_CrashListenerServicer_to_server(self.host, self.server)
        self.server.add_insecure_port(f"unix:{self.directory}/host.sock")
        await self.server.start()
        self.channel = grpc.aio.insecure_channel(
            f"unix:{self.directory}/maitred.sock", options=[("grpc.use_local_subchannel_pool", 1)]
        )
        self.maitred = vm_guest_pb2_grpc.MaitredStub(self.channel)
        self.console = self.directory / "console"
        script = f'{self._before}\nexec "$@"'
        with self.console.open("wb") as console:
            self.process = subprocess.Popen(  # noqa: ASYNC220  # forks once, before anything waits
                [
                    *("unshare", "-m", "-n", "-p", "-f", "--mount-proc", "--kill-child"),
                    *("sh", "-e", "-c", script, "sh"),
                    *(sys.executable, "-m", "agent.process_supervisor", *self._options),
                ],
                cwd=ROOT,
                env={**os.environ, "DIRECTORY": str(self.directory), "PWD_OF_AGENT": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stderr=console,
            )
        try:
            async with asyncio.timeout(30):
                await self.host.is_ready.wait()
        except TimeoutError:
            await self.__aexit__()
            raise AssertionError(f"no VmReady: {self.console.read_text()}") from None
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()
        self.process.kill()
        self.process.wait()
        await self.server.stop(None)

    @property
    def init_pid(self) -> int:
        """PID 1 of the namespaces, as seen from here."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return int(children.split()[0])

    def processes(self) -> dict[int, list[str]]:
        """The command lines of PID 1's children, by pid as seen from here."""
        init = self.init_pid
        found = {}
        for pid in Path(f"/proc/{init}/task/{init}/children").read_text().split():
            with contextlib.suppress(OSError):  # it has ended in the meantime
                found[int(pid)] = _command_line(Path(f"/proc/{pid}"))
        return found

    def pid_of(self, word: str) -> int:
        """The child of PID 1 that has this word in its command line."""
        (pid,) = [pid for pid, argv in self.processes().items() if word in argv]
        return pid

    async def pids_of(self, *words: str) -> list[int]:
        """As pid_of(), as soon as there is a child for each word: one that is about to execute its
        program has the command line of PID 1.
        """
        async with asyncio.timeout(30):
            while True:
                try:
                    return [self.pid_of(word) for word in words]
                except ValueError:
                    await asyncio.sleep(0.01)

    async def restart_maitred(self) -> None:
        """SIGKILL for maitred; returns when PID 1's next one serves calls."""
        before = self.pid_of("agent.maitred")
        os.kill(before, signal.SIGKILL)
        async with asyncio.timeout(30):
            while True:
                try:
                    await self.maitred.LaunchProcess(
                        vm_guest_pb2.LaunchProcessRequest(argv=["true"], wait_for_exit=True),
                        wait_for_ready=True,
                    )
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.UNAVAILABLE:
                        raise
                else:
                    if before not in self.processes():
                        return

    def inside(self, *argv: str) -> str:
        """The output of a program in the namespaces."""
        enter = ("nsenter", "-t", str(self.init_pid), "-m", "-n", "-p", "-r")
        done = subprocess.run([*enter, *argv], capture_output=True, text=True, check=True)
        return done.stdout

    def ip(self, *words: str) -> Any:
        """The JSON that the ip command prints in the namespaces."""
        return json.loads(self.inside("ip", "-j", "-d", *words) or "[]")


def in_vm(
    directory: Path,
    scenario: Callable[[Vm], Coroutine[Any, Any, None]],
    *,
    before: str = "",
    options: Sequence[str] = (),
) -> None:
    """Runs a scenario in a VM of its own; the console is shown when it fails."""

    async def run() -> None:
        async with Vm(directory, before=before, options=options) as vm:
            try:
                await scenario(vm)
            except BaseException:
                sys.stderr.write(vm.console.read_text(errors="replace"))
                raise
            console = vm.console.read_text(errors="replace")
            assert "Traceback" not in console, console

    asyncio.run(run())


def _command_line(process: Path) -> list[str]:
    """Of a process, none of one that is dead. It has none either while execve(2) builds its new
    memory, at the beginning of which vfork(2) already lets its parent go on: that is waited for.
    """
    while not (text := (process / "cmdline").read_text()):
        if (process / "stat").read_text().rpartition(")")[2].split()[0] in {"Z", "X"}:
            break
        time.sleep(0.001)
    return text.split("\0")[:-1]


async def refusal(call: Awaitable[Any]) -> tuple[grpc.StatusCode, str]:
    """Status and details of a call that must be refused."""
    try:
        answer = await call
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    raise AssertionError(f"not refused: {answer}")


def fixed32(address: str) -> int:
    """An IPv4 address as it stands in IPv4Config on the wire."""
    return int.from_bytes(bytes(map(int, address.split("."))), "little")
