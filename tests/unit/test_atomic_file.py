"""Files that are replaced as a whole."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from agent import atomic_file

if TYPE_CHECKING:
    from pathlib import Path


def test_a_file_that_is_there_and_one_that_is_not(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in ("one", "twö"):
        atomic_file.replace(str(path), content, mode=0o640)
        assert path.read_text(encoding="utf-8") == content
        assert path.stat().st_mode & 0o7777 == 0o640
    assert list(tmp_path.iterdir()) == [path]


def test_what_somebody_killed_has_left_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "file"
    (tmp_path / "file.new").write_text("half of it, and longer")
    atomic_file.replace(str(path), "whole", owner=(os.getuid(), os.getgid()))
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_what_was_there_stays_when_it_cannot_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        atomic_file.replace(str(path), "x")
    assert list(tmp_path.iterdir()) == [path]
    victim = tmp_path / "victim"
    victim.write_text("kept")
    (tmp_path / "other.new").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        atomic_file.replace(str(tmp_path / "other"), "x")
    assert victim.read_text() == "kept"
    os.mkfifo(tmp_path / "third.new")
    with pytest.raises(OSError, match="No such device"):
        atomic_file.replace(str(tmp_path / "third"), "x")
