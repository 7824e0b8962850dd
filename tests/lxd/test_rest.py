"""The smaller RPCs: time zone, network, debug information, ports, devices."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from agent.pb import tremplin_pb2 as pb

if TYPE_CHECKING:
    from tests.lxd.host import Report, Tremplin


@pytest.fixture
def running(tremplin: Tremplin) -> Tremplin:
    """Tremplin with a running container `rest`."""
    tremplin.create("rest")
    tremplin.start_container("rest")
    return tremplin


def test_timezone(running: Tremplin) -> None:
    """By the zone's file where the container has it, else by TZ."""
    running.create("stopped")
    names = ["rest", "stopped", "nobody", "a_b"]
    answer = running.call(
        "SetTimezone",
        timezone_name="Europe/Berlin",
        posix_tz_string="CET-1CEST,M3.5.0,M10.5.0/3",
        container_names=names,
    )
    assert answer.successes == 2
    assert len(answer.failure_reasons) == 2
    assert "no such container" in answer.failure_reasons[0]
    assert running.run_in("rest", "date", "-d", "2020-07-01 12:00", "+%Z").strip() == "CEST"

    running.run_in("rest", "mkdir", "-p", "/usr/share/zoneinfo/Europe")
    running.run_in("rest", "sh", "-c", "echo x >/usr/share/zoneinfo/Europe/Berlin")
    running.run_in("rest", "sh", "-c", "echo Etc/UTC >/etc/timezone")
    answer = running.call(
        "SetTimezone", timezone_name="Europe/Berlin", container_names=["rest", "stopped"]
    )
    assert answer.successes == 1
    assert "does not know the zone" in answer.failure_reasons[0]
    link = running.run_in("rest", "readlink", "/etc/localtime").strip()
    assert link == "/usr/share/zoneinfo/Europe/Berlin"
    assert running.run_in("rest", "cat", "/etc/timezone").strip() == "Europe/Berlin"
    assert running.machine.run("lxc", "config", "get", "rest", "environment.TZ").strip() == ""


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "/etc/passwd", "a b"])
def test_no_timezone(running: Tremplin, name: str) -> None:
    """What is no time zone changes nothing."""
    answer = running.call("SetTimezone", timezone_name=name, container_names=["rest"])
    assert (answer.successes, len(answer.failure_reasons)) == (0, 1)


def test_debug_info(running: Tremplin) -> None:
    """Versions, disk, containers and their logs; no user's name."""
    running.call("SetUpUser", container_name="rest", container_username="rumpelstilz")
    text = running.call("GetDebugInfo").debug_information
    for part in ("LXD 5.", "MiB free", "container rest: Running", "[log of container rest]"):
        assert part in text
    assert "rumpelstilz" not in text
    assert "rumpelstilz" not in running.log.read_text()


_TEXTS = ("", "\0", "/a\0b", "../..", "%s", "\u20ac", "x" * 70_000)


def _filled(message: Any, text: str, kept: dict[str, str]) -> None:
    for field in message.DESCRIPTOR.fields:
        if field.type != field.TYPE_STRING or field.name in kept:
            continue
        if field.is_repeated:
            getattr(message, field.name).append(text)
        else:
            setattr(message, field.name, text)
    for name, value in kept.items():
        if name in message.DESCRIPTOR.fields_by_name:
            setattr(message, name, value)


@pytest.mark.parametrize("name", ["", "rest"])
def test_any_text(running: Tremplin, name: str) -> None:
    """Hosts abort on a gRPC status that they do not expect: every text is answered with OK, and
    changes nothing.
    """
    kept = {"container_name": name} if name else {}
    before = running.machine.run("lxc", "query", "/1.0/instances/rest")
    for method in pb.DESCRIPTOR.services_by_name["Tremplin"].methods:
        if method.name == "DeleteContainer" or (name and method.name == "StopContainer"):
            continue
        for text in _TEXTS:
            request = getattr(pb, method.input_type.name)()
            _filled(request, text, kept)
            getattr(running.stub, method.name)(request, timeout=60)
    assert running.machine.run("lxc", "query", "/1.0/instances/rest") == before


def test_frozen(running: Tremplin) -> None:
    """A start is what a container that somebody paused needs to run."""
    running.machine.run("lxc", "pause", "rest")
    running.start_container("rest")
    assert running.machine.containers() == {"rest": "Running"}


def test_host_network_changed(running: Tremplin) -> None:
    """The name server stays up."""
    pids = running.machine.run("pidof", "dnsmasq")
    running.call("HostNetworkChanged")
    assert running.machine.run("pidof", "dnsmasq") == pids


