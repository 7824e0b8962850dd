"""The log forwarder's life: from the sources to the senders, until SIGTERM and then to the end."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import time

from agent import atomic_file, grpc_endpoint, logs
from agent.log_forwarder import records
from agent.log_forwarder.sender import Sender

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agent.options import Address, Options

_log = logging.getLogger(__name__)

_KERNEL_METHOD = "/vm_tools.LogCollector/CollectKernelLogs"
_USER_METHOD = "/vm_tools.LogCollector/CollectUserLogs"
_MESSAGE_MAX = 64 << 10
_AT_ONCE = 256
"""Messages read before others get their turn."""
_FLUSH_SECONDS = 2.0
_SEQUENCE_FILE = "kernel-log-sent"


def run(options: Options, *, syslog: socket.socket | None, kernel: int | None) -> int:
    """Forwards until SIGTERM or SIGINT. The result is the exit code."""
    logs.set_up("logs")
    address = options.host_address("maitred.log_collector", listen="maitred.listen")
    if address is None:
        _log.error("cannot start: maitred.log_collector is not given")
        return 2
    try:
        asyncio.run(_forward(options, address, syslog=syslog, kernel=kernel))
    except OSError as error:
        _log.error("cannot start: %s", error)
        return 1
    return 0


async def _forward(
    options: Options,
    address: Address,
    *,
    syslog: socket.socket | None,
    kernel: int | None,
) -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    run_dir = options["maitred.run_dir"]
    host = grpc_endpoint.HostChannel(address, run_dir=run_dir, name="log-collector")
    async with host as channel:
        senders = []
        sources: list[_KernelLog | _Syslog] = []
        if kernel is not None:
            progress = _Progress(f"{run_dir}/{_SEQUENCE_FILE}")
            sender = Sender(channel.unary_unary(_KERNEL_METHOD), delivered=progress.save)
            senders.append(sender)
            sources.append(_KernelLog(kernel, sender, after=progress.load()))
        if syslog is not None:
            sender = Sender(channel.unary_unary(_USER_METHOD))
            senders.append(sender)
            sources.append(_Syslog(syslog, sender))
        for source in sources:
            loop.add_reader(source.descriptor, source.read)
        tasks = [asyncio.create_task(sender.run()) for sender in senders]
        await ended.wait()
        for source in sources:
            loop.remove_reader(source.descriptor)
            while source.read():
                pass
        try:
            async with asyncio.timeout(_FLUSH_SECONDS):
                await asyncio.gather(*(sender.flush() for sender in senders))
        except TimeoutError:
            _log.warning("the host did not take the last logs")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Progress:
    """The last kernel record that arrived, so that a restart sends none twice."""

    def __init__(self, path: str) -> None:
        self._path = path

    def load(self) -> int:
        try:
            with open(self._path, encoding="ascii") as file:
                return int(file.read())
        except (OSError, ValueError):
            return -1

    def save(self, sequence: int) -> None:
        try:
            atomic_file.replace(self._path, str(sequence), mode=0o600)
        except OSError as error:
            _log.debug("cannot note the progress: %s", error)


class _KernelLog:
    """Reads the kernel's log, kmsg(4)-like device, from where a predecessor came to."""

    def __init__(self, descriptor: int, sender: Sender, *, after: int) -> None:
        self.descriptor = descriptor
        self._sender = sender
        self._last = after

    def read(self) -> bool:
        """Takes what there is, up to a limit; whether there may be more."""
        boot_time = time.time_ns() - time.monotonic_ns()
        for _ in range(_AT_ONCE):
            try:
                data = os.read(self.descriptor, _MESSAGE_MAX)
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno == errno.EPIPE:  # overwritten; the next one shows how many
                    continue
                _log.warning("cannot read the kernel's log: %s", error.strerror)
                asyncio.get_running_loop().remove_reader(self.descriptor)
                return False
            if not data:
                return False
            record = records.from_kernel(data, boot_time=boot_time)
            if record is None or record.sequence <= self._last:
                continue
            if self._last >= 0 and record.sequence > self._last + 1:
                self._sender.lost(record.sequence - self._last - 1)
            self._last = record.sequence
            self._sender.put(record)
        return True


class _Syslog:
    """Reads what programs give to syslog(3)."""

    def __init__(self, server: socket.socket, sender: Sender) -> None:
        self.descriptor = server.fileno()
        self._server = server
        self._sender = sender
        self._time = 0
        self._repeats = 0

    def read(self) -> bool:
        """Takes what there is, up to a limit; whether there may be more."""
        for _ in range(_AT_ONCE):
            try:
                data = self._server.recv(_MESSAGE_MAX)
            except (BlockingIOError, InterruptedError):
                return False
            record = records.from_syslog(data, now=time.time_ns())
            # Lines of the same second and words are apart in time, so that a host can tell a batch
            # that is sent again from one that is alike.
            self._repeats = self._repeats + 1 if record.time == self._time else 0
            self._time = record.time
            record.time += self._repeats
            self._sender.put(record)
        return True
