"""The markers in an image's metadata, written without LXD where that is plain to do."""

from __future__ import annotations

import json

import pytest

from agent.tremplin.markers import CREATED, SET_UP, with_markers


def test_a_mapping_in_blocks() -> None:
    """As distrobuilder and LXD itself write it: in front of the first property, indented alike."""
    metadata = "architecture: amd64\nproperties:\n    os: Debian\n    name: x\ntemplates: {}\n"
    assert with_markers(metadata, (CREATED, SET_UP)) == (
        "architecture: amd64\n"
        "properties:\n"
        f'    {CREATED}: "true"\n'
        f'    {SET_UP}: "true"\n'
        "    os: Debian\n"
        "    name: x\n"
        "templates: {}\n"
    )


def test_json() -> None:
    """As our own images have it."""
    metadata = {"creation_date": 1, "properties": {"os": "Debian"}, "templates": {}}
    marked = with_markers(json.dumps(metadata, indent=2), (CREATED,))
    assert marked is not None
    assert json.loads(marked) == metadata | {"properties": {"os": "Debian", CREATED: "true"}}


@pytest.mark.parametrize(
    "metadata",
    [
        "",
        "architecture: amd64\n",
        "properties: {os: Debian}\n",
        "properties:\ntemplates: {}\n",
        "properties:\n  # none\ntemplates: {}\n",
        "properties: &all\n  os: Debian\n",
        "properties:\n  os: Debian\nproperties:\n  os: Debian\n",
        f"properties:\n  {CREATED}: no\n",
        "templates:\n  properties:\n    os: Debian\n",
        '{"architecture": "amd64"}',
        '{"properties": []}',
        '{properties: {os: "Debian"}}',
        '{"properties": ' + 20_000 * "[",
        "properties:\n  os: Debian\n" + 64 * 1024 * "#",
    ],
)
def test_anything_else_is_left_to_lxd(metadata: str) -> None:
    assert with_markers(metadata, (CREATED,)) is None
