"""Joins a terminal to a VM's console: of a VM in this process, or in another one through the
socket that serve() makes. Ctrl-] ends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import termios
import tty
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from host.console import Console

ESCAPE = 0x1D
"""Ctrl-], what telnet(1) and virsh(1) use too."""

_CHUNK = 1 << 16
_SLOW_READER_BYTES = 1 << 20
_SHOWN_AT_FIRST = 2000


@contextlib.contextmanager
def raw_mode(fd: int) -> Iterator[None]:
    """Every key goes through as it is, Ctrl-C too; the terminal is as before at the end."""
    before = termios.tcgetattr(fd)
    tty.setraw(fd)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def write_all(data: bytes) -> None:
    """To stdout, at once and whole."""
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


async def _until_escape(send: Callable[[bytes], None]) -> None:
    """Passes what is typed on until Ctrl-] or the end of the input."""
    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def read() -> None:
        data = os.read(0, _CHUNK)
        before, escape, _ = data.partition(bytes([ESCAPE]))
        if before:
            send(before)
        if (escape or not data) and not done.done():
            done.set_result(None)

    loop.add_reader(0, read)
    try:
        await done
    finally:
        loop.remove_reader(0)


async def attach(console: Console) -> None:
    """Joins this process's terminal to a console until Ctrl-]; stdin must be a terminal."""
    stop = console.watch(write_all)
    try:
        with raw_mode(0):
            await _until_escape(console.write)
    finally:
        stop()


async def attach_to_socket(path: Path) -> None:
    """As attach(), to the console of another process. Ends when that does, too."""
    reader, writer = await asyncio.open_unix_connection(str(path))

    async def show() -> None:
        while data := await reader.read(_CHUNK):
            write_all(data)

    tasks = [asyncio.create_task(show())]
    try:
        if os.isatty(0):
            with raw_mode(0):
                tasks.append(asyncio.create_task(_until_escape(writer.write)))
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        else:
            await tasks[0]
    finally:
        for task in tasks:
            task.cancel()
        writer.close()


async def serve(console: Console, path: Path) -> asyncio.Server:
    """Lets other processes of this user attach to a console.

    path: the unix socket. Returns the server; the caller closes it.
    """
    path.unlink(missing_ok=True)

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def show(data: bytes) -> None:
            if writer.transport.get_write_buffer_size() > _SLOW_READER_BYTES:
                writer.close()  # a terminal that stands still must not eat up the memory
            else:
                writer.write(data)

        show(console.text[-_SHOWN_AT_FIRST:].replace("\n", "\r\n").encode())
        stop = console.watch(show)
        try:
            while data := await reader.read(_CHUNK):
                console.write(data)
        except ConnectionError:
            pass
        finally:
            stop()
            writer.close()

    return await asyncio.start_unix_server(client, path=str(path))
