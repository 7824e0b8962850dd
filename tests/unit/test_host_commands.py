"""A command's output on its way over the console."""

from __future__ import annotations

import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host import commands


def _on_console(tmp: str, argv: list[str], mark: str) -> str:
    script = commands.script(argv, mark, directory=tmp)
    return subprocess.run(
        ["/bin/sh", "-c", script], capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a command with some output and exit code 3 leaves on a quiet console."""
    count = "1 2 3 4 5 6 7 8 9 10 11 12"
    argv = ["/bin/sh", "-c", f"for n in {count}; do echo some output; done; exit 3"]
    return _on_console(str(tmp_path_factory.mktemp("kept")), argv, "m")


@pytest.mark.parametrize(
    ("argv", "output", "errors", "code"),
    [
        (["printf", "two\\nlines"], "two\nlines", "", 0),
        (["true"], "", "", 0),
        (
            ["/bin/sh", "-c", "echo 'a  b' \"$0\"; echo err >&2; exit 7"],
            "a  b /bin/sh\n",
            "err\n",
            7,
        ),
        (["seq", "1", "2000"], "".join(f"{n}\n" for n in range(1, 2001)), "", 0),
        (["printf", "mark:0:eHg=:"], "mark:0:eHg=:", "", 0),
    ],
)
def test_output_comes_back(
    argv: list[str], output: str, errors: str, code: int, tmp_path: object
) -> None:
    """A real shell runs the script; every byte and the exit code come back."""
    text = _on_console(str(tmp_path), argv, "mark")
    assert commands.parse(text, "mark") == commands.Finished(code, output, errors)


def test_command_runs_once_and_output_is_printed_again(tmp_path: object) -> None:
    """A second run of the script prints what the first one kept."""
    argv = ["/bin/sh", "-c", f"echo x >>{tmp_path}/count; cat {tmp_path}/count"]
    first = commands.parse(_on_console(str(tmp_path), argv, "mark"), "mark")
    again = commands.parse(_on_console(str(tmp_path), argv, "mark"), "mark")
    assert first == again == commands.Finished(0, "x\n")


@given(at=st.integers(0, 100_000), noise=st.text(min_size=1, max_size=20))
def test_noise_is_harmless_or_noticed(text: str, at: int, noise: str) -> None:
    """Whatever is written between, the output is right or told to be garbled."""
    at %= len(text)
    noisy = text[:at] + noise + text[at:]
    try:
        finished = commands.parse(noisy, "m")
    except commands.GarbledError:
        return
    assert finished == commands.Finished(3, "some output\n" * 12)
