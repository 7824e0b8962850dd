"""`termina run`: everything from power-on to the container's output and the power-off."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from typing import TYPE_CHECKING

from host import display, terminal
from host.build_files import GuestImage, check_container_images
from host.commands import run_in_container
from host.disks import DataDisk
from host.errors import HostError
from host.flows import Flow, Host, Reached, Wanted, disks
from host.image_server import ImageServer
from host.qemu import Machine
from host.registry import Claim
from host.status import GuestInfo, Status
from host.vm import Vm
from host.vsock import UserVsock

if TYPE_CHECKING:
    import argparse
    from collections.abc import Awaitable
    from pathlib import Path

_SHOWN = ("id", "cat /etc/os-release")
_EXIT_UNCLEAN = 1
_EXIT_INTERRUPTED = 130


class _Signals:
    """SIGINT, SIGTERM and SIGHUP: the first one asks for a clean end, the second one kills."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.kill = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, self._arrived)

    def _arrived(self) -> None:
        (self.kill if self.stop.is_set() else self.stop).set()

    async def unless(self, event: asyncio.Event, awaitable: Awaitable[object]) -> bool:
        """Awaits; returns whether it came to its end before the event did. Raises what it does."""
        task = asyncio.ensure_future(awaitable)
        waiter = asyncio.create_task(event.wait())
        await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
        waiter.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return False
        await task
        return True


async def run(options: argparse.Namespace, *, data: Path) -> int:
    """Runs a VM as the options of `termina run` say.

    data: the data disk's file. Returns the exit code. Raises HostError.
    """
    flow = Flow(options.flow)
    image = GuestImage.in_directory(options.build_dir / "image")
    container_images: Path = options.build_dir / "container-image"
    if options.image_server is None:
        check_container_images(container_images)
    signals = _Signals()
    with contextlib.ExitStack() as stack:
        claim = stack.enter_context(Claim(options.vm))
        disk = stack.enter_context(DataDisk(data.absolute()).open(fresh=options.fresh))
        server_url = options.image_server
        if server_url is None:
            server = ImageServer(container_images, port=options.image_port)
            server_url = stack.enter_context(server).guest_url
        vm = Vm(
            image,
            Machine(
                cpus=options.cpus,
                memory=options.memory,
                disks=disks(flow, data=disk.path, directory=claim.directory),
            ),
            run_dir=claim.directory,
            accelerator=options.accelerator,
            vsock=options.vsock,
        )
        wanted = Wanted(
            container=options.container,
            user=options.user,
            image_server=server_url,
            image_alias=options.image,
        )
        async with vm:
            return await _Session(options, vm, claim, wanted, signals).run(flow, disk.path)


class _Session:
    def __init__(
        self,
        options: argparse.Namespace,
        vm: Vm,
        claim: Claim,
        wanted: Wanted,
        signals: _Signals,
    ) -> None:
        self._options = options
        self._vm = vm
        self._claim = claim
        self._wanted = wanted
        self._signals = signals
        self._status = Status(vm.cid)
        self._display = display.make(self._status)

    async def run(self, flow: Flow, data: Path) -> int:
        """Boots, brings up, shows, keeps if wanted, powers off."""
        vm, show = self._vm, self._display
        self._claim.tell(
            cid=vm.cid,
            vsock="user" if isinstance(vm.vsock, UserVsock) else "kernel",
            data=str(data),
            flow=flow.value,
        )
        self._status.observe(self._tell)
        console = await terminal.serve(vm.console, vm.run_dir / "console.sock")
        if self._options.verbose:
            vm.console.watch(display.ConsoleLines(show.line))
        vm.tell = show.line
        host = Host(vm, flow, self._wanted, self._status)
        try:
            show.line(
                f"VM {self._options.vm}: {vm.accelerator}, {self._options.cpus} cpus, "
                f"{self._options.memory} MiB, data {data}"
            )
            finished = await self._signals.unless(self._signals.stop, self._work(host))
            if not finished:
                show.line("stopping")
            clean = await self._shut_down()
        except BaseException as error:
            show.close()
            if isinstance(error, HostError):
                await self._after_failure()
            raise
        finally:
            show.close()
            console.close()
        if not clean:
            print(f"the VM did not power off cleanly; log: {vm.console.log_path}")
            return _EXIT_UNCLEAN
        return 0 if finished or self._options.keep else _EXIT_INTERRUPTED

    def _tell(self, info: GuestInfo) -> None:
        self._claim.tell(
            status=info.container_status.name,
            percent=info.download_percent,
            reason=info.failure_reason,
        )

    async def _work(self, host: Host) -> None:
        vm, status = self._vm, self._status
        timeout = self._options.timeout
        try:
            async with asyncio.timeout(timeout):
                await vm.boot()
                reached = await host.bring_up()
                output = await self._output(reached)
        except TimeoutError:
            status.fail(f"not ready after {timeout} s")
            raise HostError(
                f"cannot bring up container {self._wanted.container}: not ready after {timeout} s"
            ) from None
        self._claim.tell(container=self._wanted.container, user=reached.user, ipv4=reached.ipv4)
        for line in [
            f"container  {self._wanted.container}{' (from last time)' if reached.existed else ''}",
            f"user       {reached.user}",
            f"address    {reached.ipv4}",
            *output,
        ]:
            self._display.line(line)
        if self._options.keep:
            await self._keep(host)

    async def _output(self, reached: Reached) -> list[str]:
        """What the shown commands print, as the container's user."""
        done = await run_in_container(
            self._vm,
            self._wanted.container,
            ["/bin/sh", "-c", "; ".join(f"echo '$ {each}'; {each}" for each in _SHOWN)],
            user=reached.user,
        )
        if done.code:
            raise HostError(
                f"cannot run {_SHOWN[0]} in the container: exit code {done.code}: "
                f"{' '.join((done.errors or done.output).split())}"
            )
        return done.output.splitlines()

    async def _keep(self, host: Host) -> None:
        """Until Ctrl-], or the VM's end."""
        vm = self._vm
        await host.log_in()
        self._display.close()
        if os.isatty(0) and os.isatty(1):
            print("console: Ctrl-] powers off; `termina stop` from elsewhere does, too", flush=True)
            attached = asyncio.create_task(terminal.attach(vm.console))
            vm.console.write(b"\n")
        else:
            print("running; `termina console` attaches, `termina stop` powers off", flush=True)
            attached = None
        ended = asyncio.create_task(vm.wait_ended())
        tasks = [ended] if attached is None else [ended, attached]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if attached is not None and attached.done():
                attached.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _shut_down(self) -> bool:
        """A clean power-off if the guest can, at once if it is not even up; whether it was."""
        vm, status = self._vm, self._status
        if not self._vm.recorder.of("VmReady"):
            await vm.kill()
            return True
        began = status.elapsed()
        clean = False

        async def shut_down() -> None:
            nonlocal clean
            clean = await vm.shut_down()

        if not await self._signals.unless(self._signals.kill, shut_down()):
            await vm.kill()
        if clean:
            self._display.line(
                display.stage_line(
                    status.elapsed(), f"powered off cleanly in {status.elapsed() - began:.1f} s"
                )
            )
        return clean

    async def _after_failure(self) -> None:
        """What is left of the VM goes away; the log stays."""
        print(f"log: {self._vm.console.log_path}")
        if self._vm.running and self._vm.recorder.of("VmReady"):
            await self._signals.unless(self._signals.stop, self._vm.shut_down(timeout=10))
