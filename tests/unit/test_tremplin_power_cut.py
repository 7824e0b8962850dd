"""What is put right in LXD's directory after a power cut."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.tremplin.images import drop_torn_indexes
from agent.tremplin.power_cut import images_are_checked, images_are_in_doubt, put_right

_WHOLE = "-----BEGIN X-----\nabc\n-----END X-----\n"


@pytest.fixture
def run_dir(tmp_path: Path) -> str:
    """An empty directory."""
    (tmp_path / "run").mkdir()
    return str(tmp_path / "run")


@pytest.mark.parametrize(
    ("certificate", "key", "kept"),
    [
        (_WHOLE, _WHOLE, True),
        ("", _WHOLE, False),
        (_WHOLE, "", False),
        (_WHOLE[:20], _WHOLE, False),
    ],
)
def test_torn_keys_go(tmp_path: Path, run_dir: str, certificate: str, key: str, kept: bool) -> None:
    """Both go when one is torn."""
    for name, text in (("server.crt", certificate), ("server.key", key)):
        (tmp_path / name).write_text(text)
    put_right(str(tmp_path), run_dir)
    assert [(tmp_path / name).exists() for name in ("server.crt", "server.key")] == [kept, kept]


def test_pid_files_go(tmp_path: Path, run_dir: str) -> None:
    """What they name does not run any more."""
    pid_file = tmp_path / "networks/lxdbr0/dnsmasq.pid"
    pid_file.parent.mkdir(parents=True)
    pid_file.touch()
    put_right(str(tmp_path), run_dir)
    assert not pid_file.exists()


def test_images_are_in_doubt_until_checked(tmp_path: Path, run_dir: str) -> None:
    """On the first start of all too: who knows whose directory it is."""
    assert not images_are_in_doubt(run_dir)
    put_right(str(tmp_path), run_dir)
    assert images_are_in_doubt(run_dir)
    images_are_checked(run_dir)
    assert not images_are_in_doubt(run_dir)


@pytest.mark.parametrize(
    ("text", "kept"),
    [('{"index": {}}', True), ("", False), ('{"index": {', False), ("\0" * 100, False)],
)
def test_torn_indexes_go(tmp_path: Path, text: str, kept: bool) -> None:
    """A whole one is what LXD has when the image server is away."""
    index = tmp_path / "cache/74a5/index.json"
    index.parent.mkdir(parents=True)
    index.write_text(text)
    drop_torn_indexes(str(tmp_path))
    assert index.exists() == kept
