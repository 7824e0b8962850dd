"""The host of the tests: a real listener that writes down what it is told, and tremplin itself."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from concurrent import futures
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc

from agent.pb import tremplin_pb2 as pb
from agent.pb.tremplin_pb2_grpc import (
    TremplinListenerServicer,
    TremplinStub,
    add_TremplinListenerServicer_to_server,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.lxd.machine import Machine

_SECONDS = 60.0
_METHODS = [method.name for method in pb.DESCRIPTOR.services_by_name["TremplinListener"].methods]


class Report(NamedTuple):
    """One call of tremplin's to the host."""

    method: str
    message: Any
    at: float
    """time.monotonic() of its arrival."""


class Host:
    """Serves TremplinListener on a unix socket."""

    def __init__(self, path: Path) -> None:
        self.address = f"unix:{path}"
        self.reports: list[Report] = []
        self.hooks: dict[str, Callable[[Any], None]] = {}
        """By method: called with the message, before it is answered."""
        self._changed = threading.Condition()
        self._server: grpc.Server | None = None
        self.start()

    def start(self) -> None:
        """Begins to listen."""
        server = grpc.server(futures.ThreadPoolExecutor(16))
        handlers = {method: staticmethod(self._handler(method)) for method in _METHODS}
        servicer = type("Servicer", (TremplinListenerServicer,), handlers)
        add_TremplinListenerServicer_to_server(servicer(), server)
        server.add_insecure_port(self.address)
        server.start()
        self._server = server

    def stop(self) -> None:
        """Goes away; calls in flight are cut."""
        if self._server is not None:
            self._server.stop(None).wait()
            self._server = None

    def _handler(self, method: str) -> Callable[[Any, Any], pb.EmptyMessage]:
        def handle(message: Any, context: Any) -> pb.EmptyMessage:
            with self._changed:
                self.reports.append(Report(method, message, time.monotonic()))
                self._changed.notify_all()
            hook = self.hooks.get(method)
            if hook is not None:
                hook(message)
            return pb.EmptyMessage()

        return handle

    def wait_for(
        self,
        method: str,
        *,
        container: str = "",
        status: int | None = None,
        not_status: int | None = None,
        after: int = 0,
        condition: Callable[[Report], bool] = lambda _: True,
        seconds: float = _SECONDS,
    ) -> Report:
        """The first report of that kind; after: how many reports to pass over."""

        def find() -> Report | None:
            for report in self.reports[after:]:
                message = report.message
                if (
                    report.method == method
                    and (not container or message.container_name == container)
                    and (status is None or message.status == status)
                    and (not_status is None or message.status != not_status)
                    and condition(report)
                ):
                    return report
            return None

        with self._changed:
            found = self._changed.wait_for(find, seconds)
        assert found, f"no {method} of {container or 'anything'} in {self.reports[after:]}"
        report = find()
        assert report is not None
        return report

    def of(self, method: str, container: str) -> list[Any]:
        """The messages of one kind about one container."""
        return [
            report.message
            for report in list(self.reports)
            if report.method == method and report.message.container_name == container
        ]


def start_is_cut_off(call: Any) -> bool:
    """Whether a call of StartContainer, which tremplin was killed in, ends without having said how
    the start ended: in an error or, if tremplin was slow, in an answer that it was still at it.
    """
    statuses = pb.StartContainerResponse
    return call.exception() is not None or call.result().status in {
        statuses.STARTING,
        statuses.REMAPPING,
    }


