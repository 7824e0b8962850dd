"""What is looked at in a file that is to be imported."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
from typing import TYPE_CHECKING

import pytest

from agent.tremplin.archive import architecture
from agent.tremplin.operation import OperationError

if TYPE_CHECKING:
    from collections.abc import Callable

_CONFIG = "config:\n  container:\n    architecture: x86_64\n"
_HONEST = f"name: box\nbackend: btrfs\npool: default\noptimized: false\n{_CONFIG}"


def _tar(index: str, name: str = "backup/index.yaml") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(index.encode())
        archive.addfile(member, io.BytesIO(index.encode()))
    return file.getvalue()


def _header(kind: bytes, size: int, name: str = "backup/index.yaml") -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_honest(pack: Callable[[bytes], bytes]) -> None:
    assert architecture(pack(_tar(_HONEST))) == "x86_64"


@pytest.mark.parametrize(
    "index",
    [
        f"name: box\noptimized: true\n{_CONFIG}",
        f"name: box\n{_CONFIG}",
        f"name: box\nsnapshots:\n- ../../containers/box\noptimized: false\n{_CONFIG}",
        f'name: box\n"snap\\x73hots": [x]\noptimized: false\n{_CONFIG}',
        f'name: "box\noptimized: false\n{_CONFIG}  x: y"\n',
        'name: box\nconfig:\n  x: "\noptimized: false\n  y"\n  architecture: x86_64\n',
        f"name: box\noptimized: false\n{_CONFIG}snapshots: [x]\n",
        f"name: box\noptimized: false\n{_CONFIG} x: y\x85snapshots: [x]\n",
        f"name: box\noptimized: false\noptimized: true\n{_CONFIG}",
        f"name: box\noptimized: false\n{_CONFIG}---\nsnapshots: [x]\n",
        "".join(f" {line}\n" for line in _HONEST.splitlines()),
    ],
)
def test_what_lxd_would_do_more_than_unpack(index: str) -> None:
    """However it is written down, and where a reader of YAML would not look for it."""
    with pytest.raises(OperationError, match="files of one container"):
        architecture(_tar(index))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        _tar(_HONEST, "backup/other.yaml"),
        _tar(_HONEST.replace("x86_64", "\x1b[2J")),
        _tar(_HONEST.replace("x86_64", "x" * 100)),
        _tar(_HONEST)[:600],
        _header(tarfile.REGTYPE, 1 << 40),
        _header(tarfile.DIRTYPE, 0) + _HONEST.encode(),
        gzip.compress(_header(tarfile.GNUTYPE_LONGNAME, 4 << 30) + bytes(64 << 20)),
        gzip.compress(_header(tarfile.XHDTYPE, 4 << 30) + bytes(64 << 20)),
        b"".join(_header(tarfile.XHDTYPE, 0) for _ in range(2000)),
        gzip.compress(_tar(_HONEST))[:12] + b"\xff" * 1000,
        b"BZh91AY&SY" + b"\xff" * 1000,
        lzma.compress(bytes(1 << 20))[:100] + b"\xff" * 1000,
        b"\xfd7zXZ\0" + b"\xff" * 1000,
        lzma.compress(_tar(_HONEST), filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 30}]),
    ],
    ids=range(15),
)
def test_no_container(content: bytes) -> None:
    """Something else, damaged, or with more to it than there is."""
    with pytest.raises(OperationError, match="does not hold"):
        architecture(content)
