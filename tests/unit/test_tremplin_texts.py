"""What tremplin reads out of small texts and files: image servers' URLs, ids, logs, archives."""

from __future__ import annotations

import gzip
from typing import TYPE_CHECKING

import pytest

from agent.tremplin.archive import sizes
from agent.tremplin.image_source import image_server
from agent.tremplin.lxd_setup import mappable_ids
from agent.tremplin.start import first_error

if TYPE_CHECKING:
    from pathlib import Path

_OURS = "root:1000:1\nroot:1001:1\nroot:655360:1\nroot:665357:1\n"


@pytest.mark.parametrize(
    ("lsb_release", "url"),
    [
        ("CHROMEOS_RELEASE_CHROME_MILESTONE=93\n", "https://h/93/x"),
        ("A=b\n CHROMEOS_RELEASE_CHROME_MILESTONE = 101 \n", "https://h/101/x"),
        ("CHROMEOS_RELEASE_CHROME_MILESTONE=\n", "https://h/%d/x"),
        ("", "https://h/%d/x"),
        (None, "https://h/%d/x"),
    ],
)
def test_milestone(tmp_path: Path, lsb_release: str | None, url: str) -> None:
    """It stands where the URL has %d; without one the URL is used as it is."""
    path = tmp_path / "lsb-release"
    if lsb_release is not None:
        path.write_text(lsb_release)
    assert image_server("https://h/%d/x", lsb_release=str(path)) == url
    assert image_server("https://h/x", lsb_release=str(path)) == "https://h/x"


@pytest.mark.parametrize(
    ("subids", "ids"),
    [
        ("", [1000, 1001, 655360, 665357]),
        ("somebody:100000:65536\n", [1000, 1001, 655360, 665357]),
        ("root:1000000:1000000000\n" + _OURS, [1000, 1001, 655360, 665357]),
        ("root:1000000:1000000000\n", []),
        ("0:1000000:1000000000\n0:1000:2\n", [1000, 1001]),
        # Debian's own: what LXD takes for its containers holds two of them.
        ("root:100000:10000001\n" + _OURS, [1000, 1001]),
        ("root:1000\nroot:x:1\n\n" + _OURS, [1000, 1001, 655360, 665357]),
    ],
)
def test_mappable_ids(subids: str, ids: list[int]) -> None:
    """One by one, and not among those that LXD gives to containers."""
    assert mappable_ids(subids) == ids


def test_first_error() -> None:
    """The reason alone, of the first."""
    log = (
        "lxc box 20261121100000.000 WARN     cgfsng - cgroups/cgfsng.c:x:1 - A warning\n"
        "lxc box 20261121100000.001 ERROR    conf - conf.c:run_buffer:321 - Script exited - 1\n"
        "lxc box 20261121100000.002 ERROR    start - start.c:lxc_init:844 - Later\n"
    )
    assert first_error(log) == "Script exited - 1"
    assert first_error("") == ""


@pytest.mark.parametrize("size", [0, 1, 100_000])
def test_unpacked_size(tmp_path: Path, size: int) -> None:
    """Of gzip what its end says, of anything else its size."""
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    packed.write_bytes(gzip.compress(bytes(size)))
    plain.write_bytes(bytes(size))
    assert sizes(str(plain)) == (size, size)
    # It is known modulo 2^32, and no file gets smaller by much: one that is smaller than its pack
    # is taken for one that is 4 GiB larger.
    larger = size < packed.stat().st_size
    assert sizes(str(packed)) == (packed.stat().st_size, size + larger * 2**32)
