"""`termina shell` in a real terminal and in a pipe, into a VM that `termina run --keep` holds."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator

import pytest

pytestmark = pytest.mark.timeout(600)


def _termina(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "host.cli", *arguments]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which a VM with a busybox container runs."""
    directory = tmp_path_factory.mktemp("user")
    variables = ("XDG_DATA_HOME", "XDG_RUNTIME_DIR", "XDG_CACHE_HOME")
    home = os.environ | {name: f"{directory}/{name[4:8]}" for name in variables}
    command = _termina("run", "--keep", "--image", "busybox", "--user", "tux")
    with subprocess.Popen(
        command, env=home, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout
        output = ""
        for line in running.stdout:
            output += line
            if "termina stop" in line:
                break
        else:
            pytest.fail(f"the VM did not come up: {output}")
        try:
            yield home
        finally:
            running.send_signal(signal.SIGTERM)
            rest = running.stdout.read()
            assert running.wait() == 0, rest


def _shell(home: dict[str, str], *arguments: str, data: bytes = b"") -> tuple[int, bytes, bytes]:
    done = subprocess.run(
        _termina("shell", *arguments), env=home, input=data, capture_output=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


def test_in_a_pipe(kept: dict[str, str]) -> None:
    """Streams stay apart, every byte arrives, and the exit code is the program's."""
    assert _shell(kept, "--", "id", "-un") == (0, b"tux\n", b"")
    program = ["sh", "-c", "echo out; echo err >&2; exit 7"]
    assert _shell(kept, "--guest", "--", *program) == (7, b"out\n", b"err\n")
    data = bytes(range(256)) * 2000
    assert _shell(kept, "--guest", "--", "cat", data=data) == (0, data, b"")
    assert _shell(kept, data=b"cd /\npwd\nexit 3\n") == (3, b"/\n", b"")
    where = ["--cwd", "/tmp", "--env", "WORD=it's one"]
    script = ["sh", "-c", 'pwd; echo "$WORD"']
    assert _shell(kept, *where, "--", *script) == (0, b"/tmp\nit's one\n", b"")
    # As ssh(1) takes it, too: from the first word on it is the command's.
    assert _shell(kept, "--guest", *where, *script) == (0, b"/tmp\nit's one\n", b"")


def test_refusals(kept: dict[str, str]) -> None:
    """One line, and exit code 1."""
    code, output, errors = _shell(kept, "--guest", "--user", "nobody-knows", "--", "id")
    assert (code, output) == (1, b"")
    assert errors.startswith(b"termina: cannot open a shell: ")
    code, _, errors = _shell(kept, "--env", "NONSENSE", "--", "id")
    assert (code, errors) == (1, b"termina: cannot use --env NONSENSE: not KEY=VALUE\n")


def _read_until(fd: int, wanted: bytes, *, seconds: float = 60.0) -> bytes:
    got, give_up = b"", time.monotonic() + seconds
    while wanted not in got:
        ready, _, _ = select.select([fd], [], [], max(0.0, give_up - time.monotonic()))
        assert ready, f"no {wanted!r} in {got!r}"
        got += os.read(fd, 4096)
    return got


def test_in_a_terminal(kept: dict[str, str]) -> None:
    """A prompt, the terminal's size, Ctrl-C for the program there, and the shell's exit code."""
    terminal, inner = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 99, 0, 0))
    with subprocess.Popen(
        _termina("shell", "--guest"), env=kept, stdin=inner, stdout=inner, stderr=inner
    ) as running:
        try:
            os.close(inner)
            _read_until(terminal, b"# ")
            os.write(terminal, b"stty size\r")
            _read_until(terminal, b"33 99")
            fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
            running.send_signal(signal.SIGWINCH)  # the kernel's part, for a controlling terminal
            os.write(terminal, b"sleep 1; sh -c 'stty size; exec sleep 1000'\r")
            _read_until(terminal, b"40 120")
            os.write(terminal, b"\x03")
            os.write(terminal, b"echo back-$((40 + 2)); exit 4\r")
            _read_until(terminal, b"back-42")
            assert running.wait(timeout=60) == 4
        finally:
            running.kill()
    os.close(terminal)
