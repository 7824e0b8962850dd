"""`termina run` as a person has it: the Debian container from nothing to its output, and found
again the next time; another VM beside it; what the command says when things go wrong in the VM.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from host.build_files import BUILD_DIR

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a user who has run nothing yet."""
    directory = tmp_path_factory.mktemp("user")
    variables = ("XDG_DATA_HOME", "XDG_RUNTIME_DIR", "XDG_CACHE_HOME")
    # Sockets have short paths, those of pytest are long.
    return os.environ | {name: f"{directory}/{name[4:8]}" for name in variables}


def _termina(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "host.cli", *arguments]


def _left_behind() -> list[str]:
    """Children of this process's children that run a VM or serve one."""
    names = ("qemu-system", "vhost-device-vs")
    return [
        process.name()
        for process in psutil.Process().children(recursive=True)
        if process.name().startswith(names)
    ]


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """No QEMU and no daemon outlives the command."""
    before = _left_behind()
    yield
    assert _left_behind() == before


@pytest.mark.usefixtures("nothing_left")
def test_debian_from_nothing_and_found_again(home: dict[str, str]) -> None:
    """Everything that `make run` shows, twice on the same disk."""
    for again in (False, True):
        done = subprocess.run(
            _termina("run", "--user", "tux"), env=home, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        output = done.stdout
        assert re.search(r"^container  penguin" + (r" \(from last time\)" if again else "$"),
                         output, re.MULTILINE)  # fmt: skip
        assert re.search(r"^user       tux$", output, re.MULTILINE)
        assert re.search(r"^address    100\.115\.92\.\d+$", output, re.MULTILINE)
        assert re.search(r"^uid=1000\(tux\) .*\(sudo\)", output, re.MULTILINE)
        assert re.search(r'^PRETTY_NAME="Debian GNU/Linux 12', output, re.MULTILINE)
        assert re.search(r"powered off cleanly in \d", output)
        percents = [int(found) for found in re.findall(r"downloading (\d+) %", output)]
        assert percents == sorted(percents)
        assert (100 in percents) is not again


@pytest.mark.usefixtures("nothing_left")
def test_first_signal_ends_cleanly_and_a_disk_is_used_once(home: dict[str, str]) -> None:
    """SIGTERM in the middle of the work powers off; meanwhile nobody else gets name or disk."""
    command = _termina("run", "--image", "busybox", "--fresh", "--vm", "other", "--verbose")
    with subprocess.Popen(command, env=home, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout
        for line in running.stdout:
            if "the VM is up" in line:
                break
        data = f"{home['XDG_DATA_HOME']}/termina-agent/other.img"
        for arguments, message in (
            (["run", "--vm", "other"], "cannot start VM other: it is running already"),
            (["run", "--vm", "third", "--data", data], "another VM is running on it"),
            (["wipe", "--vm", "other"], "another VM is running on it"),
        ):
            refused = subprocess.run(
                _termina(*arguments), env=home, capture_output=True, text=True, check=False
            )
            assert refused.returncode == 1
            assert message in refused.stderr
        shown = subprocess.run(
            _termina("status"), env=home, capture_output=True, text=True, check=False
        )
        assert shown.stdout.startswith("other: STARTING_VM, up ")
        running.send_signal(signal.SIGTERM)
        rest = running.stdout.read()
        assert running.wait() == 130, rest
        assert "powered off cleanly" in rest


@pytest.mark.usefixtures("nothing_left")
def test_vm_that_dies_is_noticed_at_once(home: dict[str, str]) -> None:
    """QEMU killed from outside: an error with the last console lines, not a time-out."""
    command = _termina("run", "--image", "busybox", "--fresh", "--vm", "other")
    with subprocess.Popen(
        command, env=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout
        assert running.stderr
        for line in running.stdout:
            if "the VM is up" in line:
                break
        [qemu] = [
            child
            for child in psutil.Process(running.pid).children()
            if child.name().startswith("qemu-system")
        ]
        qemu.kill()
        began = time.monotonic()
        assert running.wait(timeout=20) == 1
        assert time.monotonic() - began < 10
        errors = running.stderr.read()
    assert "cannot go on: the VM is gone, QEMU ended: exit code -9; its last lines:" in errors
    assert re.search(r"^  \| \[ *\d+\.\d+\] ", errors, re.MULTILINE)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    ("file", "content", "why"),
    [
        ("rootfs.img", bytes(1 << 20), "initrd: cannot mount /dev/vda: Invalid argument"),
        ("cmdline", b"console=ttyS0 panic=-1 rdinit=/nothing", "Kernel panic - not syncing: VFS:"),
    ],
)
def test_vm_that_cannot_boot_says_why(
    home: dict[str, str], tmp_path: Path, file: str, content: bytes, why: str
) -> None:
    """An error with the line of the guest that says why, a kernel's panic included."""
    (tmp_path / "image").mkdir()
    for path in (BUILD_DIR / "image").iterdir():
        (tmp_path / "image" / path.name).symlink_to(path)
    (tmp_path / "image" / file).unlink()
    (tmp_path / "image" / file).write_bytes(content)
    (tmp_path / "container-image").symlink_to(BUILD_DIR / "container-image")
    done = subprocess.run(
        _termina("run", "--fresh", "--vm", "other", "--build-dir", str(tmp_path)),
        env=home, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "cannot go on: the VM is gone, " in done.stderr
    assert ("its kernel panicked" in done.stderr) == ("panic" in why)
    assert why in done.stderr