class Tremplin:
    """A tremplin in the machine, and the host's stub for it."""

    def __init__(self, machine: Machine, host: Host, **options: str) -> None:
        """options: further tremplin options."""
        self.machine = machine
        self.host = host
        self._options = options
        self.log = machine.directory / "tremplin.log"
        self._address = f"unix:{machine.directory}/tremplin.sock"
        self.start()

    def start(self) -> None:
        """Starts it and returns when the host has heard of it."""
        before = len(self.host.reports)
        directory = self.machine.directory
        options = {
            "listen": self._address,
            "listener": self.host.address,
            "lxd_dir": str(self.machine.lxd_dir),
            "lxd_conf": f"{directory}/stateful/lxd_conf",
            "lxd_subnet": "100.115.92.1/24",
            "run_dir": "/run/maitred",
            "shared_dir": "/run/shared",
            "token_dir": "/run/tokens",
        } | self._options
        self.machine.run("mkdir", "-p", "/run/shared")
        words = [f"tremplin.{key}={value}" for key, value in options.items()]
        self.spawn(words)
        try:
            self.host.wait_for("TremplinReady", after=before)
        except AssertionError:
            for log in self.machine.directory.glob("*.log"):
                print(log.read_text()[-4000:])  # noqa: T201
            raise
        self._channel = grpc.insecure_channel(self._address)
        self.stub = TremplinStub(self._channel)

    def spawn(self, words: list[str]) -> None:
        """Starts the process; words: its arguments."""
        with self.log.open("a") as log:
            self.process = self.machine.spawn(
                sys.executable, "-m", "agent.tremplin", *words, stdout=log, stderr=log
            )

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Ends it and returns when it has ended."""
        self._channel.close()
        self.machine.kill(self.process, number)

    def restart(self, **options: str) -> None:
        """Kills it and starts it again; options: further tremplin options, for this run alone."""
        self.kill()
        before = self._options
        self._options = before | options
        try:
            self.start()
        finally:
            self._options = before

    def call(self, method: str, **fields: Any) -> Any:
        """The response to an RPC; fields: of its request."""
        request = getattr(pb, f"{method}Request")(**fields)
        return getattr(self.stub, method)(request, timeout=_SECONDS)

    def create(self, name: str, *, alias: str = "busybox", server: str = "") -> Report:
        """Makes a container and returns the host's last report of it."""
        return self.end_of_create(name, self.begin_create(name, alias=alias, server=server))

    def begin_create(self, name: str, *, alias: str = "big", server: str = "") -> int:
        """Has a container made; how many reports there were before that."""
        before = len(self.host.reports)
        response = self.call(
            "CreateContainer",
            container_name=name,
            image_server=server or self.machine.new_server(),
            image_alias=alias,
        )
        assert response.status == pb.CreateContainerResponse.CREATING, response
        return before

    def begin_create_from_files(self, name: str, *, rootfs: object, metadata: object) -> int:
        """Has a container made of an image in two files; how many reports there were before."""
        before = len(self.host.reports)
        response = self.call(
            "CreateContainer",
            container_name=name,
            rootfs_path=str(rootfs),
            metadata_path=str(metadata),
        )
        assert response.status == pb.CreateContainerResponse.CREATING, response
        return before

    def end_of_create(self, name: str, after: int) -> Report:
        """The last report of a creation; after: what begin_create() gave."""
        return self.host.wait_for(
            "UpdateCreateStatus",
            container=name,
            not_status=pb.ContainerCreationProgress.DOWNLOADING,
            after=after,
        )

    def start_container(self, name: str, **fields: Any) -> None:
        """Has a container started, and returns when the host has heard that it was.

        fields: of the request.
        """
        before = len(self.host.reports)
        self.call("StartContainer", container_name=name, **fields)
        end = self.host.wait_for("UpdateStartStatus", container=name, after=before)
        assert end.message.status == pb.ContainerStartProgress.STARTED, end

    def peak_memory(self) -> int:
        """The most that it ever had resident, KiB."""
        status = Path(f"/proc/{self.machine.inner_pid(self.process)}/status").read_text()
        (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
        return int(peak)

    def run_in(self, container: str, *command: str) -> str:
        """What a command prints that is run in a running container."""
        return self.machine.run("lxc", "exec", container, "--", *command)

    def ended(self) -> int | None:
        """Its exit code, None while it runs."""
        try:
            return self.process.wait(0)
        except subprocess.TimeoutExpired:
            return None
