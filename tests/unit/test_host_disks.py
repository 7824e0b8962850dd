"""Data disks and the small images."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest

from host import disks, romfs
from host.children import find_program
from host.errors import HostError


def test_new_disk_is_sparse_and_locked(tmp_path: Path) -> None:
    """A second VM on the same disk is refused, and gets it once it is free."""
    path = tmp_path / "new" / "data.img"
    with disks.DataDisk(path).open():
        assert path.stat().st_size == disks.DATA_BYTES
        assert path.stat().st_blocks == 0
        with pytest.raises(HostError, match=r"cannot use data disk .*: another VM is running"):
            disks.DataDisk(path).open()
        with pytest.raises(HostError, match="another VM is running"):
            disks.wipe(path)
    with disks.DataDisk(path).open():
        pass


def test_content_stays_unless_fresh(tmp_path: Path) -> None:
    """What was written is there next time, grown to the size; fresh throws it away."""
    path = tmp_path / "data.img"
    path.write_bytes(b"mine")
    with disks.DataDisk(path).open(size=1 << 20):
        assert path.stat().st_size == 1 << 20
        assert path.read_bytes()[:4] == b"mine"
    with disks.DataDisk(path).open(fresh=True, size=1 << 20):
        assert path.read_bytes() == bytes(1 << 20)


def test_wipe(tmp_path: Path) -> None:
    """The file is gone; a second time there is nothing to do."""
    path = tmp_path / "data.img"
    path.write_bytes(b"mine")
    assert disks.wipe(path)
    assert not path.exists()
    assert not disks.wipe(path)


def test_directory_that_cannot_be_made(tmp_path: Path) -> None:
    """The error names the disk and the reason."""
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError, match="file is not a directory"):
        disks.DataDisk(tmp_path / "file" / "data.img").open()


def test_tools_image_is_a_clean_ext4(tmp_path: Path) -> None:
    """e2fsck finds nothing to say."""
    path = tmp_path / "tools.img"
    disks.make_tools_image(path)
    checked = subprocess.run([find_program("e2fsck", hint=""), "-nf", path], check=False)
    assert checked.returncode == 0


def test_romfs_checksums_and_links() -> None:
    """Each header sums up to 0 as romfs.rst demands; the kernel itself reads it in the VM tests."""
    image = romfs.build({"b": b"two", "a": b"x" * 100})
    magic, size = struct.unpack(">8sI", image[:12])
    assert magic == b"-rom1fs-"
    assert size <= len(image)
    assert len(image) % 1024 == 0
    assert sum(struct.unpack(f">{min(512, size) // 4}I", image[: min(512, size)])) % 2**32 == 0
    names, at = [], 32
    while at:
        following, _, length, _ = struct.unpack(">IIII", image[at : at + 16])
        name = image[at + 16 : at + 32].rstrip(b"\0")
        names.append((name, image[at + 32 : at + 32 + length]))
        assert sum(struct.unpack(">8I", image[at : at + 32])) % 2**32 == 0
        at = following & ~15
    assert names == [(b".", b""), (b"..", b""), (b"a", b"x" * 100), (b"b", b"two")]


@pytest.mark.parametrize("name", ["", "a/b", ".", "..", "a\0"])
def test_romfs_refuses_names(name: str) -> None:
    """What could not be found again is not written."""
    with pytest.raises(ValueError, match="not a file name"):
        romfs.build({name: b""})
