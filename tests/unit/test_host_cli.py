"""The command `termina`, as far as it goes without a VM: above all what it says to bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from host import registry
from host.build_files import GuestImage
from host.errors import HostError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Directories of a user's own."""
    for variable in ("XDG_RUNTIME_DIR", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    return tmp_path


def _termina(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "host.cli", *arguments],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--no-such-option"], "unrecognized arguments: --no-such-option"),
        (["run", "--cpus", "0"], "not a number of processors from 1 to 64: 0"),
        (["run", "--memory", "lots"], "not a number of MiB from 256"),
        (["run", "--flow", "other"], "invalid choice: 'other'"),
        (["run", "--vm", "../x"], "cannot use VM name '../x'"),
        (["run", "--timeout", "-1"], "not a number of seconds"),
        ([], "the following arguments are required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["shell", "--no-such-option"], "unrecognized arguments: --no-such-option"),
    ],
)
def test_bad_usage(home: Path, arguments: list[str], message: str) -> None:
    """One line and exit code 2."""
    code, output = _termina(*arguments)
    assert (code, output.count("\n")) == (2, 1)
    assert message in output


def test_nothing_runs(home: Path) -> None:
    """Commands for a running VM say that there is none."""
    assert _termina("status") == (1, "no VM is running\n")
    assert _termina("status", "--json") == (1, "[]\n")
    assert _termina("stop") == (1, "termina: cannot find VM termina: it is not running\n")
    assert _termina("console", "--vm", "x") == (
        1,
        "termina: cannot find VM x: it is not running\n",
    )
    for command in (["sh", "-c", "exit"], ["--", "sh", "-c", "exit"]):
        assert _termina("shell", "--vm", "x", *command) == (
            1,
            "termina: cannot find VM x: it is not running\n",
        )
    assert "nothing to wipe" in _termina("wipe")[1]


def test_image_is_missing(home: Path) -> None:
    """The error says what to do, and nothing is left behind."""
    code, output = _termina("run", "--build-dir", str(home))
    assert code == 1
    assert output == f"termina: cannot start a VM: no {home}/image/vmlinux; run `make image`\n"
    assert not (home / "XDG_DATA_HOME").exists()


def _fake_build(directory: Path) -> None:
    (directory / "image").mkdir()
    for name in ("vmlinux", "initrd.img", "rootfs.img", "cmdline", "vhost-device-vsock"):
        (directory / "image" / name).write_text("")
    index = directory / "container-image" / "streams" / "v1" / "index.json"
    index.parent.mkdir(parents=True)
    index.write_text("{}")


def test_qemu_is_missing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without QEMU gets told so, at once."""
    _fake_build(home)
    monkeypatch.setenv("PATH", "/nonexistent")
    code, output = _termina("run", "--build-dir", str(home))
    assert code == 1
    assert "cannot run qemu-system-x86_64: not installed; install qemu-system-x86" in output


def test_running_vm_is_found_and_not_started_twice(home: Path) -> None:
    """Others see its state while it runs; its name and its disk are taken."""
    _fake_build(home)
    with registry.Claim("mine") as claim:
        claim.tell(status="READY", container="penguin")
        code, output = _termina("status", "--json")
        assert code == 0
        [state] = json.loads(output)
        assert (state["name"], state["pid"], state["status"]) == ("mine", os.getpid(), "READY")
        code, output = _termina("run", "--vm", "mine", "--build-dir", str(home))
        assert code == 1
        assert output.startswith("termina: cannot start VM mine: it is running already")
    assert registry.running() == []
    with registry.Claim("mine"):
        pass


def test_unwritable_data_directory(home: Path) -> None:
    """The error names the disk."""
    _fake_build(home)
    (home / "file").write_text("")
    code, output = _termina(
        "run", "--build-dir", str(home), "--data", str(home / "file" / "data.img")
    )
    assert code == 1
    assert f"cannot use data disk {home}/file/data.img: {home}/file is not a directory" in output


def test_runtime_directory_of_somebody_else(home: Path) -> None:
    """A directory that others may write is not used."""
    directory = home / "XDG_RUNTIME_DIR" / "termina-agent"
    directory.mkdir(parents=True)
    directory.chmod(0o777)
    with pytest.raises(HostError, match="others may write or read there"):
        registry.Claim("x")


def test_runtime_directory_in_one_of_somebody_else(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who owns the directory above could put another in its place at any time."""
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr("tempfile.tempdir", str(home))
    registry.running()
    above = home / f"termina-{os.getuid()}"
    assert [path.name for path in above.iterdir()] == ["termina-agent"]
    above.chmod(0o777)
    with pytest.raises(HostError, match="others may write or read there"):
        registry.running()


def test_a_terminal_obeys_nobody_in_the_vm(home: Path) -> None:
    """Not the name of a container's user, nor the reason of a failure."""
    with registry.Claim("mine") as claim:
        claim.tell(status="FAILED", user="x\x1b]52;c;eA==\x07y", container="penguin\x9b2J")
        code, output = _termina("status")
    assert code == 0
    assert "user x\\x1b]52;c;eA==\\x07y" in output
    assert "\x1b" not in output
    assert "\x9b" not in output


def test_guest_image_names_the_missing_part(tmp_path: Path) -> None:
    """Each part of the image is asked for."""
    _fake_build(tmp_path)
    assert GuestImage.in_directory(tmp_path / "image").command_line == ""
    (tmp_path / "image" / "rootfs.img").unlink()
    with pytest.raises(HostError, match=r"no .*/rootfs\.img; run `make image`"):
        GuestImage.in_directory(tmp_path / "image")
