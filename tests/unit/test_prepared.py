"""A program that is started first and told later what it is: real processes on both ends."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from agent.listening import by_address, open_listener
from agent.options import UnixAddress
from agent.prepared import OPTION, Prepared

_TELLS = """
import os, resource, sys
from agent.prepared import wait
assert sys.argv[1:] == ["--prepared"]
told = wait()
if told is None:
    sys.exit(7)
words, sockets = told
print(words, len(sockets), dict(os.environ), os.getcwd(), os.getsid(0) == os.getpid())
print(resource.getrlimit(resource.RLIMIT_NOFILE), [os.get_inheritable(fd) for fd in sockets])
"""
_COMMAND = [sys.executable, "-c", _TELLS]


def _exit_code(prepared: Prepared) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(prepared.pid, 0)[1])


def test_becomes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the arguments, environment, stdio, sockets and limits that it would have had."""
    import resource

    monkeypatch.setenv("NOT_FOR_IT", "x")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    prepared = Prepared(_COMMAND)
    console = tmp_path / "console"
    console.touch()
    address = UnixAddress(f"{tmp_path}/socket")
    listener = open_listener(address)
    limit = (before[0] - 1, before[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    try:
        words = ["a=b", "", "caf\udce9 \n"]
        assert prepared.become([*_COMMAND, *words], {"A": "b c"}, str(console), [listener])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert by_address([listener]) == {address: listener}
    os.close(listener)
    assert _exit_code(prepared) == 0
    said, limits = console.read_text().splitlines()
    assert said == f"{words} 1 {{'A': 'b c'}} / True"
    assert limits == f"{limit} [False]"


def test_is_not_to_be() -> None:
    """Another program is wanted: it ends, and says so to nobody."""
    prepared = Prepared(_COMMAND)
    assert not prepared.become(["/bin/true"], {}, None, [])
    assert _exit_code(prepared) == 7


def test_did_not_live() -> None:
    """Whoever started it is told in time to start another."""
    prepared = Prepared(["/bin/false"])
    os.waitid(os.P_PID, prepared.pid, os.WEXITED | os.WNOWAIT)
    assert not prepared.become(["/bin/false", "word"], {}, None, [])
    assert _exit_code(prepared) == 1


def test_cannot_be_started() -> None:
    with pytest.raises(FileNotFoundError):
        Prepared(["/nowhere/at/all"])


def test_console_that_is_not_there() -> None:
    prepared = Prepared(_COMMAND)
    assert not prepared.become([*_COMMAND], {}, "/nowhere/at/all", [])
    assert _exit_code(prepared) == 7


def test_option() -> None:
    """No option of a program can be taken for it."""
    assert "=" not in OPTION
