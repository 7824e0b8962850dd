"""ExportContainer and ImportContainer with real backups of LXD."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from agent.pb import tremplin_pb2 as pb
from tests.lxd.machine import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.lxd.host import Report, Tremplin

EXPORT = pb.ContainerExportProgress
IMPORT = pb.ContainerImportProgress


@pytest.fixture
def directory(tremplin: Tremplin) -> Iterator[Path]:
    """A directory for exports on the data disk of the machine."""
    path = tremplin.machine.directory / "exports"
    path.mkdir()
    yield path
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


def _end(tremplin: Tremplin, method: str, name: str, after: int) -> Report:
    ends = (
        {EXPORT.DONE, EXPORT.FAILED, EXPORT.CANCELLED}
        if method == "UpdateExportStatus"
        else {
            IMPORT.DONE,
            IMPORT.FAILED,
            IMPORT.CANCELLED,
            IMPORT.FAILED_ARCHITECTURE,
            IMPORT.FAILED_SPACE,
        }
    )
    return tremplin.host.wait_for(
        method, container=name, after=after, condition=lambda r: r.message.status in ends
    )


def _export(tremplin: Tremplin, name: str, path: Path) -> Any:
    before = len(tremplin.host.reports)
    answer = tremplin.call("ExportContainer", container_name=name, export_path=str(path))
    assert answer.status == pb.ExportContainerResponse.EXPORTING, answer
    return _end(tremplin, "UpdateExportStatus", name, before).message


def _import(tremplin: Tremplin, name: str, path: Path) -> Any:
    before = len(tremplin.host.reports)
    answer = tremplin.call("ImportContainer", container_name=name, import_path=str(path))
    assert answer.status == pb.ImportContainerResponse.IMPORTING, answer
    return _end(tremplin, "UpdateImportStatus", name, before).message


def test_there_and_back(tremplin: Tremplin, directory: Path) -> None:
    """A running container is exported, changed, and replaced by what was exported."""
    tremplin.create("box", alias="big")
    tremplin.start_container("box")
    tremplin.run_in("box", "sh", "-c", "echo before >/root/state; sync")
    exported = _export(tremplin, "box", directory / "box.tar.gz")
    assert exported.status == EXPORT.DONE, exported
    assert exported.bytes_exported == (directory / "box.tar.gz").stat().st_size > 8_000_000
    assert [path.name for path in directory.iterdir()] == ["box.tar.gz"]
    assert tremplin.machine.run("lxc", "query", "/1.0/instances/box/backups").strip() == "[]"

    tremplin.run_in("box", "sh", "-c", "echo after >/root/state")
    imported = _import(tremplin, "box", directory / "box.tar.gz")
    assert imported.status == IMPORT.DONE, imported
    assert tremplin.machine.containers() == {"box": "Stopped"}
    tremplin.host.wait_for("ContainerShutdown", container="box")
    before = len(tremplin.host.reports)
    tremplin.call("StartContainer", container_name="box")
    tremplin.host.wait_for("UpdateStartStatus", container="box", after=before)
    assert tremplin.run_in("box", "cat", "/root/state").strip() == "before"

    other = _import(tremplin, "copy", directory / "box.tar.gz")
    assert other.status == IMPORT.DONE, other
    assert tremplin.machine.containers() == {"box": "Running", "copy": "Stopped"}


def test_running_is_consistent(tremplin: Tremplin, directory: Path) -> None:
    """What a busy container writes first is never missing when what it wrote next is there."""
    tremplin.create("box", alias="big")
    tremplin.start_container("box")
    script = "n=1; while :; do echo $n >/root/a; echo $n >/root/b; n=$((n+1)); done"
    tremplin.run_in("box", "sh", "-c", f"({script}) </dev/null >/dev/null 2>&1 &")
    assert _export(tremplin, "box", directory / "box.tar.gz").status == EXPORT.DONE
    with tarfile.open(directory / "box.tar.gz") as archive:
        found = {}
        for name in ("a", "b"):
            file = archive.extractfile(f"backup/container/rootfs/root/{name}")
            assert file is not None
            found[name] = file.read().decode().strip()
    # At the moment of the snapshot one of them may just have been emptied.
    a, b = found["a"], found["b"]
    assert a or b, found
    assert not (a and b) or int(a) - int(b) in {0, 1}, found


def test_cancelled(tremplin: Tremplin, directory: Path) -> None:
    """No file and no backup is left, and it works afterwards."""
    tremplin.create("box", alias="big")
    before = len(tremplin.host.reports)
    path = str(directory / "x")
    tremplin.call("ExportContainer", container_name="box", export_path=path)
    cancel = tremplin.call("CancelExportContainer", in_progress_container_name="box")
    assert cancel.status == pb.CancelExportContainerResponse.CANCEL_QUEUED
    end = _end(tremplin, "UpdateExportStatus", "box", before)
    assert end.message.status == EXPORT.CANCELLED
    assert list(directory.iterdir()) == []
    assert tremplin.machine.run("lxc", "query", "/1.0/instances/box/backups").strip() == "[]"
    again = tremplin.call("CancelExportContainer", in_progress_container_name="box")
    assert again.status == pb.CancelExportContainerResponse.OPERATION_NOT_FOUND

    assert _export(tremplin, "box", directory / "x").status == EXPORT.DONE
    before = len(tremplin.host.reports)
    tremplin.call("ImportContainer", container_name="box", import_path=path)
    cancel = tremplin.call("CancelImportContainer", in_progress_container_name="box")
    assert cancel.status == pb.CancelImportContainerResponse.CANCEL_QUEUED
    end = _end(tremplin, "UpdateImportStatus", "box", before)
    assert end.message.status == IMPORT.CANCELLED
    assert tremplin.machine.containers() == {"box": "Stopped"}


def test_killed(tremplin: Tremplin, directory: Path) -> None:
    """A tremplin that was killed carries both on."""
    tremplin.create("box", alias="big")
    before = len(tremplin.host.reports)
    path = str(directory / "x")
    tremplin.call("ExportContainer", container_name="box", export_path=path)
    tremplin.restart()
    end = _end(tremplin, "UpdateExportStatus", "box", before)
    assert end.message.status == EXPORT.DONE, end
    before = len(tremplin.host.reports)
    tremplin.call("ImportContainer", container_name="box", import_path=path)
    tremplin.restart()
    end = _end(tremplin, "UpdateImportStatus", "box", before)
    assert end.message.status == IMPORT.DONE, end
    assert tremplin.machine.containers() == {"box": "Stopped"}


@pytest.mark.parametrize("new_is_there", [False, True])
def test_power_cut_while_replacing(tremplin: Tremplin, new_is_there: bool) -> None:
    """The old container is back under its name unless the new one has it."""
    machine = tremplin.machine
    tremplin.create("box")
    machine.run("lxc", "config", "set", "box", "user.tremplin-replaced=box")
    machine.run("lxc", "rename", "box", "crostini-inprogress-replaced")
    if new_is_there:
        tremplin.create("box")
    tremplin.restart()
    wait_until(lambda: machine.containers() == {"box": "Stopped"}, "the repair")
    config = machine.run("lxc", "config", "get", "box", "user.tremplin-replaced").strip()
    assert config == ("" if new_is_there else "box")


def _foreign_export(path: Path, architecture: str) -> None:
    index = (
        f"name: box\noptimized: false\nconfig:\n  container:\n    architecture: {architecture}\n"
    ).encode()
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("backup/index.yaml")
        member.size = len(index)
        archive.addfile(member, io.BytesIO(index))


def test_wrong_architecture(tremplin: Tremplin, directory: Path) -> None:
    """It is told before anything is written."""
    _foreign_export(directory / "x", "s390x")
    end = _import(tremplin, "box", directory / "x")
    assert end.status == IMPORT.FAILED_ARCHITECTURE
    assert (end.architecture_device, end.architecture_container) == ("x86_64", "s390x")
    assert tremplin.machine.containers() == {}


def test_no_space(tremplin: Tremplin, directory: Path) -> None:
    """Neither an export nor an import is begun that cannot be finished."""
    machine = tremplin.machine
    _foreign_export(directory / "x", "x86_64")
    with (directory / "x").open("r+b") as file:
        # Says of itself that it holds 4 GiB more than there are.
        file.truncate(9 << 30)
    end = _import(tremplin, "box", directory / "x")
    assert end.status == IMPORT.FAILED_SPACE
    assert end.disk_space_required_bytes > end.disk_space_available_bytes > 0
    assert machine.containers() == {}

    tremplin.create("box", alias="big")
    small = machine.directory / "small-disk"
    small.mkdir()
    machine.run("mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", small)
    try:
        export = _export(tremplin, "box", small / "x")
        assert export.status == EXPORT.FAILED
        assert "free" in export.failure_reason
        assert machine.run("ls", small).strip() == ""
    finally:
        machine.run("umount", small)
        small.rmdir()


@pytest.mark.parametrize(
    ("method", "fields", "reason"),
    [
        ("ExportContainer", {}, "needs a name"),
        ("ExportContainer", {"container_name": "box"}, "not an absolute path"),
        ("ExportContainer", {"container_name": "box", "export_path": "/nowhere/x"}, "directory"),
        (
            "ExportContainer",
            {"container_name": "box", "export_path": "/run/x"},
            "no such container",
        ),
        ("ImportContainer", {"container_name": "box"}, "not an absolute path"),
        ("ImportContainer", {"container_name": "box", "import_path": "/nowhere"}, "No such file"),
        ("ImportContainer", {"container_name": "box", "import_path": "/etc/hosts"}, "not hold"),
    ],
)
def test_bad_input(tremplin: Tremplin, method: str, fields: dict[str, str], reason: str) -> None:
    """FAILED at once, with the reason."""
    answer = tremplin.call(method, **fields)
    assert type(answer).Status.Name(answer.status) == "FAILED"
    assert reason in answer.failure_reason
