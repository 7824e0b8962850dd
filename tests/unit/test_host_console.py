"""The serial console's text."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from host.console import Console


async def _feed(console: Console, pieces: list[bytes]) -> None:
    async def client(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        writer.close()

    path = console.log_path.with_suffix(".sock")
    path.unlink(missing_ok=True)
    server = await asyncio.start_unix_server(client, path=str(path))
    reader, writer = await asyncio.open_unix_connection(str(path))
    await console.serve(reader, writer)
    server.close()


def _console_after(directory: Path, pieces: list[bytes]) -> Console:
    async def feed() -> Console:
        console = Console(directory / "c.log")
        await _feed(console, pieces)
        return console

    console = asyncio.run(feed())
    console.close()
    return console


def test_text_has_no_escapes_and_the_log_has_every_byte(tmp_path: Path) -> None:
    """Colours and carriage returns go, letters cut in two by a read survive."""
    raw = "\x1b[1;31mrot\x1b[0m grün\r\nsecond\x1b[?2004h line".encode()
    at = raw.index(b"\xc3") + 1
    console = _console_after(tmp_path, [raw[:at], raw[at:]])
    assert console.text == "rot grün\nsecond line"
    assert (tmp_path / "c.log").read_bytes() == raw


@given(cuts=st.lists(st.integers(0, 40), max_size=5))
def test_cuts_do_not_matter(cuts: list[int]) -> None:
    """However reads cut the stream, the text is the same."""
    raw = b"\x1b[31mone\x1b[0m\r\n\x1b]0;title\x07two\r\n\x1b[2Kthree\r\n"
    console = Console(Path("/dev/null"))
    edges = [0, *sorted(cuts), len(raw)]

    async def take() -> None:
        for begin, end in itertools.pairwise(edges):
            await console.take(raw[begin:end])

    asyncio.run(take())
    console.close()
    assert console.text == "one\ntwo\nthree\n"


def test_panic_is_seen_and_heads_the_last_lines(tmp_path: Path) -> None:
    """What follows the panic's line is of no use to people."""
    lines = ["all well", "[ 4.7] Kernel panic - not syncing: Attempted to kill init!", "RIP: 0", ""]
    console = _console_after(tmp_path, ["\r\n".join(lines).encode()])
    assert console.panicked.is_set()
    assert console.last_lines(2) == lines[:2]


def test_wait_for_finds_what_came_before_and_what_comes(tmp_path: Path) -> None:
    """The offset says from where on; a later match ends the wait."""

    async def scene() -> list[str]:
        console = Console(tmp_path / "c.log")
        await console.take(b"mark 1\n")
        found = [(await console.wait_for(r"mark \d")).group()]
        waiting = asyncio.create_task(console.wait_for(r"mark \d", start=console.position))
        await console.take(b"mark")
        assert not waiting.done()
        await console.take(b" 2\n")
        found.append((await waiting).group())
        console.close()
        return found

    assert asyncio.run(scene()) == ["mark 1", "mark 2"]


def test_much_output_is_not_kept_for_ever() -> None:
    """Memory is bounded, and positions keep their meaning."""

    async def scene() -> None:
        console = Console(Path("/dev/null"))
        line = b"x" * 1023 + b"\n"
        for _ in range(6 * 1024):
            await console.take(line)
        here = console.position
        assert here == 6 << 20
        assert len(console.text) <= 4 << 20
        await console.take(b"found\n")
        assert console.since(here) == "found\n"
        assert (await console.wait_for("found", start=here)).group() == "found"
        console.close()

    asyncio.run(scene())
