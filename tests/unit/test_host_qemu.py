"""Which QEMU runs a VM."""

from __future__ import annotations

from pathlib import Path

import pytest

from host.build_files import GuestImage
from host.qemu import find_qemu


def test_the_fetched_one_before_the_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its own firmware; without one, what PATH has."""
    machines = tmp_path / "bin/qemu-system-x86_64"
    fetched = tmp_path / "image/qemu/qemu-system-x86_64"
    for program in (machines, fetched):
        program.parent.mkdir(parents=True)
        program.touch(mode=0o755)
    for name in ("vmlinux", "initrd.img", "rootfs.img", "cmdline"):
        (tmp_path / "image" / name).touch()
    monkeypatch.setenv("PATH", str(machines.parent))
    image = GuestImage.in_directory(tmp_path / "image")
    assert find_qemu(image) == [str(fetched), "-L", str(fetched.parent)]
    fetched.unlink()
    assert find_qemu(image) == [str(machines)]
