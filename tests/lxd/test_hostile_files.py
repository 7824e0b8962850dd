"""Containers whose root writes files that are not meant for their own programs."""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import grpc
import pytest

from agent.pb import tremplin_pb2 as pb
from agent.tremplin.container_files import ContainerFiles
from tests.lxd.machine import wait_until

if TYPE_CHECKING:
    from tests.lxd.host import Tremplin

_USER = pb.GetContainerUsernameResponse


@pytest.fixture
def hostile(tremplin: Tremplin) -> Tremplin:
    """Tremplin with a running container of that name."""
    tremplin.create("hostile")
    tremplin.start_container("hostile")
    return tremplin


def _run(hostile: Tremplin, script: str) -> None:
    hostile.run_in("hostile", "sh", "-ec", script)


_MANY = "i=0; while [ $i -lt {} ]; do {}; i=$((i+1)); done"


_SCRIPTS = [
    r"printf '\377x:x:1000:1000::/home/x:/bin/sh\n' >>/etc/passwd",
    r"printf 'x:x:1000:1000::/home/\377:/bin/sh\n' >>/etc/passwd",
    r"printf 'x\033[2Jy:x:1000:1000::/home/x:/bin/sh\n' >>/etc/passwd",
    r"(head -c 900000 /dev/zero | tr '\0' n; echo :x:1000:1000::/home/x:/bin/sh) >>/etc/passwd",
    r"head -c 4190000 /dev/zero | tr '\0' '\n' >>/etc/passwd",
    r"(printf 'x:x:'; head -c 5000 /dev/zero | tr '\0' 9; echo :1::/:/bin/sh) >>/etc/passwd",
    "echo x:x:1000:99999999999::/home/x:/bin/sh >>/etc/passwd",
    f"(printf 'x:x:1000:1000::'; {_MANY.format(1200, 'printf /q')}; echo :) >>/etc/passwd",
    "rm /etc/passwd; mkfifo /etc/passwd",
    "rm /etc/passwd; mkdir /etc/passwd",
    "rm /etc/passwd; ln -s /dev/zero /etc/passwd",
    "rm /etc/passwd; ln -s /dev/console /etc/passwd",
    "rm /etc/passwd; ln -s nowhere /etc/passwd; ln -s passwd /etc/nowhere",
    f"mkdir -p /etc/skel; cd /etc/skel; {_MANY.format(1100, 'mkdir a; cd a')}",
    "mkdir -p /etc/skel; cd /etc/skel; seq 1 10001 | xargs touch",
    "mkdir -p /home; cd /home; mkdir .new-by-tremplin; cd .new-by-tremplin; "
    + _MANY.format(1100, "mkdir a; cd a"),
    "mkfifo /etc/passwd.new-by-tremplin; ln -s /etc/shadow /etc/group.new-by-tremplin",
]
_AS_BEFORE = (
    "rm -rf /etc/passwd* /etc/group* /etc/skel /home /etc/nowhere; "
    "cp /tmp/passwd /tmp/group /etc; mkdir /home"
)


def test_accounts(hostile: Tremplin) -> None:
    """Each call is answered with gRPC's OK, soon, in little memory, and with text that hosts can
    show.
    """
    _run(hostile, "cp /etc/passwd /etc/group /tmp")
    for script in _SCRIPTS:
        _run(hostile, f"{_AS_BEFORE}; {script}")
        began = time.monotonic()
        found = hostile.call("GetContainerUsername", container_name="hostile")
        made = hostile.call("SetUpUser", container_name="hostile", container_username="emma")
        assert time.monotonic() - began < 30, script
        for answer in (found, made):
            for text in (answer.username, answer.failure_reason):
                assert text.isprintable(), script
                assert len(text) < 1200, script
    lines = hostile.log.read_text().splitlines()
    assert all(line.isprintable() and len(line) < 2100 for line in lines), lines
    assert not [line for line in lines if "Unexpected" in line]
    assert hostile.peak_memory() < 200 * 1024
    assert hostile.run_in("hostile", "stat", "-c", "%a", "/etc/shadow").strip() == "640"


