"""One VM: starts QEMU and what it needs, talks to the agents in the guest, notices at once when
the VM is gone, and leaves nothing running behind. Knows nothing of the order in which a host
calls (host/flows.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import grpc
import grpc.aio

from agent.pb import common_pb2, tremplin_pb2_grpc, vm_guest_pb2_grpc
from host import boot_hang, paths, qemu
from host.boot_hang import BootHangsError, unless_hung
from host.children import Child, spawn
from host.console import Console
from host.errors import HostError, VmDiedError
from host.listeners import Listeners, Recorder
from host.qmp import Monitor
from host.vsock import (
    GuestPortRelay,
    KernelVsock,
    UserVsock,
    Vsock,
    check_socket_path,
    kernel_vsock_usable,
    pick_cid,
)

if TYPE_CHECKING:
    from host.build_files import GuestImage

MAITRED_PORT = 8888
TREMPLIN_PORT = 8890
SHUTDOWN_SECONDS = 30.0
"""The contract's deadline of Shutdown, and how long the VM then may take to end."""

CLEAN_LINE = "maitred: power off: clean"
"""PID 1's last words when all processes ended and all disks were unmounted; QEMU's exit code is
the same for a panic."""

_BOOTS = 3
"""As 1 of about 60 emulated boots hangs."""
_SILENCE_SECONDS = 30.0
_DAEMON_SECONDS = 5.0
_PANIC_SECONDS = 2.0  # panic=-1 ends QEMU by itself, unless it hangs in the panic
_PANIC_LOOKS = 2
_POWERED_OFF = "it powered off"
_LAST_LINE = re.compile(r"maitred: power off: .*")

_CRASHES = {-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGILL, -signal.SIGFPE}
"""How a QEMU ends that has failed itself: an assertion of its emulation does on a loaded machine,
`iotlb_to_section: Assertion ... failed`, seen once with QEMU 10.0."""

VsockChoice = Literal["auto", "kernel", "user"]
Accelerator = Literal["auto", "kvm", "tcg"]

_T = TypeVar("_T")

