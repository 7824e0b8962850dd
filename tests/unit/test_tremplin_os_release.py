"""What a container says of itself, read from files that it may have arranged to its liking."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from agent.tremplin.os_release import parse_os_release, read_os_release

if TYPE_CHECKING:
    from pathlib import Path

TEXT = 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nNAME=\'Debian\'\nID=debian\nbroken="\n'


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The root directory of container `c`."""
    root = tmp_path / "containers/c/rootfs"
    (root / "etc").mkdir(parents=True)
    (root / "usr/lib").mkdir(parents=True)
    return root


def test_parse() -> None:
    release = parse_os_release(TEXT)
    assert release.pretty_name == "Debian GNU/Linux 12 (bookworm)"
    assert (release.name, release.id, release.version) == ("Debian", "debian", "")


@pytest.mark.parametrize("link", ["../usr/lib/os-release", "/usr/lib/os-release", None])
def test_links_stay_inside(tmp_path: Path, root: Path, link: str | None) -> None:
    (root / "usr/lib/os-release").write_text(TEXT)
    if link:
        (root / "etc/os-release").symlink_to(link)
    assert read_os_release(f"{tmp_path}/containers/c").id == "debian"


def test_link_out(tmp_path: Path, root: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("ID=secret\n")
    (root / "etc/os-release").symlink_to("../../../../secret")
    (root / "usr/lib/os-release").symlink_to(secret)
    assert read_os_release(f"{tmp_path}/containers/c").id == ""


def test_fifo_does_not_block(tmp_path: Path, root: Path) -> None:
    os.mkfifo(root / "etc/os-release")
    (root / "usr/lib/os-release").mkdir()
    assert read_os_release(f"{tmp_path}/containers/c").id == ""


def test_none(tmp_path: Path) -> None:
    assert read_os_release(f"{tmp_path}/containers/c").id == ""