def test_timezone(hostile: Tremplin) -> None:
    """Not where a FIFO stands in the place of a file."""
    _run(
        hostile,
        "mkdir -p /usr/share/zoneinfo/Europe; >/usr/share/zoneinfo/Europe/Rome; "
        "rm -f /etc/timezone; mkfifo /etc/timezone",
    )
    answer = hostile.call("SetTimezone", timezone_name="Europe/Rome", container_names=["hostile"])
    assert answer.successes == 1
    assert hostile.run_in("hostile", "cat", "/etc/timezone").strip() == "Europe/Rome"


def test_links_in_a_directory_that_is_shared(hostile: Tremplin) -> None:
    """With a file of the VM behind them: neither an export nor an import goes there."""
    machine = hostile.machine
    machine.run("sh", "-ec", "mkdir -p /run/vm; echo precious >/run/vm/file; chmod 777 /run/shared")
    shared = "/mnt/chromeos"
    links = f"cd {shared}; ln -s /run/vm/file out.partial; ln -s /run/vm there; mkfifo fifo"
    _run(hostile, f"{links}; ln -s /run/vm/file in; mkdir folder; ln -s /run/vm/file folder/x")
    before = len(hostile.host.reports)
    hostile.call("ExportContainer", container_name="hostile", export_path="/run/shared/out")
    hostile.host.wait_for(
        "UpdateExportStatus",
        container="hostile",
        status=pb.ContainerExportProgress.DONE,
        after=before,
    )
    assert machine.run("cat", "/run/vm/file") == "precious\n"
    answer = hostile.call(
        "ExportContainer", container_name="hostile", export_path="/run/shared/there/out"
    )
    assert answer.status == pb.ExportContainerResponse.FAILED
    for name, reason in (("in", "link"), ("there/file", "link"), ("fifo", "not a regular file")):
        path = f"/run/shared/{name}"
        imported = hostile.call("ImportContainer", container_name="new", import_path=path)
        assert imported.status == pb.ImportContainerResponse.FAILED
        assert reason in imported.failure_reason
        created = hostile.call(
            "CreateContainer", container_name="new", rootfs_path=path, metadata_path=path
        )
        assert created.status == pb.CreateContainerResponse.FAILED
        assert reason in created.failure_reason
    assert machine.run("ls", "/run/vm") == "file\n"
    machine.run("sh", "-c", "rm -r /run/shared/* /run/vm")


def test_a_container_that_does_not_answer(hostile: Tremplin) -> None:
    """Others are served while its files are waited for, by however many calls."""
    machine = hostile.machine
    hostile.create("other")
    hostile.start_container("other")

    def hang() -> object:
        request = pb.GetContainerUsernameRequest(container_name="hostile")
        with contextlib.suppress(grpc.RpcError):
            return hostile.stub.GetContainerUsername(request, timeout=2)
        return None

    with ContainerFiles(machine.lxd_socket, "hostile") as files, ThreadPoolExecutor(40) as threads:
        files.lstat("/")
        # What serves the files of a container, as a filesystem of the container's could hold it up.
        (server,) = machine.run("pgrep", "-f", "forkfile").split()
        machine.run("kill", "-STOP", server)
        try:
            assert list(threads.map(lambda _: hang(), range(40))) == [None] * 40
            began = time.monotonic()
            info = hostile.call("GetContainerInfo", container_name="other")
            assert info.status == pb.GetContainerInfoResponse.RUNNING
            found = hostile.call("GetContainerUsername", container_name="other")
            assert found.status == _USER.USER_NOT_FOUND
            assert time.monotonic() - began < 20
        finally:
            machine.run("kill", "-CONT", server)
    wait_until(lambda: hang() is not None, "an answer")
