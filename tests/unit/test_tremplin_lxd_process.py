"""What is put right on LXD's disk before it is started."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent.option_table import TREMPLIN
from agent.options import parse
from agent.tremplin.images import drop_torn_indexes
from agent.tremplin.lxd_process import drop_pid_files, drop_torn_keys, environment

_WHOLE = "-----BEGIN X-----\nabc\n-----END X-----\n"


@pytest.mark.parametrize(
    ("certificate", "key", "age", "kept"),
    [
        (_WHOLE, _WHOLE, 100, True),
        ("", _WHOLE, 100, False),
        (_WHOLE, "", 100, False),
        (_WHOLE[:20], _WHOLE, 100, False),
        ("", _WHOLE, -100, True),
    ],
)
def test_torn_keys_of_an_earlier_boot_go(
    tmp_path: Path, certificate: str, key: str, age: int, kept: bool
) -> None:
    """Both go when one is torn by a power cut; those of this boot may be half written just now."""
    booted_at = 1_000_000.0
    for name, text in (("server.crt", certificate), ("server.key", key)):
        (tmp_path / name).write_text(text)
        os.utime(tmp_path / name, (booted_at - age, booted_at - age))
    drop_torn_keys(str(tmp_path), booted_at=booted_at)
    assert [(tmp_path / name).exists() for name in ("server.crt", "server.key")] == [kept, kept]


def test_nothing_there_yet(tmp_path: Path) -> None:
    """The first start of all."""
    drop_torn_keys(str(tmp_path), booted_at=1_000_000.0)


@pytest.mark.parametrize(
    ("words", "only"), [([], "true"), (["tremplin.allow_privileged=yes"], "false")]
)
def test_privileged_containers_are_refused_unless_allowed(words: list[str], only: str) -> None:
    """By LXD itself, through its environment."""
    assert environment(parse(words, TREMPLIN))["LXD_UNPRIVILEGED_ONLY"] == only


@pytest.mark.parametrize(
    ("text", "age", "kept"),
    [
        ('{"index": {}}', 100, True),
        ("", 100, False),
        ('{"index": {', 100, False),
        ("\0" * 100, 100, False),
        ("", -100, True),
    ],
)
def test_torn_indexes_of_an_earlier_boot_go(
    tmp_path: Path, text: str, age: int, kept: bool
) -> None:
    """A whole one is what LXD has when the image server is away."""
    booted_at = 1_000_000.0
    index = tmp_path / "cache/74a5/index.json"
    index.parent.mkdir(parents=True)
    index.write_text(text)
    os.utime(index, (booted_at - age, booted_at - age))
    drop_torn_indexes(str(tmp_path), booted_at)
    assert index.exists() == kept


@pytest.mark.parametrize(("age", "kept"), [(100, False), (-100, True)])
def test_pid_files_of_an_earlier_boot_go(tmp_path: Path, age: int, kept: bool) -> None:
    """What they name does not run any more; LXD was started again when they are of this boot."""
    booted_at = 1_000_000.0
    pid_file = tmp_path / "networks/lxdbr0/dnsmasq.pid"
    pid_file.parent.mkdir(parents=True)
    pid_file.touch()
    os.utime(pid_file, (booted_at - age, booted_at - age))
    drop_pid_files(str(tmp_path), booted_at=booted_at)
    assert pid_file.exists() == kept
