"""What is mounted where."""

from __future__ import annotations

import os

from agent import mount_table


def test_a_line_of_mountinfo() -> None:
    line = r"36 35 98:0 /a\040b /mnt\0112é rw shared:1 - ext3 /dev/b\040c rw,errors=continue"
    mount = mount_table.Mount(line + "\n")
    assert (mount.target, mount.fstype, mount.source) == ("/mnt\t2é", "ext3", "/dev/b c")


def test_a_path_that_is_not_utf_8() -> None:
    path = os.fsdecode(b"/a\xff")
    assert mount_table.unescape(f"{path}\\134b") == f"{path}\\b"


def test_this_machine() -> None:
    proc = mount_table.at("/proc")
    assert proc is not None
    assert proc.fstype == "proc"
    below = mount_table.under("/proc/self/status")
    assert below is not None
    assert below.target == "/proc"
    assert mount_table.at("/proc/self") is None
    root = mount_table.under("/procession")
    assert root is not None
    assert root.target == "/"