_CHANNEL_OPTIONS = [
    ("grpc.default_authority", "localhost"),
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


class Vm:
    """A VM and its host side; an async context manager, inside of which boot() may be called again
    and again on the same disks.
    """

    def __init__(
        self,
        image: GuestImage,
        machine: qemu.Machine | None = None,
        *,
        run_dir: Path | None = None,
        accelerator: Accelerator = "auto",
        vsock: VsockChoice = "auto",
    ) -> None:
        """image: what to boot; machine: with which devices.

        run_dir: an existing directory for sockets and logs; a temporary one when not given.
        accelerator, vsock: "auto" takes the best one that works here.
        """
        self.image = image
        self.machine = machine or qemu.Machine()
        self.cid = pick_cid()
        self.console: Console
        self.recorder: Recorder
        self.maitred: vm_guest_pb2_grpc.MaitredAsyncStub
        self.tremplin: tremplin_pb2_grpc.TremplinAsyncStub
        self.accelerator = accelerator
        self.vsock: Vsock
        self.booted_at = 0.0
        """When QEMU was started last (monotonic seconds)."""

        self.tell: Callable[[str], None] = lambda _: None
        """Called with what a user should know of, one line each."""

        self.kept_output: set[str] = set()
        """Files in the VM that host/commands.py has no more use for."""

        self._vsock_choice = vsock
        self._given_run_dir = run_dir
        self.run_dir: Path
        self._exit = contextlib.AsyncExitStack()
        self._qemu: Child | None = None
        self._daemon: Child | None = None
        self._console_server: asyncio.Server | None = None
        self._channels: list[grpc.aio.Channel] = []
        self._boot_starts_at = 0
        self._watch: asyncio.Task[None] | None = None
        self._ended = asyncio.Event()
        self._ended.set()
        self._why_ended = "it was not started"
        self._crash = ""
        """The last words of a QEMU that failed itself."""

    # ---- the host side ------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        qemu.find_qemu(self.image)  # who has none is told so before anything is made or started
        async with contextlib.AsyncExitStack() as stack:
            if self._given_run_dir is None:
                self.run_dir = Path(tempfile.mkdtemp(prefix="termina-"))
                stack.callback(shutil.rmtree, self.run_dir, ignore_errors=True)
            else:
                self.run_dir = self._given_run_dir
            self.console = Console(self.run_dir / "console.log")
            stack.callback(self.console.close)
            self.recorder = await self._open_vsock(stack)
            self.maitred_socket = self.run_dir / "maitred.sock"
            self.tremplin_socket = self.run_dir / "tremplin.sock"
            for port, path in (
                (MAITRED_PORT, self.maitred_socket),
                (TREMPLIN_PORT, self.tremplin_socket),
            ):
                await stack.enter_async_context(GuestPortRelay(self.vsock, port, path))
            if self.accelerator == "auto":
                self.accelerator = await qemu.choose_accelerator(
                    self.image, cache=paths.cache_dir() / "accelerator.json"
                )
            stack.push_async_callback(self.kill)
            self._exit = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._exit.aclose()

    async def _open_vsock(self, stack: contextlib.AsyncExitStack) -> Recorder:
        have_daemon = self.image.vsock_daemon.is_file()
        choice = self._vsock_choice
        if choice == "kernel" or (choice == "auto" and kernel_vsock_usable()):
            self.vsock = KernelVsock(self.cid, self.run_dir)
            try:
                return await stack.enter_async_context(Listeners(self.vsock))
            except HostError:
                # Another program of this machine has the ports; the daemon's are our own.
                if choice == "kernel" or not have_daemon:
                    raise
        if not have_daemon:
            raise HostError(
                f"cannot use vsock: no /dev/vhost-vsock that this user may open, and no "
                f"{self.image.vsock_daemon}; run `make image`"
            )
        self.vsock = UserVsock(check_socket_path(self.run_dir / "v"))
        return await stack.enter_async_context(Listeners(self.vsock))

    # ---- one boot -----------------------------------------------------------------------------

    async def boot(self) -> None:
        """Starts the VM; ready() tells when its agent is up.

        Raises HostError when QEMU or the vsock daemon does not start.
        """
        if not self._ended.is_set():
            raise HostError("cannot start the VM: it is running already")
        await self._clean_up()
        self._boot_starts_at = self.console.position
        self._events_start_at = len(self.recorder.events)
        self.console.panicked.clear()
        self._crash = ""
        self.kept_output.clear()
        try:
            vhost_user = await self._start_daemon() if isinstance(self.vsock, UserVsock) else None
            console = check_socket_path(self.run_dir / "serial.sock")
            console.unlink(missing_ok=True)
            self._console_server = await asyncio.start_unix_server(
                self.console.serve, path=str(console)
            )
            (self.run_dir / "qmp.sock").unlink(missing_ok=True)
            self.booted_at = time.monotonic()
            self._qemu = await spawn(
                qemu.command(
                    self.image,
                    self.machine,
                    accelerator=self.accelerator,
                    console=console,
                    qmp=check_socket_path(self.run_dir / "qmp.sock"),
                    cid=self.cid,
                    vhost_user=vhost_user,
                ),
                log=self.run_dir / "qemu.log",
            )
        except BaseException:
            await self._clean_up()
            raise
        self._ended.clear()
        self._watch = asyncio.create_task(self._watch_qemu(self._qemu))
        self.maitred = vm_guest_pb2_grpc.MaitredStub(self._channel(self.maitred_socket))
        self.tremplin = tremplin_pb2_grpc.TremplinStub(self._channel(self.tremplin_socket))

    def _channel(self, path: Path) -> grpc.aio.Channel:
        channel = grpc.aio.insecure_channel(f"unix:{path}", options=_CHANNEL_OPTIONS)
        self._channels.append(channel)
        return channel

    async def _start_daemon(self) -> Path:
        assert isinstance(self.vsock, UserVsock)
        vhost_user = check_socket_path(self.run_dir / "vhost.sock")
        for path in (vhost_user, self.vsock.path):
            path.unlink(missing_ok=True)
        self._daemon = await spawn(
            [
                str(self.image.vsock_daemon.resolve()),
                "--vm", f"guest-cid={self.cid},socket={vhost_user},uds-path={self.vsock.path}",
            ],
            log=self.run_dir / "vsock.log",
        )  # fmt: skip
        give_up = time.monotonic() + _DAEMON_SECONDS
        # A daemon does not say when it listens, and to connect would use up its only connection.
        while not vhost_user.exists():
            if self._daemon.returncode is not None or time.monotonic() > give_up:
                raise HostError(f"cannot start vhost-device-vsock: {self._daemon.last_words()}")
            await asyncio.sleep(0.01)
        return vhost_user

    async def _watch_qemu(self, child: Child) -> None:
        ended = asyncio.create_task(child.wait())
        try:
            while not ended.done():
                panicked = asyncio.create_task(self.console.panicked.wait())
                await asyncio.wait({ended, panicked}, return_when=asyncio.FIRST_COMPLETED)
                panicked.cancel()
                if self.console.panicked.is_set() and not await self._has_panicked(ended):
                    self.console.panicked.clear()
            if self.console.panicked.is_set():
                self._why_ended = "its kernel panicked"
            elif ended.result() == 0:
                self._why_ended = _POWERED_OFF
            else:
                self._why_ended = f"QEMU ended: {child.last_words()}"
                self._crash = child.last_words() if ended.result() in _CRASHES else ""
        finally:
            ended.cancel()
            self._ended.set()

    async def _has_panicked(self, ended: asyncio.Task[int]) -> bool:
        # Whether a panic that stands on the console was one: anybody who can have the kernel log
        # his words, or show a text in a session on the console, could say so. QEMU has ended then,
        # or is killed, as the kernel may hang in its panic.
        for _ in range(_PANIC_LOOKS):
            await asyncio.wait({ended}, timeout=_PANIC_SECONDS)
            if ended.done():
                return True
            with contextlib.suppress(OSError, EOFError):
                # The kernel answers for PID 1, which keeps the port open.
                _, writer = await self.vsock.connect(MAITRED_PORT)
                writer.close()
                return False
        assert self._qemu is not None
        await self._qemu.kill()
        await ended
        return True

    @property
    def running(self) -> bool:
        """Whether QEMU runs and the guest's kernel has not panicked."""
        return not self._ended.is_set()

    @property
    def boot_text(self) -> str:
        """The console's text since boot()."""
        return self.console.since(self._boot_starts_at)

    @property
    def boot_events(self) -> int:
        """How many events there were before boot(), for Recorder.wait_for(since=)."""
        return self._events_start_at

    def death(self) -> VmDiedError:
        """The error that says why the VM is gone."""
        return VmDiedError(
            f"cannot go on: the VM is gone, {self._why_ended}", self.console.last_lines()
        )

    async def alive(
        self, awaitable: Awaitable[_T] | Coroutine[Any, Any, _T], *, timeout: float, what: str
    ) -> _T:
        """The result of awaitable.

        timeout: seconds; what: what is waited for, for the error.
        Raises VmDiedError at once when the VM ends meanwhile, HostError when it takes too long.
        """
        task = asyncio.ensure_future(awaitable)
        ended = asyncio.create_task(self._ended.wait())
        try:
            await asyncio.wait({task, ended}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return await task
            if ended.done():
                raise self.death()
            raise HostError(f"cannot {what}: no answer within {timeout:g} s")
        finally:
            for each in (task, ended):
                each.cancel()
            await asyncio.gather(task, ended, return_exceptions=True)

    async def answer(
        self, call: Awaitable[_T] | Coroutine[Any, Any, _T], *, timeout: float, what: str
    ) -> _T:
        """The answer to a gRPC call to the guest that has a deadline of its own.

        timeout: seconds, the call's; what: what the call is to do, for the error.
        Raises VmDiedError, HostError when there is none in time or when the call fails.
        """
        try:
            return await self.alive(call, timeout=timeout + 1, what=what)
        except grpc.aio.AioRpcError as error:
            if not self.running:
                raise self.death() from None
            details = " ".join((error.details() or "no details").split())
            raise HostError(f"cannot {what}: {error.code().name}: {details}") from None

    async def ready(self, *, timeout: float = 120.0, silence: float = _SILENCE_SECONDS) -> float:
        """Waits for VmReady, and boots again when the emulated kernel hangs or fails; returns the
        seconds since QEMU was started last.

        timeout: seconds that each boot may take. silence: seconds after which a console that says
        nothing means that the kernel hangs; the last boot is given its whole time.
        Raises HostError, VmDiedError.
        """
        for boots_left in reversed(range(_BOOTS if self.accelerator == "tcg" else 1)):
            ready = self.recorder.wait_for("VmReady", since=self.boot_events)
            if boots_left:
                start = self._boot_starts_at
                ready = unless_hung(ready, self.console, start=start, seconds=silence)
            try:
                await self.alive(ready, timeout=timeout, what="boot the VM")
                break
            except BootHangsError as error:
                last = "".join(self.console.last_lines(1)) or "nothing"
                self.tell(f"the emulated kernel hangs: {error}; last: {last!r}; booting again")
                await self.kill()
                await self.boot()
            except VmDiedError:
                if not (boots_left and await self.boot_after_fault()):
                    raise
        return time.monotonic() - self.booted_at

    async def boot_after_fault(self) -> bool:
        """Boots again if the VM ended because its emulated kernel failed, or the emulation did;
        whether that was so.

        Raises HostError.
        """
        fault = self._crash or boot_hang.fault(self.boot_text)
        if self.running or self.accelerator != "tcg" or not fault:
            return False
        who = "QEMU" if self._crash else "the emulated kernel"
        self.tell(f"{who} failed: {fault!r}; booting again")
        await self.boot()
        return True

    async def shut_down(self, *, timeout: float = SHUTDOWN_SECONDS) -> bool:
        """Asks the guest to power off and waits until it has; kills it if it does not.

        timeout: seconds for the answer, and again for the end.
        Returns whether the guest went through its shutdown to the end.
        """
        if self.running:
            try:
                await self.answer(
                    # A maitred that has just died is started again.
                    self.maitred.Shutdown(
                        common_pb2.EmptyMessage(), timeout=timeout, wait_for_ready=True
                    ),
                    timeout=timeout,
                    what="shut down the VM",
                )
            except HostError:
                pass  # it may be gone before its answer is through; what counts is the console
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._ended.wait()
        await self.kill()
        # The last one counts: somebody may have written such a line before.
        last = _LAST_LINE.findall(self.boot_text)[-1:]
        return last == [CLEAN_LINE] and self._why_ended == _POWERED_OFF

    async def wait_ended(self) -> None:
        """Waits until the VM is gone, by whatever cause."""
        await self._ended.wait()

    async def kill(self) -> None:
        """Ends QEMU as a power cut does: what the guest has not flushed is lost to it."""
        if self._qemu is not None and self.running:
            await self._qemu.kill()
        await self._clean_up()

    async def _clean_up(self) -> None:
        if self._qemu is not None:
            await self._qemu.kill()
        if self._watch is not None:
            await self._watch
            self._watch = None
        self._qemu = None
        if self._console_server is not None:
            self._console_server.close()
            self._console_server = None
        if self._daemon is not None:
            await self._daemon.stop()
            self._daemon = None
        # Last, so that who waits for an answer is told of the VM's end, not of a cancelled call.
        for channel in self._channels:
            await channel.close()
        self._channels.clear()

    def monitor(self) -> Monitor:
        """A session with QEMU's monitor, for plugging devices."""
        return Monitor(self.run_dir / "qmp.sock")
