"""LXD under PID 1: started by tremplin, started again when it dies, its database reset."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest

from agent.pb import tremplin_pb2 as pb
from agent.process_supervisor.client import Client
from tests.lxd.host import Host, Tremplin
from tests.lxd.machine import new_machine, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

LXD = pb.StartLxdProgress
CREATED = pb.ContainerCreationProgress.CREATED


class _SupervisedTremplin(Tremplin):
    """A tremplin that our PID 1 runs, in its PID namespace."""

    def spawn(self, words: list[str]) -> None:
        """See Tremplin."""
        with self.supervisor() as client:
            client.launch(
                [sys.executable, "-m", "agent.tremplin", *words],
                name="tremplin",
                env={"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
                console=True,
                respawn=True,
            )

    def supervisor(self) -> Client:
        """A connection to PID 1."""
        return Client.connect(f"/proc/{self.machine.init_pid}/root/run/maitred", timeout=60)

    def lxd_pid(self) -> int:
        """The pid of LXD in the namespace of PID 1; 0 while it does not run."""
        with self.supervisor() as client:
            return int(client.info("lxd")["pid"] or 0)

    def restart_both(self) -> None:
        """LXD and tremplin end and are started again; returns when the host has heard of it."""
        before = len(self.host.reports)
        with self.supervisor() as client:
            client.stop("tremplin")
            client.stop("lxd")
            client.start("lxd")
            client.start("tremplin")
        self.host.wait_for("TremplinReady", after=before, seconds=120)


@pytest.fixture(scope="module")
def supervised() -> Iterator[_SupervisedTremplin]:
    """PID 1 and tremplin, which starts LXD, with one stopped container `kept`."""
    with new_machine() as machine:
        directory = machine.directory
        machine.serve_images()
        log = (directory / "pid1.log").open("a")
        machine.spawn(
            sys.executable, "-m", "agent.process_supervisor", "maitred.setup=no",
            f"maitred.listen=unix:{directory}/maitred.sock", "maitred.run_dir=/run/maitred",
            "maitred.no_startup_processes=yes", stdout=log, stderr=log,
        )  # fmt: skip
        log.close()
        socket = Path(f"/proc/{machine.init_pid}/root/run/maitred/supervisor.sock")
        wait_until(socket.exists, "PID 1")
        host = Host(directory / "host.sock")
        tremplin = _SupervisedTremplin(machine, host)
        tremplin.create("kept")
        yield tremplin
        host.stop()


def test_lxd_dies(supervised: _SupervisedTremplin) -> None:
    """PID 1 starts it again; the host may ask for it meanwhile and hears when it is up."""
    machine, host = supervised.machine, supervised.host
    pid = supervised.lxd_pid()
    with supervised.supervisor() as client:
        client.signal("lxd", "SIGKILL")
    wait_until(lambda: supervised.lxd_pid() not in {0, pid}, "the new LXD")
    answer = supervised.call("StartLxd")
    if answer.status == pb.StartLxdResponse.STARTING:
        assert host.wait_for("UpdateStartLxdStatus").message.status == LXD.STARTED
    else:
        assert answer.status == pb.StartLxdResponse.ALREADY_RUNNING
    assert machine.containers() == {"kept": "Stopped"}


def _has_address(supervised: _SupervisedTremplin, name: str) -> bool:
    answer = supervised.call("GetContainerInfo", container_name=name)
    return bool(answer.ipv4_address)


def test_lxd_dies_and_a_container_meanwhile(supervised: _SupervisedTremplin) -> None:
    """LXD 5.0.2 dies of this (onStop) once more in its start; the host notices no more than that
    the container is down, which has an address again as soon as it is started.
    """
    machine = supervised.machine
    supervised.create("stays")
    for name in ("kept", "stays"):
        supervised.start_container(name)
    init = machine.api.instances["kept"].state.get().json()["metadata"]["pid"]
    before = len(supervised.host.reports)
    with supervised.supervisor() as client:
        client.signal("lxd", "SIGKILL")
    machine.run("kill", "-KILL", str(init))
    supervised.host.wait_for("ContainerShutdown", container="kept", after=before)
    supervised.start_container("kept")
    wait_until(lambda: _has_address(supervised, "kept"), "an address")
    assert machine.containers() == {"kept": "Running", "stays": "Running"}
    assert supervised.host.of("ContainerShutdown", "stays") == []
    machine.run("lxc", "stop", "--force", "kept")
    machine.run("lxc", "delete", "--force", "stays")


def test_name_server_that_lxd_does_not_know(supervised: _SupervisedTremplin) -> None:
    """LXD was killed before it had noted it; the next one has its bridge at once all the same."""
    machine = supervised.machine
    before = machine.run("pidof", "dnsmasq").split()
    pid = supervised.lxd_pid()
    machine.run("rm", machine.lxd_dir / "networks/lxdbr0/dnsmasq.pid")
    with supervised.supervisor() as client:
        client.signal("lxd", "SIGKILL")
    wait_until(lambda: supervised.lxd_pid() not in {0, pid}, "the new LXD")
    machine.run("lxd", "waitready", "--timeout", "60")
    assert machine.api.networks["lxdbr0"].get().json()["metadata"]["status"] == "Created"
    after = machine.run("pidof", "dnsmasq").split()
    assert len(after) == 1
    assert after != before


def test_lxd_was_stopped(supervised: _SupervisedTremplin) -> None:
    """PID 1 starts it no more by itself; the host has it started."""
    before = len(supervised.host.reports)
    with supervised.supervisor() as client:
        client.stop("lxd")
    assert supervised.call("StartLxd").status == pb.StartLxdResponse.STARTING
    told = supervised.host.wait_for("UpdateStartLxdStatus", after=before)
    assert told.message.status == LXD.STARTED
    assert supervised.machine.containers() == {"kept": "Stopped"}


def _works(supervised: _SupervisedTremplin) -> None:
    assert supervised.machine.containers() == {"kept": "Stopped"}
    supervised.start_container("kept")
    wait_until(lambda: _has_address(supervised, "kept"), "an address")
    before = len(supervised.host.reports)
    supervised.call("StopContainer", container_name="kept")
    supervised.host.wait_for("UpdateStopStatus", container="kept", after=before)


def test_images_after_a_power_cut(supervised: _SupervisedTremplin) -> None:
    """LXD knows of an image of which there is nothing on the disk: it goes before the next
    creation. One that somebody imported stays, and so does each when LXD alone starts again.
    """
    machine = supervised.machine
    doubt = Path(f"/proc/{machine.init_pid}/root/run/maitred/tremplin-images-in-doubt")

    def create() -> tuple[int, str]:
        ended = supervised.create("cut", server=server, alias="big").message
        machine.run("lxc", "delete", "cut")
        return ended.status, ended.failure_reason

    server = machine.new_server()
    machine.forget_images()
    rootfs, metadata = machine.image_files("busybox")
    machine.run("lxc", "image", "import", metadata, rootfs)
    (imported,) = machine.images()
    assert create() == (CREATED, "")
    (image,) = set(machine.images()) - {imported}
    wait_until(lambda: machine.is_on_disk(image), "the mark of an image that is on the disk")
    machine.run("lxc", "image", "unset-property", image, "tremplin-on-disk")
    supervised.restart_both()
    assert not doubt.exists()
    machine.run("rm", machine.lxd_dir / f"images/{image}.rootfs")
    doubt.touch()
    assert create() == (CREATED, "")
    assert set(machine.images()) == {imported, image}
    assert not doubt.exists()
    machine.forget_images()


def test_reset_database(supervised: _SupervisedTremplin) -> None:
    """RECOVERING, STARTED, and the container is there and works."""
    before = len(supervised.host.reports)
    answer = supervised.call("StartLxd", reset_lxd_db=True)
    assert answer.status == pb.StartLxdResponse.STARTING
    for status in (LXD.RECOVERING, LXD.STARTED):
        supervised.host.wait_for("UpdateStartLxdStatus", status=status, after=before)
    _works(supervised)


def test_tremplin_killed_while_resetting(supervised: _SupervisedTremplin) -> None:
    """The next tremplin carries on, and the host is told once that LXD is up."""
    before = len(supervised.host.reports)
    answer = supervised.call("StartLxd", reset_lxd_db=True)
    assert answer.status == pb.StartLxdResponse.STARTING
    supervised.host.wait_for("UpdateStartLxdStatus", status=LXD.RECOVERING, after=before)
    again = supervised.call("StartLxd")
    assert again.status == pb.StartLxdResponse.STARTING
    with supervised.supervisor() as client:
        client.signal("tremplin", "SIGKILL")
    supervised.host.wait_for(
        "UpdateStartLxdStatus", not_status=LXD.RECOVERING, after=before, seconds=120
    )
    wait_until(lambda: _answer_to_start(supervised), "tremplin")
    told = [r.message for r in supervised.host.reports[before:] if hasattr(r.message, "status")]
    ends = [message.status for message in told if message.status != LXD.RECOVERING]
    assert ends == [LXD.STARTED]
    _works(supervised)


def test_tremplin_started_while_lxd_is_being_stopped(supervised: _SupervisedTremplin) -> None:
    """It waits for that end, and then starts LXD: it does not give up at each attempt."""
    host, log = supervised.host, supervised.machine.directory / "pid1.log"
    before, said = len(host.reports), len(log.read_text())
    with supervised.supervisor() as client, supervised.supervisor() as stopping:
        starts = client.info("tremplin")["starts"]
        with ThreadPoolExecutor(1) as thread:
            stop = thread.submit(stopping.stop, "lxd")
            wait_until(lambda: client.info("lxd")["state"] == "stopping", "the stop")
            client.signal("lxd", "SIGSTOP")  # it takes as long as it likes
            client.signal("tremplin", "SIGKILL")
            wait_until(
                lambda: "waiting for the end of an LXD" in log.read_text()[said:], "the wait"
            )
            client.signal("lxd", "SIGCONT")
            stop.result()
        host.wait_for("TremplinReady", after=before, seconds=120)
        assert client.info("tremplin")["starts"] == starts + 1
    _works(supervised)


def _answer_to_start(supervised: _SupervisedTremplin) -> bool:
    try:
        answer = supervised.call("StartLxd")
    except grpc.RpcError:
        return False
    return bool(answer.status == pb.StartLxdResponse.ALREADY_RUNNING)


def test_damaged_database(supervised: _SupervisedTremplin) -> None:
    """An LXD that cannot start any more gets a new database and finds its container."""
    before = len(supervised.host.reports)
    with supervised.supervisor() as client:
        client.stop("tremplin")
        client.stop("lxd")
        database = supervised.machine.lxd_dir / "database"
        supervised.machine.run(
            "sh", "-c", f"for f in {database}/global/* {database}/local.db; do"
            " head -c 5000 /dev/urandom >$f; done",
        )  # fmt: skip
        client.start("tremplin")
    supervised.host.wait_for("TremplinReady", after=before, seconds=120)
    statuses = [
        report.message.status
        for report in supervised.host.reports[before:]
        if report.method == "UpdateStartLxdStatus"
    ]
    assert statuses == [LXD.RECOVERING]
    _works(supervised)