def _ports_told(running: Tremplin, wanted: list[int] | None, after: int) -> Report:
    def has(report: Report) -> bool:
        ports = report.message.container_ports
        if wanted is None:
            return "rest" not in ports
        return "rest" in ports and list(ports["rest"].listening_tcp4_ports) == wanted

    return running.host.wait_for("UpdateListeningPorts", after=after, condition=has)


def test_listening_ports(running: Tremplin) -> None:
    """They are told when they change, and when the container is gone."""
    before = len(running.host.reports)
    server = running.machine.spawn(
        "lxc", "exec", "rest", "--", "nc", "-l", "-p", "8123", stdout=subprocess.DEVNULL
    )
    _ports_told(running, [8123], before)
    before = len(running.host.reports)
    running.machine.run("lxc", "stop", "--force", "rest")
    _ports_told(running, None, before)
    server.wait(60)


def test_devices(running: Tremplin) -> None:
    """What the VM does not have cannot be given; taking away what is not there is fine."""
    answer = running.call(
        "UpdateContainerDevices",
        container_name="rest",
        updates={"MICROPHONE": pb.DISABLE, "CAMERA": pb.ENABLE, "TELESCOPE": pb.ENABLE},
    )
    statuses = pb.UpdateContainerDevicesResponse
    assert answer.status == statuses.OK
    assert dict(answer.results) == {
        "MICROPHONE": statuses.SUCCESS,
        "CAMERA": statuses.NO_SUCH_VM_DEVICE,
        "TELESCOPE": statuses.NO_SUCH_VM_DEVICE,
    }
    answer = running.call("UpdateContainerDevices", container_name="nobody")
    assert answer.status == statuses.NO_SUCH_CONTAINER


def test_camera(running: Tremplin) -> None:
    """A device of the VM comes and goes in a running container."""
    machine = running.machine
    machine.run("mknod", "/dev/video91", "c", "1", "3")
    try:
        fields = {"container_name": "rest", "updates": {"CAMERA": pb.ENABLE}}
        answer = running.call("UpdateContainerDevices", **fields)
        assert dict(answer.results) == {"CAMERA": pb.UpdateContainerDevicesResponse.SUCCESS}
        assert "crw-rw-rw-" in running.run_in("rest", "ls", "-l", "/dev/video91")
        fields["updates"] = {"CAMERA": pb.DISABLE}
        running.call("UpdateContainerDevices", **fields)
        assert "video91" not in running.run_in("rest", "ls", "/dev")
    finally:
        machine.run("rm", "/dev/video91")


def test_microphone_taken_away(running: Tremplin) -> None:
    """By a start without audio capture; a start that says nothing of it leaves it."""
    machine = running.machine
    machine.run("sh", "-c", "mkdir -p /dev/snd && mknod /dev/snd/pcmC91D0c c 1 3")
    try:
        fields = {"container_name": "rest", "updates": {"MICROPHONE": pb.ENABLE}}
        answer = running.call("UpdateContainerDevices", **fields)
        assert dict(answer.results) == {"MICROPHONE": pb.UpdateContainerDevicesResponse.SUCCESS}
        for disabled in (False, True):
            machine.run("lxc", "stop", "--force", "rest")
            running.start_container("rest", disable_audio_capture=disabled)
            found = running.run_in("rest", "sh", "-c", "ls /dev/snd 2>&1 || true")
            assert ("pcmC91D0c" in found) is not disabled
    finally:
        machine.run("rm", "/dev/snd/pcmC91D0c")


def test_nobody_has_the_uid(running: Tremplin) -> None:
    """Before SetUpUser there is no user to be found."""
    answer = running.call("GetContainerUsername", container_name="rest")
    assert answer.status == pb.GetContainerUsernameResponse.USER_NOT_FOUND
    assert "nobody has uid 1000" in answer.failure_reason


def test_usb(running: Tremplin) -> None:
    """Without a device at the port, or without the container, it is refused."""
    attach = running.call("AttachUsbToContainer", port_num=3, container_name="rest")
    assert attach.status == pb.AttachUsbToContainerResponse.FAILED
    assert "no USB device at port 3" in attach.failure_reason
    attach = running.call("AttachUsbToContainer", port_num=3, container_name="nobody")
    assert attach.status == pb.AttachUsbToContainerResponse.NO_SUCH_CONTAINER
    detach = running.call("DetachUsbFromContainer", port_num=3)
    assert detach.status == pb.DetachUsbFromContainerResponse.FAILED
