"""The pages name every file of the code, and no file that is not there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PAGES = {
    "agent": "architecture.md",
    "agent/process_supervisor": "supervisor.md",
    "agent/maitred": "maitred.md",
    "agent/log_forwarder": "maitred.md",
    "agent/shell": "maitred.md",
    "agent/tremplin": "tremplin.md",
    "host": "operations.md",
    "image": "image.md",
}


_PAGES_THERE = [path.name for path in (ROOT / "docs").glob("*.md")]


def _files(folder: str) -> set[str]:
    return {path.name for path in (ROOT / folder).glob("*.py") if path.name != "__init__.py"}


@pytest.mark.parametrize("folder", PAGES)
def test_every_file_is_named(folder: str) -> None:
    page = (ROOT / "docs" / PAGES[folder]).read_text()
    assert {name for name in _files(folder) if f"`{name}`" not in page} == set()


@pytest.mark.parametrize("name", ["README.md", *sorted(f"docs/{page}" for page in _PAGES_THERE)])
def test_every_name_is_a_file(name: str) -> None:
    page = ROOT / name
    text = page.read_text()
    paths = set(re.findall(r"`((?:agent|host|image|protos|requirements|tests)/[\w./-]+)`", text))
    assert {path for path in paths if not (ROOT / path).exists()} == set()
    folders = [*PAGES, *(f"tests/{tier}" for tier in ("unit", "namespace", "lxd", "vm"))]
    there = {"__init__.py"}.union(*map(_files, folders))
    assert set(re.findall(r"`(\w+\.py)`", text)) - there == set()
    links = set(re.findall(r"\]\(([\w./-]+)\)", text))
    assert {link for link in links if not (page.parent / link).exists()} == set()
