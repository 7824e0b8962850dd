"""Files to import that somebody has made who wants more than a container."""

from __future__ import annotations

import gzip
import io
import re
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from agent.pb import tremplin_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.lxd.host import Tremplin

IMPORT = pb.ContainerImportProgress

_ENDS = {IMPORT.DONE, IMPORT.FAILED, IMPORT.FAILED_ARCHITECTURE, IMPORT.FAILED_SPACE}


@pytest.fixture
def directory(tremplin: Tremplin) -> Iterator[Path]:
    """A directory with an honest export, `box.tar.gz`, of a container `box` that was started."""
    path = tremplin.machine.directory / "exports"
    path.mkdir()
    tremplin.create("box")
    before = len(tremplin.host.reports)
    tremplin.start_container("box")
    tremplin.machine.run("lxc", "stop", "--force", "box")
    tremplin.call("ExportContainer", container_name="box", export_path=str(path / "box.tar.gz"))
    tremplin.host.wait_for(
        "UpdateExportStatus", container="box", status=pb.ContainerExportProgress.DONE, after=before
    )
    yield path
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


def _forge(directory: Path, change: Callable[[str, str], str]) -> Path:
    """The export, with its two descriptions changed."""
    path = directory / "forged.tar.gz"
    with (
        tarfile.open(directory / "box.tar.gz") as honest,
        tarfile.open(path, "w:gz", compresslevel=1) as forged,
    ):
        for member in honest:
            content = honest.extractfile(member) if member.isreg() else None
            if content is not None and member.name in {
                "backup/index.yaml",
                "backup/container/backup.yaml",
            }:
                data = change(member.name, content.read().decode()).encode()
                member.size = len(data)
                forged.addfile(member, io.BytesIO(data))
            else:
                forged.addfile(member, content)
    return path


def _import(tremplin: Tremplin, path: Path, name: str = "forged") -> Any:
    before = len(tremplin.host.reports)
    answer = tremplin.call("ImportContainer", container_name=name, import_path=str(path))
    if answer.status == pb.ImportContainerResponse.FAILED:
        return answer
    return tremplin.host.wait_for(
        "UpdateImportStatus",
        container=name,
        after=before,
        condition=lambda report: report.message.status in _ENDS,
    ).message


def _with_settings(*settings: str) -> Callable[[str, str], str]:
    def change(_name: str, text: str) -> str:
        return re.sub(
            r"(\n\s*)image\.os: ",
            lambda found: "".join(found[1] + each for each in settings) + found[0],
            text,
        )

    return change


def test_an_archive_gives_no_rights(tremplin: Tremplin, directory: Path) -> None:
    """It names a program that LXD would run as root of the VM, a privilege, ids and a directory of
    the VM: the container starts, and has nothing of it.
    """
    machine = tremplin.machine
    machine.run("sh", "-c", "printf '#!/bin/sh\\n>/run/hooked\\n' >/run/hook; chmod 755 /run/hook")
    settings = _with_settings(
        "raw.lxc: lxc.hook.pre-start = /run/hook",
        'security.privileged: "true"',
        "raw.idmap: both 0 0",
        'boot.autostart: "true"',
        "user.tremplin-replaced: box",
    )

    def change(name: str, text: str) -> str:
        device = ["evil:", "  path: /vm", "  source: /", "  type: disk"]
        return re.sub(
            r"(\n\s*)container_token:\n",
            lambda found: "".join(found[1] + line for line in device) + found[0],
            settings(name, text),
        )

    imported = _import(tremplin, _forge(directory, change))
    assert imported.status == IMPORT.DONE, imported
    tremplin.start_container("forged")
    assert machine.run("sh", "-c", "ls /run | grep hooked || true") == ""
    assert tremplin.run_in("forged", "ls", "/").split().count("vm") == 0
    assert tremplin.run_in("forged", "cat", "/proc/self/uid_map").split()[:2] == ["0", "1000000"]
    found = machine.api.instances["forged"].get().json()["metadata"]
    assert [key for key in found["config"] if not key.startswith(("image.", "volatile."))] == []
    assert list(found["devices"]) == ["container_token"]
    assert found["profiles"] == ["default"]


def test_an_archive_gives_no_ids(tremplin: Tremplin, directory: Path) -> None:
    """Root of a container whose archive says that it has been root of the VM all along."""

    def change(_name: str, text: str) -> str:
        assert '"Hostid":1000000,' in text
        return text.replace('"Hostid":1000000,', '"Hostid":0,')

    assert _import(tremplin, _forge(directory, change)).status == IMPORT.DONE
    tremplin.start_container("forged")
    assert tremplin.run_in("forged", "cat", "/proc/self/uid_map").split()[:2] == ["0", "1000000"]


def test_only_the_files_of_one_container(tremplin: Tremplin, directory: Path) -> None:
    """No snapshot, whose name could lead out of LXD's pool; the container that was to be replaced
    is what it was.
    """
    machine = tremplin.machine
    uuid = machine.run("lxc", "config", "get", "box", "volatile.uuid")

    def change(_name: str, text: str) -> str:
        return text.replace("name: box\n", "name: box\nsnapshots:\n- ../x\n", 1)

    refused = _import(tremplin, _forge(directory, change), "box")
    assert refused.status == pb.ImportContainerResponse.FAILED, refused
    assert "files of one container" in refused.failure_reason
    assert machine.containers() == {"box": "Stopped"}
    assert machine.run("lxc", "config", "get", "box", "volatile.uuid") == uuid


def test_a_file_that_would_fill_the_memory(tremplin: Tremplin) -> None:
    """FAILED at once, and no memory is taken for what the file says that it holds."""
    path = tremplin.machine.directory / "bomb"
    member = tarfile.TarInfo("x")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, 1 << 30
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(member.tobuf(tarfile.USTAR_FORMAT))
        for _ in range(256):
            file.write(bytes(1 << 20))
    answer = _import(tremplin, path)
    path.unlink()
    assert answer.status == pb.ImportContainerResponse.FAILED
    assert "does not hold an exported container" in answer.failure_reason
    assert tremplin.peak_memory() < 200 * 1024
